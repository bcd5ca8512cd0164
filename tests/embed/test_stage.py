import io
import json
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import ray
import torch
from PIL import Image
from safetensors.torch import save_file

from pipeline.artifacts import layout, schemas
from pipeline.embed import encode_shard, survey, worker
from pipeline.embed import settings as embed_settings
from pipeline.embed import stage as embed
from pipeline.embed.decoding import PrepareEach
from pipeline.runtime.errors import UserError
from pipeline.store import tables
from pipeline.store.listing import list_shards
from pipeline.store.shard_writer import ShardWriter
from pipeline.store.shards import ShardReader
from pipeline.vision import clip
from tests.conftest import ASSETS, TINY

CFG = embed_settings.Config(model="pico-clip", batch_size=16)
THREADS = os.cpu_count() or 1  # of the encoder: the last bits depend on them


@pytest.fixture(scope="module")
def encoder():
    return clip.load("pico-clip", "", threads=THREADS)


def parts(root) -> dict[str, bytes]:
    """Every file below embeddings/ and rejects/ but the manifest, which holds the seconds."""
    found = [p for name in ("embeddings", "rejects") for p in (root / name).iterdir()]
    return {str(p.relative_to(root)): p.read_bytes() for p in found if p.suffix == ".parquet"}


def embed_alone(shards, root, *encoders, cfg=CFG):
    paths = layout.RunPaths(str(root))
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(THREADS,)) as thread:
        found = [
            encode_shard.embed_shard(shard, encoders, thread, cfg, paths, encode_shard.decode)
            for shard in shards
        ]
    return found, paths


def test_every_sample_is_a_row_or_a_reject(tiny_shards, tmp_path, encoder):
    facts, paths = embed_alone(list_shards(str(tiny_shards)), tmp_path, encoder)
    assert [(f["samples"], f["embedded"], f["rejected"]) for f in facts] == [
        (TINY, TINY, 0),
        (TINY + 3, TINY, 3),
    ]
    rejects = tables.read(paths.rejects.file("00001.parquet")).to_pylist()
    reasons = {row["key"]: row["reason"].partition(":")[0] for row in rejects}
    assert reasons == {
        "bad-cut": "truncated",
        "bad-text": "not_an_image",
        "bad-none": "missing_image",
    }
    assert [row["index"] for row in rejects] == [TINY, TINY + 1, TINY + 2]
    assert rejects[1]["caption"] == "not a picture"


def test_rows_name_the_bytes_they_came_from(tiny_shards, tmp_path, encoder):
    shards = list_shards(str(tiny_shards))
    _, paths = embed_alone(shards, tmp_path, encoder)
    table = tables.read(paths.embeddings.file("00000.parquet"))
    assert table.schema.equals(schemas.embeddings_schema(encoder.dim), check_metadata=False)
    with (tiny_shards / "00000.tar").open("rb") as stream:
        samples = list(ShardReader(stream, None))
    tar = (tiny_shards / "00000.tar").read_bytes()
    for row, sample in zip(table.to_pylist(), samples, strict=True):
        assert row["sample_id"] == f"00000/{sample.key}"
        start, size = row["tar_offset"], row["tar_size"]
        assert tar[start : start + size] == sample.image().data
        assert row["json"] == sample.json_text()
    norms = np.linalg.norm(tables.to_matrix(table["embedding"]).astype(np.float32), axis=1)
    np.testing.assert_allclose(norms, 1, atol=2e-3)


def test_a_row_without_a_txt_has_the_caption_of_its_json(tmp_path, encoder):
    png = io.BytesIO()
    Image.new("RGB", (8, 8)).save(png, "PNG")
    jsons = ({"caption": "a dog"}, {"caption": 7}, {})
    with (tmp_path / "x.tar").open("wb") as file, ShardWriter(file) as writer:
        for number, facts in enumerate(jsons):
            for kind in ("png", "gone"):  # the second has no image
                key = f"{kind}{number}"
                writer.add(f"{key}.json", json.dumps(facts).encode())
                if kind == "png":
                    writer.add(f"{key}.png", png.getvalue())
    _, paths = embed_alone(list_shards(str(tmp_path / "x.tar")), tmp_path / "run", encoder)
    for folder in (paths.embeddings, paths.rejects):
        found = tables.read(folder.file("x.parquet"))["caption"].to_pylist()
        assert found == ["a dog", None, None]


