"""CIFAR: rows of its arrays, the shards made of them, the message where it is missing."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import cifar
from pipeline.store.shards import ShardReader


def test_rows_say_where_a_picture_is_from():
    pixels = np.arange(3 * 32 * 32 * 3, dtype=np.uint8).reshape(3, 32, 32, 3)
    rows = cifar.rows(pixels, [1, 0, 1], ["pickup_truck", "cat"], "train")
    assert [row[0] for row in rows] == [
        "train/cat/00000.png", "train/pickup truck/00001.png", "train/cat/00002.png",
    ]  # fmt: skip
    assert [row[1] for row in rows] == ["cat", "pickup truck", "cat"]
    assert all((row[2] == image).all() for row, image in zip(rows, pixels, strict=True))
    assert {row[3] for row in rows} == {None}


def test_only_cifar100_has_superlabels():
    classes = sorted(name for names in cifar.SUPERLABELS.values() for name in names.split())
    assert len(classes) == len(set(classes)) == 100 and len(cifar.SUPERLABELS) == 20
    rows = cifar.rows(np.zeros((100, 32, 32, 3), np.uint8), list(range(100)), classes, "test")
    above = {row[1]: row[3] for row in rows}
    assert above["wolf"] == "large carnivores" and above["lawn mower"] == "vehicles 2"


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_that_is_not_there(name, tmp_path):
    with pytest.raises(SystemExit, match=f"{name}: no intact cifar-10.*--data-dir") as caught:
        cifar.load(name, "train", str(tmp_path))
    assert "\n" not in str(caught.value)


def test_shards_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "PER_SHARD", 2)
    pixels = np.arange(3 * 32 * 32 * 3, dtype=np.uint8).reshape(3, 32, 32, 3)
    rows = cifar.rows(pixels, [1, 0, 1], ["dog", "cat"], "test")
    for out in ("one", "two"):
        cifar.write(rows, tmp_path / out)
    found = {}
    for path in sorted((tmp_path / "one").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
        with path.open("rb") as stream:
            for sample in ShardReader(stream, None):
                facts = json.loads(next(m.data for m in sample.members if m.suffix == "json"))
                image = Image.open(io.BytesIO(sample.image().data))
                found[facts["source"]] = facts["label"], np.asarray(image)
    assert {source: label for source, (label, _) in found.items()} == {
        row[0]: row[1] for row in rows
    }
    assert all((found[row[0]][1] == row[2]).all() for row in rows)
