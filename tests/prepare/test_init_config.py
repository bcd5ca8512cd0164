"""A configuration for somebody's shards."""

import io
import json
import re
from dataclasses import replace

import pytest
from PIL import Image

from pipeline.cli import main as cli
from pipeline.cli import options
from pipeline.prepare import init_config
from pipeline.runtime import config
from pipeline.store.shard_writer import ShardWriter
from tests.conftest import BUNDLED, FEW_WORDS, TINY


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def shards(tmp_path):
    """A shard of three pictures of known sizes, two captions, hostile json, and two bad samples."""
    folder = tmp_path / "shards"
    folder.mkdir()
    hostile = json.dumps({'x\n[embed]\nmodel = "evil"': 1, "url": "u", "\x1b[2J": 0.5})
    with (folder / "00000.tar").open("wb") as file, ShardWriter(file) as writer:
        for i, (width, height) in enumerate([(100, 50), (300, 200), (500, 400)]):
            writer.add(f"{i}.png", png(width, height))
            writer.add(f"{i}.json", hostile.encode())
        writer.add("3.txt", b"no image")
        writer.add("4.jpg", b"no image either")
        writer.add("4.txt", b"a text")
    (folder / "00001.tar").write_bytes((folder / "00000.tar").read_bytes())
    return folder


def made(tmp_path, shards, *words):
    out = tmp_path / "ratecluster.toml"
    assert cli.invoke(["init", "--shards", str(shards), "--out", str(out), *words]) == 0
    return out


def test_what_is_seen_is_what_there_is(shards, capfd, tmp_path):
    made(tmp_path, shards, "--json")
    seen = json.loads(capfd.readouterr().out)
    assert seen["shards"] == 2 and seen["end"] == "complete"
    assert seen["shard_bytes"] == 2 * (shards / "00000.tar").stat().st_size
    assert seen["samples"] == 5 and seen["suffixes"] == {"png": 3, "jpg": 1}
    assert seen["reasons"] == {"missing_image": 1}
    assert seen["sides"] == [300, 200]
    assert seen["captions"] == 2
    kinds = {'x\n[embed]\nmodel = "evil"': "int", "url": "str", "\x1b[2J": "float"}
    assert seen["columns"] == kinds


def test_data_stays_in_comments(shards, tmp_path):
    out = made(tmp_path, shards)
    text = out.read_text()
    assert "\x1b" not in text and "x\\n[embed]\\nmodel" in text
    assert config.load(options.KINDS, str(out))["embed"].model == "pico-clip"


def test_what_is_written_loads_and_what_it_does_not_say_is_the_default(tmp_path):
    sections = config.load(options.KINDS, str(made(tmp_path, BUNDLED)))
    assert sections == config.load(options.KINDS, None)


def seen(**changes) -> init_config.Seen:
    facts = {"shards": 41455, "shard_bytes": 10**13, "first": "s3://b/0.tar", "end": "complete"}
    facts |= {"samples": 10_000, "suffixes": {"jpg": 10_000}, "reasons": {}, "image_bytes": 20_000}
    facts |= {
        "sides": (256, 256),
        "captions": 0,
        "columns": {"url": "str"},
    }
    return replace(init_config.Seen(**facts, cores=16, gpus=0), **changes)


def loaded(tmp_path, found: init_config.Seen) -> config.Sections:
    path = tmp_path / "c.toml"
    path.write_text(init_config.toml(found, "s3://b/{0..9}.tar", "c.toml"))
    return config.load(options.KINDS, str(path))


def test_settings_follow_from_the_machine_and_the_shards(tmp_path):
    without = loaded(tmp_path, seen(shards=3))
    assert without["embed"].model == "pico-clip" and without["train"].batch_size == 1024
    assert without["caption"].alt_texts == 0
    with_gpus = loaded(tmp_path, seen(gpus=4, captions=9_000))
    assert (with_gpus["embed"].model, with_gpus["embed"].batch_size) == ("ViT-L-14", 256)
    assert (with_gpus["train"].workers, with_gpus["train"].batch_size) == (4, 4096)
    assert with_gpus["caption"].alt_texts == 20
    lossy = loaded(tmp_path, seen(reasons={"missing_image": 6_000}))
    assert lossy["embed"].max_reject_fraction == 1.0


def test_what_it_suggests_in_comments_can_be_switched_on(tmp_path):
    text = init_config.toml(seen(captions=1), "s", "c.toml").replace('model = "pico-clip"\n', "")
    (tmp_path / "c.toml").write_text(re.sub(r"^# (\w+ = )", r"\1", text, flags=re.MULTILINE))
    sections = config.load(options.KINDS, str(tmp_path / "c.toml"))
    assert sections["embed"].model == "ViT-B-32" and sections["select_k"].k == 50
    assert sections["evaluate"].label == "label" and sections["train"].words == 0


def test_a_file_that_is_there_is_left_alone(tmp_path, shards, capfd):
    out = tmp_path / "mine.toml"
    out.write_text("mine")
    assert cli.invoke(["init", "--shards", str(shards), "--out", str(out)]) == 2
    assert "exists already; delete it, or choose another file" in capfd.readouterr().err
    assert out.read_text() == "mine"


def test_a_shard_that_holds_nothing(tmp_path, capfd):
    (tmp_path / "00000.tar").write_bytes(b"\0" * 10240)
    out = tmp_path / "c.toml"
    assert cli.invoke(["init", "--shards", str(tmp_path), "--out", str(out)]) == 2
    assert "holds no sample" in capfd.readouterr().err and not out.exists()


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_takes_it(tiny_shards, tmp_path, ray_session):
    out = made(tmp_path, tiny_shards)
    quick = ("train.steps=12", "train.batch_size=64", "select_k.k=4")
    sets = [part for setting in quick for part in ("--set", setting)]
    root = tmp_path / "run"
    words = ["run", "--shards", str(tiny_shards), "--root", str(root), "--config", str(out), *sets]
    words += FEW_WORDS
    assert cli.invoke(words) == 0
    labels = sum(p.suffix == ".parquet" for p in (root / "labels").iterdir())
    assert labels == 2 and TINY