def test_a_cut_shard_is_used_as_far_as_it_goes_and_its_damage_is_a_row(
    tiny_shards, tmp_path, encoder
):
    data = (tiny_shards / "00000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.tar").write_bytes(b"")
    (fact, empty), paths = embed_alone(list_shards(str(tmp_path)), tmp_path / "run", encoder)
    assert 0 < fact["embedded"] < TINY
    assert fact["embedded"] + fact["rejected"] == fact["samples"]
    assert empty["samples"] == 0 and empty["end"].startswith("damaged")
    for stem in ("cut", "empty"):
        last = tables.read(paths.rejects.file(f"{stem}.parquet")).to_pylist()[-1]
        assert last["sample_id"] is None and last["reason"].startswith("shard: ")


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_shard_that_the_store_cuts_short_is_no_shorter_shard(
    tiny_shards, tmp_path, encoder, share
):
    """Its samples would be lost, and nobody would know."""
    shards = list_shards(str(tiny_shards / "00000.tar"))
    whole = shards[0].size
    data = (tiny_shards / "00000.tar").read_bytes()[: int(whole * share)]
    short = replace(shards[0], url=str(tmp_path / "00000.tar"))
    (tmp_path / "00000.tar").write_bytes(data)
    with pytest.raises(OSError, match=f"ended after {len(data)} of {whole} bytes"):
        embed_alone([short], tmp_path / "run", encoder)
    assert not layout.RunPaths(str(tmp_path / "run")).embeddings.names()


def test_an_embedding_that_is_not_finite_is_rejected(tiny_shards, tmp_path, encoder):
    class Broken:
        dim, device, precision, prepare = encoder.dim, "cpu", "fp32", staticmethod(encoder.prepare)
        weights = "0"

        def encode_images(self, pixels):
            encoded = encoder.encode_images(pixels)
            encoded[3] = np.nan
            return encoded

    shards = list_shards(str(tiny_shards / "00000.tar"))
    (facts,), paths = embed_alone(shards, tmp_path, Broken())
    assert facts["reasons"] == {"embedding_not_finite": 4}  # one of each batch of 16
    assert facts["embedded"] == TINY - 4
    table = tables.read(paths.embeddings.file("00000.parquet"))
    assert np.isfinite(tables.to_matrix(table["embedding"])).all()


def test_the_same_bytes_whatever_the_threads(tiny_shards, tmp_path, encoder, monkeypatch):
    shards = list_shards(str(tiny_shards))
    for threads in (1, 4):
        monkeypatch.setattr(os, "cpu_count", lambda threads=threads: threads)
        embed_alone(shards, tmp_path / str(threads), encoder)
    assert parts(tmp_path / "1") == parts(tmp_path / "4")


@pytest.mark.slow
@pytest.mark.ray
def test_the_same_bytes_for_any_number_of_actors_as_without_ray(
    tiny_shards, tmp_path, encoder, ray_session
):
    shards = list_shards(str(tiny_shards))
    embed_alone(shards, tmp_path / "alone", encoder)
    expected = parts(tmp_path / "alone")
    assert len(expected) == 4
    for actors in (1, 2):
        root = tmp_path / str(actors)
        manifest = embed.run(replace(CFG, actors=actors), layout.RunPaths(str(root)), shards)
        assert manifest["samples"] == 2 * TINY + 3
        assert parts(root) == expected


