"""Reads a shard and decodes it into batches of rows and pixels, in threads ahead of the model."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
from PIL import Image

from pipeline.runtime.reject_reasons import Reason
from pipeline.store import columns, compressed
from pipeline.store.listing import Shard
from pipeline.store.samples import Member, MissingImage, Sample
from pipeline.store.shards import ShardReader
from pipeline.vision import images

AHEAD_BYTES = 1 << 28  # limit of the samples that wait, in addition to `Limits.ahead`

Row = dict[str, Any]  # of embeddings_schema, or of REJECTS with its `reason`
Pixels = tuple[np.ndarray, ...]  # (h, w, 3) uint8 in the size of each encoder
Decoded = tuple[Row, Pixels | None]  # None where the row has a `reason`
Prepare = Callable[[Image.Image], Pixels]


@dataclass(frozen=True)
class Limits:
    """Limits of decoding."""

    max_pixels: int  # of an image
    timeout_s: float  # of a sample
    threads: int
    ahead: int  # samples decoded in advance
    image_suffixes: tuple[str, ...] = ()  # beside those of samples.IMAGE_SUFFIXES
    caption_suffixes: tuple[str, ...] = ()  # beside those of samples.CAPTION_SUFFIXES


@dataclass(frozen=True)
class PrepareEach:
    """An image for each of some encoders."""

    prepares: tuple[Callable[[Image.Image], np.ndarray], ...]

    def __call__(self, image: Image.Image) -> Pixels:
        return tuple(prepare(image) for prepare in self.prepares)


@dataclass(frozen=True)
class Batch:
    """Consecutive samples of a shard, decoded."""

    rows: list[Row]
    pixels: Pixels  # (rows, h, w, 3) uint8 for each encoder; empty without rows
    rejects: list[Row]  # among these samples
    end: str  # how the shard ended; "" where more batches follow
    decode_s: float  # CPU seconds


def batches(
    shard: Shard, prepare: Prepare, limits: Limits, batch_size: int, max_sample_bytes: int
) -> Iterator[Batch]:
    """Read and decode a shard into batches of `batch_size` rows; only the last may be smaller."""
    decoder = Decoder(shard.stem, prepare, limits)
    rows: list[Row] = []
    pixels: list[Pixels] = []
    rejects: list[Row] = []
    before_s = 0.0

    def batch(end: str) -> Batch:
        stacked = tuple(np.stack(each) for each in zip(*pixels, strict=True))
        return Batch(rows, stacked, rejects, end, decoder.busy_s - before_s)

    with compressed.open_tar(shard.url, shard.size, shard.now or shard.version) as stream:
        reader = ShardReader(stream, max_sample_bytes)
        for row, decoded in decoder.all(reader):
            if decoded is None:
                rejects.append(row)
                continue
            rows.append(row)
            pixels.append(decoded)
            if len(rows) == batch_size:
                yield batch("")
                rows, pixels, rejects, before_s = [], [], [], decoder.busy_s
        yield batch(reader.end)


@dataclass
class DecodeJob:
    """A sample that a thread decodes."""

    sample: Sample
    begun: Future[None] = field(default_factory=Future)
    done: Future[Decoded] = field(default_factory=Future)
    started: float | None = None  # time.monotonic(); None before, and while it waits for memory
    timed_out: bool = False
    busy_s: float = 0.0  # CPU seconds, once it is done

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Its time does not count while it waits for memory."""
        self.started = None
        yield
        self.started = time.monotonic()

    def left_s(self, limit_s: float) -> float:
        """Seconds of the limit that are left."""
        started = self.started
        return limit_s if started is None else started + limit_s - time.monotonic()

    @property
    def bytes(self) -> int:
        return sum(len(member.data) for member in self.sample.members)


