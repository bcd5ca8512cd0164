"""What must hold for any bytes; Hypothesis and atheris look for bytes for which it does not."""

import io
import json
from collections.abc import Callable

import numpy as np
import pyarrow as pa

from pipeline.runtime.reject_reasons import Reason
from pipeline.store import columns
from pipeline.store.samples import Member, MissingImage, Sample
from pipeline.store.shard_writer import ShardWriter, labelled
from pipeline.store.shards import ShardReader
from pipeline.vision import images

MAX_BYTES = 1 << 16
MAX_PIXELS = 1 << 20
ENDS = ("complete", "no end-of-archive marker", "damaged at byte ", "zeros from byte ")
LABEL = {"status": "success", "cluster_caption": "a cat", "confidence": 0.5}


def is_reason(text: str) -> bool:
    """Whether a row may give this as its reason: a code of the set, one line, printable."""
    return text.partition(":")[0] in {r.value for r in Reason} and text.isprintable()


def reader(data: bytes) -> None:
    """Any tar is samples with ids of their own, that can be stored, judged and written again."""
    shard = ShardReader(io.BytesIO(data), MAX_BYTES)
    samples = list(shard)
    assert shard.end.startswith(ENDS) and shard.end.isprintable()
    assert len({s.id for s in samples}) == len(samples)
    assert [s.index for s in samples] == list(range(len(samples)))
    for sample in samples:
        assert sum(len(m.data) for m in sample.members) <= MAX_BYTES
        assert sample.problem is None or is_reason(sample.problem)
        pa.array([sample.key, sample.id, sample.caption(), sample.json_text()], pa.string())
        try:
            member = sample.image()
            assert data[member.offset :][: member.size] == member.data or not member.whole
        except MissingImage as missing:
            assert is_reason(str(missing))
    again = io.BytesIO()
    with ShardWriter(again) as writer:
        for sample in samples:
            for name, content in labelled(sample, LABEL):
                writer.add(name, content)
    assert not any(".." in s.key.split("/") for s in samples if s.problem is None)
    again.seek(0)
    written = ShardReader(again, None)
    assert len(list(written)) <= len(samples) and written.end == "complete"


def decoder(data: bytes) -> None:
    """Any bytes are an RGB picture within the limit, or a reason of the set."""
    try:
        image = images.decode(data, MAX_PIXELS)
    except images.BadImage as bad:
        assert is_reason(bad.reason)
        return
    assert image.mode == "RGB" and image.width * image.height <= MAX_PIXELS
    assert np.asarray(image).shape == (image.height, image.width, 3)


def texts(data: bytes) -> None:
    """Any json member is columns that can be stored, and takes a label; or it is none."""
    member = Member("0.json", "json", 0, len(data), data)
    sample = Sample("0", "0", 0, (member,), None)
    text = sample.json_text()
    kinds = columns.kinds(columns.parse(text))
    values = columns.parse(text)
    for name, kind in kinds.items():
        pa.array([columns.value(values.get(name), kind)], columns.TYPES[kind])
        pa.field(name, columns.TYPES[kind]).name.encode()
    found = dict(labelled(sample, LABEL))
    labels = json.loads(found["0.json" if text is not None else "0.ratecluster.json"])
    assert labels["ratecluster"] == LABEL
    if text is None:
        assert found["0.json"] == data


PROPERTIES: dict[str, Callable[[bytes], None]] = {
    "reader": reader,
    "decoder": decoder,
    "texts": texts,
}