@pytest.mark.ray
@pytest.mark.parametrize("cpus", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_the_same_bytes_where_other_processes_decode(
    tiny_shards, tmp_path, encoder, ray_session, cpus
):
    shards = list_shards(str(tiny_shards))
    embed_alone(shards, tmp_path / "alone", encoder)
    cfg = replace(CFG, decode_cpus=cpus)
    manifest = embed.run(cfg, layout.RunPaths(str(tmp_path)), shards)
    assert parts(tmp_path) == parts(tmp_path / "alone")
    assert 0 <= manifest["encoder_idle"] < 1 and manifest["decode_cpus_per_encoder"] >= 0


class Slow:
    """`prepare` that takes its time and leaves its process's number."""

    def __init__(self, prepare, folder) -> None:
        self.prepare, self.folder = prepare, folder

    def __call__(self, image):
        (self.folder / str(os.getpid())).touch()
        time.sleep(0.1)
        return self.prepare(image)


@pytest.mark.ray
def test_a_decoder_that_is_killed_is_replaced_and_nothing_is_lost(
    tiny_shards, tmp_path, encoder, ray_session
):
    shard = list_shards(str(tiny_shards / "00001.tar"))[0]
    prepare = Slow(encoder.prepare, tmp_path)
    found = worker.decode_elsewhere(shard, PrepareEach((prepare,)), replace(CFG, decode_cpus=1))
    first = next(found)
    (pid,) = [int(path.name) for path in tmp_path.iterdir()]
    os.kill(pid, signal.SIGKILL)
    batches = [first, *found]
    assert {int(path.name) for path in tmp_path.iterdir()} > {pid}
    expected = list(encode_shard.decode(shard, PrepareEach((encoder.prepare,)), CFG))
    assert [batch.rows for batch in batches] == [batch.rows for batch in expected]
    for mine, theirs in zip(batches, expected, strict=True):
        np.testing.assert_array_equal(mine.pixels[0], theirs.pixels[0])


@pytest.mark.ray
def test_an_error_of_the_store_comes_back_as_itself(tiny_shards, encoder, ray_session):
    shard = replace(list_shards(str(tiny_shards))[0], url="/nowhere/00000.tar")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        next(worker.decode_elsewhere(shard, encoder.prepare, CFG))


def test_idle_is_what_encoders_wait_and_decoding_is_counted_for_the_time_they_work():
    took = [
        {"encoder": "a", "began": 0.0, "ended": 10.0, "encode_s": 2.0, "decode_s": 12.0},
        {"encoder": "a", "began": 5.0, "ended": 20.0, "encode_s": 4.0, "decode_s": 12.0},
        {"encoder": "b", "began": 0.0, "ended": 20.0, "encode_s": 6.0, "decode_s": 12.0},
    ]
    assert embed.balance(took) == {"encoder_idle": 0.7, "decode_cpus_per_encoder": 3.0}
    assert embed.balance([]) == {}


def test_batches_that_a_second_decoder_cut_otherwise_are_no_shard(tiny_shards, tmp_path, encoder):
    """The first gave up on a sample that the second read: all batches after it begin one later."""
    shard = list_shards(str(tiny_shards / "00001.tar"))[0]
    paths = layout.RunPaths(str(tmp_path))

    def source(shard, prepare, cfg):
        first, *rest = encode_shard.decode(shard, prepare, cfg)
        late = {**first.rows[5], "member": "x.png", "reason": "decode_timeout"}
        yield replace(
            first,
            rows=[*first.rows[:5], *first.rows[6:], rest[0].rows[0]],
            pixels=(np.concatenate([np.delete(first.pixels[0], 5, 0), rest[0].pixels[0][:1]]),),
            rejects=[*first.rejects, late],
        )
        yield from rest

    with ThreadPoolExecutor(1) as thread, pytest.raises(OSError, match="do not fit together"):
        encode_shard.embed_shard(shard, [encoder], thread, CFG, paths, source)
    assert not paths.embeddings.names()


@pytest.mark.ray
def test_a_decoder_that_nobody_listens_to_gives_back_its_cpu(
    tiny_shards, tmp_path, encoder, ray_session
):
    before = ray.available_resources()["CPU"]
    shard = list_shards(str(tiny_shards / "00001.tar"))[0]
    prepare = PrepareEach((Slow(encoder.prepare, tmp_path),))
    found = worker.decode_elsewhere(shard, prepare, CFG)
    next(found)
    assert ray.available_resources()["CPU"] < before
    found.close()
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU", 0) < before:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    "idle, decode_cpus, device, warned",
    [
        (0.6, 4, "cpu", True),
        (0.6, 0, "cuda", True),
        (0.6, 0, "cpu", False),
        (0.1, 4, "cuda", False),
    ],
)
def test_starving_encoders_are_warned_of_where_decoding_can_be_added(
    caplog, idle, decode_cpus, device, warned
):
    load = {"samples_per_s": 1.0, "encoder_idle": idle, "decode_cpus_per_encoder": 5.2}
    with caplog.at_level("INFO"):
        cfg = replace(CFG, decode_cpus=decode_cpus)
        embed._report_balance(load, cfg, [f"{device} bf16"])
    (record,) = caplog.records
    assert f"idle {idle:.0%} of the time" in record.message
    assert (record.levelname == "WARNING") == warned
    assert ("embed.decode_cpus = 7" in record.message) == warned


def test_encoders_that_have_the_cpus_wait_for_something_else(caplog):
    load = {"samples_per_s": 1.0, "encoder_idle": 0.7, "decode_cpus_per_encoder": 2.1}
    embed._report_balance(load, replace(CFG, decode_cpus=12), ["cuda bf16"])
    assert "waits for the store" in caplog.text and "embed.decode_cpus =" not in caplog.text


