"""Samples of a shard to rows and pixels, in threads that stay ahead of the model."""

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

from pipeline.reasons import Reason
from pipeline.store.shards import Member, MissingImage, Sample
from pipeline.vision import images

AHEAD_BYTES = 1 << 28  # of samples that wait, whatever their number

Row = dict[str, Any]  # of embeddings_schema, or of REJECTS with its `reason`
Decoded = tuple[Row, np.ndarray | None]  # no pixels where the row has a `reason`


@dataclass(frozen=True)
class Limits:
    """What decoding may cost."""

    max_pixels: int  # of an image
    timeout_s: float  # of a sample
    threads: int
    ahead: int  # samples decoded before they are asked for


@dataclass
class Job:
    """A sample on its way through a thread."""

    sample: Sample
    begun: Future[float] = field(default_factory=Future)  # time.monotonic()
    done: Future[Decoded] = field(default_factory=Future)
    given_up: bool = False

    @property
    def bytes(self) -> int:
        return sum(len(member.data) for member in self.sample.members)


@dataclass(frozen=True)
class Decoder:
    """How the samples of one shard are decoded."""

    stem: str
    prepare: Callable[[Image.Image], np.ndarray]  # to the encoder's size, (h, w, 3) uint8
    limits: Limits

    def one(self, sample: Sample, given_up: Callable[[], bool] = lambda: False) -> Decoded:
        """The sample's row and its pixels; a row with a `reason` and no pixels if unreadable."""
        row, member = self.row(sample)
        if member is None:
            return row, None
        try:
            image = images.decode(member.data, self.limits.max_pixels, given_up)
        except images.BadImage as bad:
            return {**row, "member": member.name, "reason": bad.reason}, None
        row |= {"image_member": member.name, "tar_offset": member.offset, "tar_size": member.size}
        row |= {"image_width": image.width, "image_height": image.height}
        return row, self.prepare(image)

    def late(self, sample: Sample) -> Decoded:
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
        waiting: deque[Job] = deque()
        held = 0
        with Crew(self) as crew:
            for sample in samples:
                waiting.append(crew.begin(sample))
                held += waiting[-1].bytes
                while len(waiting) > self.limits.ahead or held > AHEAD_BYTES:
                    job = waiting.popleft()
                    held -= job.bytes
                    yield crew.result(job)
            while waiting:
                yield crew.result(waiting.popleft())


class Crew:
    """Threads that decode samples in the order they come; one that overruns is replaced.

    A thread cannot be stopped. One that is given up ends at its next read of the image, in the
    background; its successor takes its place at once, so that the other samples do not wait.
    Daemons, so that the process may end before they do: an executor would wait for them.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.todo: SimpleQueue[Job | None] = SimpleQueue()  # None: go home

    def __enter__(self) -> "Crew":
        for _ in range(self.decoder.limits.threads):
            self._hire()
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(Empty):  # what is still to do, nobody will ask for
            while True:
                self.todo.get_nowait()
        self.todo.put(None)

    def begin(self, sample: Sample) -> Job:
        job = Job(sample)
        self.todo.put(job)
        return job

    def result(self, job: Job) -> Decoded:
        """Of the oldest job: since those before it are done or given up, it has begun, or will."""
        left = job.begun.result() + self.decoder.limits.timeout_s - time.monotonic()
        if wait([job.done], max(left, 0)).done:
            return job.done.result()
        job.given_up = True
        self._hire()
        return self.decoder.late(job.sample)

    def _hire(self) -> None:
        threading.Thread(target=self._work, name="decode", daemon=True).start()

    def _work(self) -> None:
        while job := self.todo.get():
            job.begun.set_result(time.monotonic())
            try:
                job.done.set_result(self._decoded(job))
            except BaseException as error:  # the one who waits shall see it
                job.done.set_exception(error)
            if job.given_up:
                return
        self.todo.put(None)  # for the next

    def _decoded(self, job: Job) -> Decoded:
        return self.decoder.one(job.sample, lambda: job.given_up)
