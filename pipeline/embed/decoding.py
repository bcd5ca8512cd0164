"""A shard to batches of rows and pixels, in threads that stay ahead of the model."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
from PIL import Image

from pipeline.runtime.reject_reasons import Reason
from pipeline.store import columns, storage
from pipeline.store.listing import Shard
from pipeline.store.shards import Member, MissingImage, Sample, ShardReader
from pipeline.vision import images

NO_PIXELS = np.zeros((0, 0, 0, 3), np.uint8)
AHEAD_BYTES = 1 << 28  # of samples that wait, whatever their number

Row = dict[str, Any]  # of embeddings_schema, or of REJECTS with its `reason`
Decoded = tuple[Row, np.ndarray | None]  # no pixels where the row has a `reason`
Prepare = Callable[[Image.Image], np.ndarray]  # to the encoder's size, (h, w, 3) uint8


@dataclass(frozen=True)
class Limits:
    """What decoding may cost."""

    max_pixels: int  # of an image
    timeout_s: float  # of a sample
    threads: int
    ahead: int  # samples decoded before they are asked for


@dataclass(frozen=True)
class Batch:
    """Neighbours in a shard, decoded."""

    rows: list[Row]
    pixels: np.ndarray  # (rows, h, w, 3) uint8
    rejects: list[Row]  # met on the way
    end: str  # how the shard ended; "" where it goes on
    decode_s: float  # of processors


def batches(
    shard: Shard, prepare: Prepare, limits: Limits, batch_size: int, max_sample_bytes: int
) -> Iterator[Batch]:
    """Read and decode a shard; cut within it, so that the batches depend on nothing else."""
    decoder = Decoder(shard.stem, prepare, limits)
    rows: list[Row] = []
    pixels: list[np.ndarray] = []
    rejects: list[Row] = []
    told_s = 0.0

    def batch(end: str) -> Batch:
        spent = decoder.busy_s - told_s
        return Batch(rows, np.stack(pixels) if pixels else NO_PIXELS, rejects, end, spent)

    with storage.open_read(shard.url, shard.size, shard.version) as stream:
        reader = ShardReader(stream, max_sample_bytes)
        for row, decoded in decoder.all(reader):
            if decoded is None:
                rejects.append(row)
                continue
            rows.append(row)
            pixels.append(decoded)
            if len(rows) == batch_size:
                yield batch("")
                rows, pixels, rejects, told_s = [], [], [], decoder.busy_s
        yield batch(reader.end)


@dataclass
class DecodeJob:
    """A sample on its way through a thread."""

    sample: Sample
    begun: Future[float] = field(default_factory=Future)  # time.monotonic()
    done: Future[Decoded] = field(default_factory=Future)
    timed_out: bool = False

    busy_s: float = 0.0  # of the processor, once it is done

    @property
    def bytes(self) -> int:
        return sum(len(member.data) for member in self.sample.members)


@dataclass
class Decoder:
    """How the samples of one shard are decoded."""

    stem: str
    prepare: Prepare
    limits: Limits
    busy_s: float = 0.0  # of processors, for samples asked for so far

    def one(self, sample: Sample, timed_out: Callable[[], bool] = lambda: False) -> Decoded:
        """The sample's row and its pixels; a row with a `reason` and no pixels if unreadable."""
        row, member = self.row(sample)
        if member is None:
            return row, None
        try:
            image = images.decode(member.data, self.limits.max_pixels, timed_out)
        except images.BadImage as bad:
            return {**row, "member": member.name, "reason": bad.reason}, None
        row |= {"image_member": member.name, "tar_offset": member.offset, "tar_size": member.size}
        row |= {"image_width": image.width, "image_height": image.height}
        return row, self.prepare(image)

    def too_slow(self, sample: Sample) -> Decoded:
        """What becomes of a sample that nobody waits for any more."""
        row, member = self.row(sample)
        if member is None:
            return row, None
        reason = Reason.DECODE_TIMEOUT.because(f"more than {self.limits.timeout_s:g} s")
        return {**row, "member": member.name, "reason": reason}, None

    def row(self, sample: Sample) -> tuple[Row, Member | None]:
        """What is known before decoding, and the image; a `reason` and None if it has none."""
        row: Row = {
            "sample_id": f"{self.stem}/{sample.id}",
            "shard": self.stem,
            "key": sample.key,
            "index": sample.index,
            "caption": sample.caption(),
            "json": sample.json_text(),
            "kinds": columns.kinds(sample.values),  # of no table, but of the shard's facts
        }
        if sample.problem:
            return {**row, "reason": sample.problem}, None
        try:
            return row, sample.image()
        except MissingImage as missing:
            return {**row, "reason": str(missing)}, None

    def all(self, samples: Iterable[Sample]) -> Iterator[Decoded]:
        """`one` of every sample, in the order given; `late` of those that take too long.

        Samples are decoded ahead, as many as `ahead` and AHEAD_BYTES allow.
        """
        waiting: deque[DecodeJob] = deque()
        held = 0
        with DecodePool(self) as crew:
            for sample in samples:
                waiting.append(crew.begin(sample))
                held += waiting[-1].bytes
                while len(waiting) > self.limits.ahead or held > AHEAD_BYTES:
                    job = waiting.popleft()
                    held -= job.bytes
                    yield crew.result(job)
            while waiting:
                yield crew.result(waiting.popleft())


class DecodePool:
    """Threads that decode samples in the order they come; one that overruns is replaced.

    A thread cannot be stopped. One that is given up ends at its next read of the image, in the
    background; its successor takes its place at once, so that the other samples do not wait.
    Daemons, so that the process may end before they do: an executor would wait for them.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.todo: SimpleQueue[DecodeJob | None] = SimpleQueue()  # None: go home

    def __enter__(self) -> "DecodePool":
        for _ in range(self.decoder.limits.threads):
            self._hire()
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(Empty):  # what is still to do, nobody will ask for
            while True:
                self.todo.get_nowait()
        self.todo.put(None)

    def begin(self, sample: Sample) -> DecodeJob:
        job = DecodeJob(sample)
        self.todo.put(job)
        return job

    def result(self, job: DecodeJob) -> Decoded:
        """Of the oldest job: since those before it are done or given up, it has begun, or will."""
        left = job.begun.result() + self.decoder.limits.timeout_s - time.monotonic()
        if wait([job.done], max(left, 0)).done:
            self.decoder.busy_s += job.busy_s
            return job.done.result()
        job.timed_out = True
        self._hire()
        return self.decoder.too_slow(job.sample)

    def _hire(self) -> None:
        threading.Thread(target=self._work, name="decode", daemon=True).start()

    def _work(self) -> None:
        while job := self.todo.get():
            job.begun.set_result(time.monotonic())
            before = time.thread_time()
            try:
                decoded = self._decoded(job)
                job.busy_s = time.thread_time() - before
                job.done.set_result(decoded)
            except BaseException as error:  # the one who waits shall see it
                job.done.set_exception(error)
            if job.timed_out:
                return
        self.todo.put(None)  # for the next

    def _decoded(self, job: DecodeJob) -> Decoded:
        return self.decoder.one(job.sample, lambda: job.timed_out)