@pytest.mark.ray
def test_through_ray_the_embeddings_are_open_clips_own(finished_run, tiny_shards):
    """open_clip alone, from its documentation: its preprocess on the file, then encode_image."""
    folder = ASSETS / "pico-clip"
    open_clip.add_model_config(folder)
    model, _, preprocess = open_clip.create_model_and_transforms(
        "pico-clip", pretrained=str(folder / "open_clip_model.safetensors")
    )
    paths = layout.RunPaths(str(finished_run))
    for stem in ("00000", "00001"):
        table = tables.read(paths.embeddings.file(f"{stem}.parquet"))
        tar = (tiny_shards / f"{stem}.tar").read_bytes()
        files = [tar[r["tar_offset"] :][: r["tar_size"]] for r in table.to_pylist()]
        pixels = torch.stack([preprocess(Image.open(io.BytesIO(file))) for file in files])
        with torch.inference_mode():
            expected = model.eval().encode_image(pixels, normalize=True).numpy()
        found = tables.to_matrix(table["embedding"]).astype(np.float32)
        assert (found * expected).sum(axis=1).min() > 0.999


@pytest.mark.ray
def test_a_rerun_does_only_what_is_missing(tiny_shards, tmp_path, ray_session, caplog):
    shards = list_shards(str(tiny_shards))
    paths = layout.RunPaths(str(tmp_path))
    embed.run(CFG, paths, shards)
    before = parts(tmp_path)
    untouched = (tmp_path / "embeddings" / "00000.parquet").stat().st_mtime_ns
    (tmp_path / "embeddings" / "00001.parquet").unlink()
    (tmp_path / "embeddings" / "manifest.json").unlink()
    embed.run(CFG, paths, shards)
    assert parts(tmp_path) == before
    assert (tmp_path / "embeddings" / "00000.parquet").stat().st_mtime_ns == untouched
    with caplog.at_level("INFO"):
        embed.run(CFG, paths, shards)
    assert "already done" in caplog.text


@pytest.mark.ray
def test_too_many_rejects_fail_the_stage_and_the_counts_are_named(
    tiny_shards, tmp_path, ray_session
):
    cfg = replace(CFG, max_reject_fraction=0.01)
    with pytest.raises(RuntimeError, match=r"3 of 123 samples .*max_reject_fraction = 0.01"):
        embed.run(cfg, layout.RunPaths(str(tmp_path)), list_shards(str(tiny_shards)))
    assert not (tmp_path / "embeddings" / "manifest.json").exists()


@pytest.mark.ray
def test_parts_of_a_replaced_checkpoint_never_meet(tiny_shards, tmp_path, ray_session):
    """The settings name the same file, which holds other weights now."""
    import open_clip

    from pipeline.vision.clip import source

    shards, path = list_shards(str(tiny_shards)), tmp_path / "w.safetensors"
    net = open_clip.create_model("pico-clip", **source("pico-clip", ""))
    save_file(net.state_dict(), path)
    cfg = replace(CFG, pretrained=str(path))
    paths = layout.RunPaths(str(tmp_path / "run"))
    made = embed.run(cfg, paths, shards[:1])
    digest = tables.facts(paths.embeddings.file("00000.parquet"))["encoders"][0]["weights"]
    assert len(digest) == 32 and made["embedded"] == TINY
    with torch.no_grad():
        next(net.visual.parameters()).mul_(1.01)
    save_file(net.state_dict(), path)
    with pytest.raises(RuntimeError, match="00000 and 00001 were made with different weights of"):
        embed.run(cfg, paths, shards)
    assert paths.embeddings.peek() is None


@pytest.mark.ray
def test_a_small_bad_shard_fails_nothing_and_a_large_one_ends_the_stage_at_once(
    tiny_shards, tmp_path, ray_session, caplog
):
    shards = shutil.copytree(tiny_shards, tmp_path / "shards")
    with (shards / "00002.tar").open("wb") as file, ShardWriter(file) as writer:
        writer.add("a.jpg", b"no picture")
    with caplog.at_level("INFO"):
        made = embed.run(CFG, layout.RunPaths(str(tmp_path / "run")), list_shards(str(shards)))
    assert made["rejected"] == 4 and made["examples"]["not_an_image"][0] == "00001/bad-text"
    assert "4 rejected (2 not_an_image, 1 missing_image, 1 truncated)" in caplog.text
    assert (
        "rejected: 1 missing_image, such as 00001/bad-none (only txt); name the suffix of the "
        "images in embed.image_suffixes"
    ) in caplog.text
    with (shards / "00002.tar").open("wb") as file, ShardWriter(file) as writer:
        for i in range(100):
            writer.add(f"{i}.img", b"x")
    with pytest.raises(RuntimeError, match=r"100 of 100 samples of .*00002\.tar were rejected"):
        embed.run(CFG, layout.RunPaths(str(tmp_path / "other")), list_shards(str(shards)))


