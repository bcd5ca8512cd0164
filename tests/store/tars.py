"""Tars to read, made as no writer of ours would, and what webdataset makes of them."""

import io
import tarfile
from pathlib import Path

import webdataset

from pipeline.store.samples import Sample
from pipeline.store.shard_writer import ShardWriter
from pipeline.store.shards import ShardReader

ODD = [  # names of one sample each, with the names of its members
    {"0.jpg": b"\xff\xd8", "0.json": b'{"a": 1}', "0.txt": b"a dog"},
    {"a/b/1.JPG": b"upper", "a/b/1.Txt": b"mixed"},
    {"dir.v1/2.jpg": b"a dot in the folder"},
    {"3.seg.jpg": b"dotted", "3.left.png": b"dotted too"},
    {"./4.png": b"", "./4.cls": b"7"},
    {"ünïcode/5.webp": b"w"},
    {"long/" + "x" * 150 + ".jpg": b"long", "long/" + "x" * 150 + ".json": b"{}"},
    {"a b/6 6.jpg": b"spaces"},
    {"7.jpg": b"x" * 70_000, "7.": b"empty suffix"},
]


def tar_of(*entries) -> bytes:
    """A tar of (name, data) pairs and ready TarInfo headers."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
            else:
                header = tarfile.TarInfo(entry[0])
                header.size = len(entry[1])
                tar.addfile(header, io.BytesIO(entry[1]))
    return buffer.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.type, header.linkname = kind, target
    return header


def read(data: bytes, limit: int | None = None) -> tuple[list[Sample], str]:
    reader = ShardReader(io.BytesIO(data), limit)
    return list(reader), reader.end


def as_dict(sample: Sample) -> dict:
    return {"__key__": sample.key, **{m.suffix: m.data for m in sample.members}}


def oracle(path: Path) -> list[dict]:
    found = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    return [{k: v for k, v in s.items() if k not in ("__url__", "__local_path__")} for s in found]


def written(pairs) -> bytes:
    buffer = io.BytesIO()
    with ShardWriter(buffer) as writer:
        for name, data in pairs:
            writer.add(name, data)
    return buffer.getvalue()


def flat(samples=ODD) -> list[tuple[str, bytes]]:
    return [pair for sample in samples for pair in sample.items()]


SMALL = [(f"{i:03d}.{s}", bytes([i]) * n) for i in range(3) for s, n in (("jpg", 600), ("txt", 9))]


def sample_of(**members: bytes) -> Sample:
    (sample,), _ = read(tar_of(*((f"0.{k.replace('__', '.')}", v) for k, v in members.items())))
    return sample