@dataclass
class Decoder:
    """Decodes the samples of one shard."""

    stem: str
    prepare: Prepare
    limits: Limits
    busy_s: float = 0.0  # CPU seconds of the samples so far

    def one(
        self,
        sample: Sample,
        timed_out: Callable[[], bool] = lambda: False,
        waiting: images.Waiting = nullcontext,
    ) -> Decoded:
        """The sample's row and its pixels; a row with a `reason` and no pixels if unreadable."""
        row, member = self.row(sample)
        if member is None:
            return row, None
        try:
            image = images.decode(member.data, self.limits.max_pixels, timed_out, waiting)
        except images.BadImage as bad:
            return {**row, "member": member.name, "reason": bad.reason}, None
        row |= {"image_member": member.name, "tar_offset": member.offset, "tar_size": member.size}
        row |= {"image_width": image.width, "image_height": image.height}
        return row, self.prepare(image)

    def too_slow(self, sample: Sample) -> Decoded:
        """The reject of a sample whose decoding timed out."""
        row, member = self.row(sample)
        if member is None:
            return row, None
        reason = Reason.DECODE_TIMEOUT.because(f"more than {self.limits.timeout_s:g} s")
        return {**row, "member": member.name, "reason": reason}, None

    def row(self, sample: Sample) -> tuple[Row, Member | None]:
        """The fields known before decoding, and the image; a `reason` and None if it has none."""
        more = self.limits.caption_suffixes
        row: Row = {
            "sample_id": f"{self.stem}/{sample.id}",
            "shard": self.stem,
            "key": sample.key,
            "index": sample.index,
            "caption": sample.caption(more),
            "json": sample.json_text(),
            "text_problem": sample.text_problem(more),
            "cls": sample.class_text(),
            "kinds": columns.kinds(sample.values),  # of no table, but of the shard's facts
        }
        if sample.problem:
            return {**row, "reason": sample.problem}, None
        try:
            return row, sample.image(self.limits.image_suffixes)
        except MissingImage as missing:
            return {**row, "reason": str(missing)}, None

    def all(self, samples: Iterable[Sample]) -> Iterator[Decoded]:
        """`one` of every sample in order, or `too_slow`; ahead within `ahead` and AHEAD_BYTES."""
        waiting: deque[DecodeJob] = deque()
        held = 0
        with DecodePool(self) as pool:
            for sample in samples:
                waiting.append(pool.begin(sample))
                held += waiting[-1].bytes
                while len(waiting) > self.limits.ahead or held > AHEAD_BYTES:
                    job = waiting.popleft()
                    held -= job.bytes
                    yield pool.result(job)
            while waiting:
                yield pool.result(waiting.popleft())


class DecodePool:
    """Threads that decode samples in order; a thread that takes too long is replaced.

    A thread cannot be stopped. One that timed out ends at its next read of the image; a new one
    takes its place at once, so that the other samples do not wait. They are daemons, because an
    executor would wait for them when the process ends.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.todo: SimpleQueue[DecodeJob | None] = SimpleQueue()  # None: stop

    def __enter__(self) -> "DecodePool":
        for _ in range(self.decoder.limits.threads):
            self._start_thread()
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(Empty):  # nobody will ask for the rest
            while True:
                self.todo.get_nowait()
        self.todo.put(None)

    def begin(self, sample: Sample) -> DecodeJob:
        job = DecodeJob(sample)
        self.todo.put(job)
        return job

    def result(self, job: DecodeJob) -> Decoded:
        """The result of the oldest job. All before it have ended, so a thread is free for it."""
        limit_s = self.decoder.limits.timeout_s
        job.begun.result()
        while not wait([job.done], max(job.left_s(limit_s), 0)).done:
            if job.left_s(limit_s) <= 0:  # else it has waited for memory meanwhile
                job.timed_out = True
                self._start_thread()
                return self.decoder.too_slow(job.sample)
        self.decoder.busy_s += job.busy_s
        return job.done.result()

    def _start_thread(self) -> None:
        threading.Thread(target=self._work, name="decode", daemon=True).start()

    def _work(self) -> None:
        while job := self.todo.get():
            job.started = time.monotonic()
            job.begun.set_result(None)
            before = time.thread_time()
            try:
                decoded = self.decoder.one(job.sample, lambda: job.timed_out, job.waiting)
                job.busy_s = time.thread_time() - before
                job.done.set_result(decoded)
            except BaseException as error:  # raised again by `result`
                job.done.set_exception(error)
            if job.timed_out:
                return
        self.todo.put(None)  # for the next thread
