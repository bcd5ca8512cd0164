"""Plan: every stage's functions are measured, and the estimate is arithmetic."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray

from pipeline.cli import main as cli
from pipeline.cli import options
from pipeline.ops import text
from pipeline.ops.plan import stage as plan
from pipeline.ops.plan import stage_timings
from pipeline.ops.plan.stage import Target
from pipeline.ops.plan.stage_timings import Sampled
from pipeline.runtime import config
from pipeline.runtime.errors import UserError
from pipeline.store.listing import Shard, list_shards
from pipeline.store.shard_writer import ShardWriter
from tests.conftest import BUNDLED, TINY, run_arguments

STAGES = ["embed", "train", "select_k", "caption", "write", "report"]
SETTINGS = run_arguments(Path("shards"), Path("root"))[5:]


def shard(number: int, size: int = 1000) -> Shard:
    return Shard(f"{number:05d}", f"/shards/{number:05d}.tar", size, "")


def sampled(number: int, images: int, size: int, whole: bool = False) -> Sampled:
    return Sampled(shard(number, size if whole else 1000), shard(number), images, size, whole, 0.0)


def made_up(**encoder: float) -> dict:
    """100 images each of three shards; round numbers."""
    found = {"load_s": 5.0, "decode_s": 0.01, "encode_s": 0.001, "embed_s": 0.02}
    found |= {"embed_cpu_s": 0.03, "embedded": 1.0, "device": "cpu fp32", "cores": 2}
    found |= {"read_row_s": 1e-5, "once_s": 3.0, "step_s": 0.5, "validation_s": 3.0}
    found |= {"train_samples": 240_000, "train_words": 1000, "cut_s": 40.0, "leaf_bytes": 10**8}
    found |= {"select_s": 0.004, "caption_s": 0.002, "write_s": 0.004}
    found |= {"caption_words": 2000, "load_text_s": 4.0, "word_s": 0.01}
    found |= {"start_s": 3.0, "images": 300, "waited_s": 0.0, "peak_bytes": 10**9}
    return {**found, "part_bytes": {"labels": 10.0}, **encoder}


def stages(images: int, shards: int, target: Target, *sets: str, **encoder: float) -> dict:
    sections = config.load(options.KINDS, None, sets)
    found = plan.estimate(sections, shards, images, made_up(**encoder), target)
    return {stage["stage"]: stage for stage in found}


def test_shards_are_chosen_over_the_whole_list():
    shards = [shard(number) for number in range(100)]
    chosen = [int(s.stem) for s in stage_timings.choose(shards, 4)]
    assert [number // 25 for number in chosen] == [0, 1, 2, 3]
    assert stage_timings.choose(shards, 4) == stage_timings.choose(shards, 4)
    assert stage_timings.choose(shards[:2], 5) == shards[:2]


def test_images_are_counted_by_bytes():
    shards = [shard(number) for number in range(10)]
    found = [sampled(0, 10, 500), sampled(1, 20, 500)]
    assert plan.count_images(shards, found) == (300, 200, 400)
    whole = [sampled(0, 7, 1000, whole=True), sampled(1, 5, 1000, whole=True)]
    assert plan.count_images(shards[:2], whole) == (12, 12, 12), "exact where all was read"


def test_on_gpus_the_slower_of_decoding_and_encoding_decides():
    found = stages(10**6, 1000, Target(2, 20, 4, 250.0))["embed"]
    assert (found["bound"], found["work_s"]) == ("encode", pytest.approx(10**6 / (8 * 250)))
    assert found["gpu_h"] == pytest.approx(10**6 / 250 / 3600)
    assert found["cpu_h"] == pytest.approx(10**6 * 0.01 / 3600)
    found = stages(10**6, 1000, Target(2, 20, 4, 2500.0))["embed"]
    assert (found["bound"], found["work_s"]) == ("decode", pytest.approx(10**6 * 0.01 / 40))


def test_cpus_of_all_nodes_decode_where_decode_cpus_say_so():
    target = Target(10, 11, 1, 2500.0)
    slots = stages(10**6, 1000, target, "embed.decode_cpus=8")["embed"]
    assert (slots["bound"], slots["work_s"]) == ("decode", pytest.approx(10**6 * 0.01 / 80))
    few = stages(10**6, 1000, target, "embed.decode_cpus=99")["embed"]
    assert few["work_s"] == pytest.approx(10**6 * 0.01 / (110 - 10)), "no more than there are"


def test_shards_that_do_not_divide_leave_encoders_idle():
    even, uneven = (stages(10**6, n, Target(1, 99, 8, 10.0))["embed"]["work_s"] for n in (8, 9))
    assert uneven == pytest.approx(even * 16 / 9)


def test_on_cpus_more_nodes_help_only_with_more_encoders():
    alone = stages(10**6, 1000, Target(1, 4, 0, 0.0))["embed"]
    assert alone["work_s"] == pytest.approx(10**6 * 0.02 / 2) and alone["gpu_h"] == 0
    assert stages(10**6, 1000, Target(8, 4, 0, 0.0))["embed"]["work_s"] == alone["work_s"]
    spread = stages(10**6, 1000, Target(8, 4, 0, 0.0), "embed.actors=8")["embed"]
    assert spread["work_s"] == pytest.approx(alone["work_s"] / 8)


def test_training_does_not_grow_with_the_images():
    small, large = (stages(n, 10**4, Target(1, 4, 0, 0.0))["train"] for n in (10**7, 10**8))
    assert small == large
    steps = 40 * 0.5 + 4 * 3.0 + 2.0 + 1.0
    assert small["work_s"] == pytest.approx(steps + 1000 * 0.01 * 2 / 4 + 4 * 240_000 * 1e-5)


def test_passes_run_on_no_more_cpus_than_there_are_tasks():
    found = stages(10**7, 1280, Target(100, 10, 0, 0.0))
    assert found["select_k"]["work_s"] == pytest.approx(10**7 * 0.004 / 128 + 40.0)
    assert found["write"]["work_s"] == pytest.approx(10**7 * 0.004 / 1000)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 1, 0, 0.0), "--nodes 0"),
        ((1, 0, 0, 0.0), "--cpus 0"),
        ((1, 1, -1, 0.0), "--gpus -1"),
        ((1, 1, 1, float("nan")), "--encode-rate nan"),
        ((1, 1, 0, 300.0), "--encode-rate 300"),
    ],
)
def test_a_cluster_that_cannot_be(values, message):
    with pytest.raises(UserError, match=message):
        Target(*values)


def test_a_shard_of_unknown_size_is_named():
    sections = config.load(options.KINDS, None)
    shards = [shard(0), replace(shard(1), size=0)]
    with pytest.raises(UserError, match=r"00001\.tar"):
        plan.run(sections, shards, Target(1, 1, 0, 0.0), 3, 10)


def test_rows_that_are_drawn_again():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((50, 8)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    more = stage_timings.redraw(rows, 200)
    assert (more[:50] == rows).all() and len(np.unique(more, axis=0)) == 200
    assert np.allclose(np.linalg.norm(more, axis=1), 1, atol=1e-5)
    assert len(np.unique(stage_timings.redraw(rows, 20), axis=0)) == 20


def test_the_first_images_are_read(tmp_path):
    found = stage_timings.sample(list_shards(str(BUNDLED))[0], 20, str(tmp_path), 1 << 26)
    assert (found.images, found.whole) == (20, False) and 0 < found.bytes < found.shard.size
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "0.tar").write_bytes(b"\0" * 1024)
    empty = list_shards(str(tmp_path / "empty"))[0]
    assert stage_timings.sample(empty, 20, str(tmp_path), 1 << 26).images == 0
    assert cli.invoke(["plan", "--shards", str(tmp_path / "empty")]) == 2


@pytest.mark.parametrize("images, whole", [(1, False), (2, True), (3, True)])
def test_whole_is_what_was_read_to_its_end(tmp_path, images, whole):
    with (tmp_path / "two.tar").open("wb") as file, ShardWriter(file) as writer:
        for key in ("a", "b"):
            writer.add(f"{key}.png", b"one file each")
    (tmp_path / "copies").mkdir()
    found = stage_timings.sample(
        list_shards(str(tmp_path / "two.tar"))[0], images, str(tmp_path / "copies"), 99
    )
    assert (found.images, found.whole) == (min(images, 2), whole)


def test_the_command(tiny_shards, tmp_path, capfd, monkeypatch):
    """Every core runs; no Ray starts; nothing is left, not even below the temporary folder."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("started Ray"))
    before = {path: path.stat().st_mtime_ns for path in tiny_shards.iterdir()}
    arguments = ["plan", "--shards", str(tiny_shards), *SETTINGS, "--gpus", "1"]
    assert cli.invoke([*arguments, "--encode-rate", "1e9", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert {path: path.stat().st_mtime_ns for path in tiny_shards.iterdir()} == before
    assert not list(tmp_path.glob("ratecluster-*"))
    assert found["images"] == found["images_low"] == found["images_high"] == 2 * TINY + 3
    assert found["bytes_in"] == sum(path.stat().st_size for path in before)
    assert [stage["stage"] for stage in found["stages"]] == STAGES
    assert all(stage["work_s"] > 0 for stage in found["stages"])
    assert found["peak_bytes"] > 1e8 and found["leaf_bytes"] > 0
    assert found["bytes_out"]["labeled"] > found["bytes_in"]
    assert found["decode_cpus_per_gpu"] == -(-1e9 // found["decode_rate"])
    assert any("its time on a GPU is unknown" in note for note in found["notes"])


def test_the_text_is_no_wider_than_a_page(monkeypatch):
    monkeypatch.setattr(plan.stage_timings, "measure", lambda *_: made_up())
    sections = config.load(options.KINDS, None)
    found = plan.run(sections, list_shards(str(BUNDLED)), Target(2, 8, 1, 0.0), 3, 10)
    lines = plan.text(found).splitlines()
    assert max(map(len, lines)) <= text.WIDTH
    assert any("give --encode-rate" in " ".join(lines[i : i + 2]) for i in range(len(lines)))


def test_more_gpus_than_shards_are_named():
    sections, few = config.load(options.KINDS, None), "8 shards keep no more than 8 of the 9 GPUs"
    for gpus, named in ((9, True), (8, False)):
        lines = plan.notes(sections, 8, made_up(), Target(1, 8, gpus, 100.0))
        assert any(few in line for line in lines) == named


@pytest.mark.parametrize(
    ("value", "message"),
    [(0, "0"), (0.0001234, "0.000123"), (0.5, "0.500"), (12.34, "12.3"), (123456.7, "123,457")],
)
def test_three_digits(value, message):
    assert text.digits(value) == message


@pytest.mark.parametrize(
    ("recipe", "steps", "looks"),
    [("auto", 40, 4), ("mcr2", 240, 6), ("cpp", 240, 1), ("none", 0, 1)],
)
def test_training_stops_where_it_brings_no_gain(recipe, steps, looks):
    found = stages(10**7, 10**4, Target(1, 4, 0, 0.0), f"train.recipe={recipe}")["train"]
    rest = 2.0 + 1.0 + 1000 * 0.01 * 2 / 4 + 4 * 240_000 * 1e-5
    assert found["work_s"] == pytest.approx(steps * 0.5 + looks * 3.0 + rest)