def test_parts_of_other_settings_are_refused_by_name(tiny_shards, tmp_path, encoder):
    shards = list_shards(str(tiny_shards))
    _, paths = embed_alone(shards, tmp_path, encoder)
    other = replace(CFG, batch_size=8)
    with pytest.raises(UserError, match=r"embed.batch_size was 16, is 8.*--overwrite"):
        survey.plan(other, shards, paths)
    assert survey.plan(other, shards, paths, overwrite=True) == ([], shards)
    assert not paths.embeddings.names()


def test_parts_of_another_collection_are_not_overwritten(tiny_shards, tmp_path, encoder):
    shards = list_shards(str(tiny_shards))
    _, paths = embed_alone(shards, tmp_path, encoder)
    namesake = [replace(shards[0], url="/elsewhere/00000.tar", size=1)]
    with pytest.raises(UserError, match=r"/elsewhere/00000.tar is not the 00000 .*--overwrite"):
        survey.plan(CFG, namesake, paths)
    moved = [replace(shard, url=f"/moved/{shard.stem}.tar") for shard in shards]
    done, todo = survey.plan(CFG, moved, paths)
    assert not todo and [f["shard"]["url"] for f in done] == [shard.url for shard in moved]
    fresh = [replace(shards[0], stem="other", url="/elsewhere/other.tar")]
    with pytest.raises(UserError, match=r"embed\.batch_size was 16, is 8"):
        survey.plan(replace(CFG, batch_size=8), fresh, paths)


def test_shards_that_cannot_be_read_at_all_count_as_rejects(tmp_path, encoder, tiny_shards):
    (tmp_path / "page.tar").write_bytes(b"<html>404</html>" * 100)
    (tmp_path / "whole.tar").write_bytes((tiny_shards / "00000.tar").read_bytes())
    facts, _ = embed_alone(list_shards(str(tmp_path)), tmp_path / "run", encoder)
    manifest = embed.summary(facts, CFG, 1.0)
    assert manifest["damaged"] == 1
    with pytest.raises(RuntimeError, match=r"1 of 2 shards cannot be read at all.*page.tar"):
        whole = {**manifest, "rejected": 0, "embedded": manifest["samples"]}
        embed._check_counts(facts, whole, replace(CFG, max_reject_fraction=0.4))


def test_a_shard_that_changed_or_is_new_is_to_do(tiny_shards, tmp_path, encoder):
    shards = list_shards(str(tiny_shards))
    _, paths = embed_alone(shards[:1], tmp_path, encoder)
    done, todo = survey.plan(CFG, shards, paths)
    assert [facts["shard"]["stem"] for facts in done] == ["00000"] and todo == shards[1:]
    changed = [replace(shards[0], version="later"), shards[1]]
    assert survey.plan(CFG, changed, paths) == ([], changed)


def test_summary_adds_up_and_finds_clashing_columns(tmp_path, encoder, tiny_shards):
    with (tmp_path / "x.tar").open("wb") as file, ShardWriter(file) as writer:
        for key, value in (("a", {"n": 1, "w": 2}), ("b", {"n": "one", "w": 2.5})):
            writer.add(f"{key}.json", json.dumps(value).encode())
    facts, _ = embed_alone(list_shards(str(tmp_path / "x.tar")), tmp_path / "run", encoder)
    summary = embed.summary(facts, CFG, 1.0)
    assert summary["columns"] == {"n": "json", "w": "float"}
    assert (summary["samples"], summary["rejected"]) == (2, 2)
    assert summary["reasons"] == {"missing_image": 2}
    clash = [{**facts[0], "columns": {"n": kind}} for kind in ("int", "str")]
    assert embed.summary(clash, CFG, 1.0)["conflicting_columns"] == ["n"]


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"max_reject_fraction": 1.5}, {"actors": -1}])
def test_settings_out_of_range_are_refused_with_their_value(wrong):
    with pytest.raises(UserError, match=str(next(iter(wrong.values())))):
        embed_settings.Config(**wrong)
