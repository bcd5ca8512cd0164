"""CIFAR: rows of its arrays, its shards, and the error where it is not there."""

import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks import cifar
from pipeline.runtime.errors import UserError
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
    with pytest.raises(UserError, match=f"{name}: no intact cifar-10.*--data-dir") as caught:
        cifar.load(name, "train", str(tmp_path))
    assert "\n" not in str(caught.value)


def samples_in(folder):
    with (folder / "00000.tar").open("rb") as stream:
        return list(ShardReader(stream, None))


def test_cifar10_is_lossless_png(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    targets, classes = [i % 2 for i in range(12)], ["airplane", "cat"]
    cifar.write(cifar.rows(pixels, targets, classes, "test"), str(tmp_path))
    found = samples_in(tmp_path)
    assert len(found) == 12
    for sample in found:
        record = json.loads(sample.json_text())
        index = int(record["source"][-9:-4])
        assert sample.image().suffix == "png" and "superlabel" not in record
        image = np.asarray(Image.open(io.BytesIO(sample.image().data)))
        assert (image == pixels[index]).all()
        label = classes[targets[index]]
        assert (record["label"], record["caption"]) == (label, None)
        assert record["source"] == f"test/{label}/{index:05d}.png"
    assert "superlabel" not in pq.read_schema(tmp_path / "00000.parquet").names


def test_the_table_has_the_superlabels_of_cifar100(tmp_path):
    classes = sorted(name for names in cifar.SUPERLABELS.values() for name in names.split())
    pixels = np.zeros((100, 32, 32, 3), np.uint8)
    cifar.write(cifar.rows(pixels, list(range(100)), classes, "test"), str(tmp_path))
    rows = pq.read_table(tmp_path / "00000.parquet").to_pylist()
    assert {row["label"]: row["superlabel"] for row in rows}["wolf"] == "large carnivores"
    assert rows == [json.loads(sample.json_text()) for sample in samples_in(tmp_path)]
    assert list(rows[0])[-1] == "superlabel"
