"""Samples of a shard to rows and pixels, in threads that stay ahead of the model."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from pipeline.store.shards import MissingImage, Sample, ShardReader
from pipeline.vision import images

Row = dict[str, Any]  # of embeddings_schema, or of REJECTS with its `reason`


@dataclass(frozen=True)
class Decoder:
    """How the samples of one shard are decoded."""

    stem: str
    prepare: Callable[[Image.Image], np.ndarray]  # to the encoder's size, (h, w, 3) uint8
    max_pixels: int
    threads: int
    ahead: int  # samples decoded before they are asked for

    def one(self, sample: Sample) -> tuple[Row, np.ndarray | None]:
        """The sample's row and its pixels; a row with a `reason` and no pixels if unreadable."""
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
            member = sample.image()
        except MissingImage as missing:
            return {**row, "reason": str(missing)}, None
        try:
            image = images.decode(member.data, self.max_pixels)
        except images.BadImage as bad:
            return {**row, "member": member.name, "reason": str(bad)}, None
        row |= {"image_member": member.name, "tar_offset": member.offset, "tar_size": member.size}
        row |= {"image_width": image.width, "image_height": image.height}
        return row, self.prepare(image)

    def all(self, reader: ShardReader) -> Iterator[tuple[Row, np.ndarray | None]]:
        """`one` of every sample, in the order of the tar."""
        waiting: deque[Future[tuple[Row, np.ndarray | None]]] = deque()
        with ThreadPoolExecutor(self.threads) as pool:
            for sample in reader:
                waiting.append(pool.submit(self.one, sample))
                if len(waiting) > self.ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
