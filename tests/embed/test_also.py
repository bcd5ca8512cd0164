"""Further encoders: a column of embeddings for each, added to finished parts as in a fresh run."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.artifacts import layout, schemas, views
from pipeline.embed import encode_shard, survey
from pipeline.embed import settings as embed_settings
from pipeline.embed import stage as embed
from pipeline.ops import status
from pipeline.ops.verify import row_checks, violations
from pipeline.runtime import config
from pipeline.runtime.errors import UserError
from pipeline.store import tables
from pipeline.store.listing import list_shards
from pipeline.vision import clip
from tests.conftest import TINY
from tests.embed.test_stage import parts

ONE = embed_settings.Config(batch_size=16)
TWO = replace(ONE, also=("pico-resnet",))
THREADS = os.cpu_count() or 1


class Counted:
    """An encoder that counts its images, and spoils the embeddings of some."""

    def __init__(self, encoder: clip.Encoder) -> None:
        self.encoder, self.images, self.spoilt = encoder, 0, set()
        self.dim, self.device, self.precision = encoder.dim, encoder.device, encoder.precision
        self.prepare, self.weights = encoder.prepare, encoder.weights

    def encode_images(self, pixels):
        rows = self.encoder.encode_images(pixels)
        for number in self.spoilt & set(range(self.images, self.images + len(rows))):
            rows[number - self.images] = np.nan
        self.images += len(rows)
        return rows


@pytest.fixture(scope="module")
def loaded():
    return [clip.load(name, "", threads=THREADS) for name in ("pico-clip", "pico-resnet")]


@pytest.fixture
def encoders(loaded):
    return [Counted(encoder) for encoder in loaded]


@pytest.fixture
def shards(tiny_shards):
    return list_shards(str(tiny_shards))


def embed_alone(shards, root, encoders, cfg, source=encode_shard.decode):
    """`embed_shard` of each, without Ray, as an actor does it."""
    paths = layout.RunPaths(str(root))
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(THREADS,)) as thread:
        for shard in shards:
            facts = encode_shard.embed_shard(shard, encoders, thread, cfg, paths, source)
            assert facts["embedded"] + facts["rejected"] == facts["samples"]
    return paths


def matrix(paths, stem: str, column: str) -> np.ndarray:
    return tables.to_matrix(tables.read(paths.embeddings.file(f"{stem}.parquet"))[column])


def test_every_encoder_has_a_column_and_images_are_decoded_once(
    shards, tmp_path, encoders, monkeypatch
):
    decoded = []
    real = encode_shard.batches

    def counted(*args):
        for batch in real(*args):
            decoded.append(len(batch.rows) + len(batch.rejects))
            yield batch

    monkeypatch.setattr(encode_shard, "batches", counted)
    paths = embed_alone(shards, tmp_path, encoders, TWO)
    assert sum(decoded) == 2 * TINY + 3
    assert [encoder.images for encoder in encoders] == [2 * TINY] * 2
    table = tables.read(paths.embeddings.file("00000.parquet"))
    assert table.schema.equals(schemas.embeddings_schema(256, 256), check_metadata=False)
    facts = tables.facts(paths.embeddings.file("00000.parquet"))
    same = {"pretrained": "", "dim": 256, "device": "cpu", "precision": "fp32"}
    for each, encoder in zip(facts["encoders"], encoders, strict=True):
        assert each.pop("weights") == encoder.weights
    assert facts["encoders"] == [
        {"column": "embedding", "model": "pico-clip", **same},
        {"column": "embedding_2", "model": "pico-resnet", **same},
    ]
    alone = embed_alone(shards, tmp_path / "alone", encoders[:1], ONE)
    assert np.array_equal(matrix(alone, "00000", "embedding"), matrix(paths, "00000", "embedding"))
    x = matrix(paths, "00000", "embedding_2").astype(np.float32)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=2e-3)
    assert np.abs(x - matrix(paths, "00000", "embedding").astype(np.float32)).max() > 0.1


def test_a_second_encoder_added_later_encodes_alone_and_ends_with_the_same_bytes(
    shards, tmp_path, encoders
):
    embed_alone(shards, tmp_path / "fresh", encoders, TWO)
    embed_alone(shards, tmp_path / "later", encoders[:1], ONE)
    first, second = [encoder.images for encoder in encoders]
    embed_alone(shards, tmp_path / "later", encoders, TWO)
    assert [encoder.images for encoder in encoders] == [first, second + 2 * TINY]
    assert parts(tmp_path / "later") == parts(tmp_path / "fresh")


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_samples_that_either_encoder_cannot_encode_are_rejected_as_in_a_fresh_run(
    shards, tmp_path, encoders, order
):
    """Number 7 by the first encoder, 9 by the second; added in either order of the settings."""
    names = ("pico-clip", "pico-resnet")
    cfgs = [replace(ONE, model=names[first], also=(names[1 - first],)) for first in order]

    def spoilt():
        found = [Counted(encoder.encoder) for encoder in encoders]
        found[0].spoilt, found[1].spoilt = {7}, {9}
        return found

    made = spoilt()
    paths = embed_alone(shards[:1], tmp_path / "fresh", [made[i] for i in order], cfgs[0])
    assert tables.facts(paths.embeddings.file("00000.parquet"))["reasons"] == {
        "embedding_not_finite": 2
    }
    alone = replace(cfgs[0], also=())
    embed_alone(shards[:1], tmp_path / "later", [spoilt()[order[0]]], alone)
    embed_alone(shards[:1], tmp_path / "later", [spoilt()[i] for i in order], cfgs[0])
    assert parts(tmp_path / "later") == parts(tmp_path / "fresh")


def test_an_extension_that_stopped_between_its_two_files_ends_with_the_same_bytes(
    shards, tmp_path, encoders, monkeypatch
):
    encoders[1].spoilt = {9}
    embed_alone(shards[:1], tmp_path / "fresh", encoders, TWO)
    embed_alone(shards[:1], tmp_path / "later", encoders[:1], ONE)
    before = parts(tmp_path / "later")
    write = tables.write

    def stop(url, table, **facts):
        if "/embeddings/" in url:
            raise OSError("stopped")
        write(url, table, **facts)

    monkeypatch.setattr(tables, "write", stop)
    encoders[1].images = 0
    with pytest.raises(OSError, match="stopped"):
        embed_alone(shards[:1], tmp_path / "later", encoders, TWO)
    monkeypatch.undo()
    half = parts(tmp_path / "later")
    assert half["embeddings/00000.parquet"] == before["embeddings/00000.parquet"]
    assert half["rejects/00000.parquet"] != before["rejects/00000.parquet"]
    found = survey.survey(TWO, shards[:1], layout.RunPaths(str(tmp_path / "later")))
    assert found.extended == found.todo == shards[:1]
    first, encoders[1].images = encoders[0].images, 0
    embed_alone(shards[:1], tmp_path / "later", encoders, TWO)
    assert encoders[0].images == first
    assert parts(tmp_path / "later") == parts(tmp_path / "fresh")


def test_a_shard_whose_readable_images_differ_now_is_embedded_whole(
    shards, tmp_path, encoders, caplog
):
    def late(shard, prepare, cfg):
        """The third image took too long when the first encoder had its turn."""
        for batch in encode_shard.decode(shard, prepare, cfg):
            row = next((row for row in batch.rows if row["index"] == 2), None)
            if row is None:
                yield batch
                continue
            place = batch.rows.index(row)
            yield replace(
                batch,
                rows=batch.rows[:place] + batch.rows[place + 1 :],
                pixels=tuple(np.delete(each, place, 0) for each in batch.pixels),
                rejects=[*batch.rejects, {**row, "member": "x", "reason": "decode_timeout"}],
            )

    embed_alone(shards[:1], tmp_path / "fresh", encoders, TWO)
    embed_alone(shards[:1], tmp_path / "later", encoders[:1], ONE, late)
    before = encoders[0].images
    with caplog.at_level("WARNING"):
        embed_alone(shards[:1], tmp_path / "later", encoders, TWO)
    assert "other images are readable than before" in caplog.text
    assert encoders[0].images == before + TINY
    assert parts(tmp_path / "later") == parts(tmp_path / "fresh")


def test_a_part_of_other_settings_or_of_a_changed_shard_keeps_nothing(shards, tmp_path, encoders):
    for number, (cfg, shard) in enumerate(
        [(replace(ONE, batch_size=8), shards[0]), (ONE, replace(shards[0], version="before"))]
    ):
        root = tmp_path / str(number)
        paths = embed_alone(shards[:1], root, encoders[:1], cfg)
        url = paths.embeddings.file("00000.parquet")
        facts = tables.facts(url) | {"shard": vars(shard)}
        tables.write(url, tables.read(url), **facts)
        before = encoders[0].images
        embed_alone(shards[:1], root, encoders, TWO)
        assert encoders[0].images == before + TINY


def test_encoders_are_added_without_overwrite_and_taken_away_only_with_it(
    shards, tmp_path, encoders
):
    paths = embed_alone(shards[:1], tmp_path, encoders[:1], ONE)
    done, todo = survey.plan(TWO, shards, paths)
    assert not done and todo == shards
    found = survey.survey(TWO, shards, paths)
    assert found.extended == shards[:1] and not found.other
    embed_alone(shards[:1], tmp_path, encoders, TWO)
    assert [facts["shard"]["stem"] for facts in survey.plan(TWO, shards, paths)[0]] == ["00000"]
    for fewer in (ONE, replace(ONE, also=("RN50:openai",))):
        with pytest.raises(UserError, match=r"embed\.also was \['pico-resnet'\].*--overwrite"):
            survey.plan(fewer, shards, paths)
    assert survey.plan(ONE, shards, paths, overwrite=True) == ([], shards)
    assert not paths.embeddings.names()


@pytest.mark.ray
def test_a_run_gets_a_second_encoder_after_an_interruption(
    shards, tmp_path, ray_session, capsys, encoders
):
    paths = layout.RunPaths(str(tmp_path / "later"))
    embed.run(ONE, paths, shards)
    embed_alone(shards[:1], tmp_path / "later", encoders, TWO)  # the process ended after one shard
    query = status.StatusQuery({"embed": TWO}, shards, False)
    row, _ = status.embed_row(query, paths)
    assert "1 of 2 shards: 0 new, 0 changed, 1 to be extended" in row.rerun and row.done == 1
    manifest = embed.run(TWO, paths, shards)
    assert manifest["fingerprint"] == survey.fingerprint(TWO, shards)
    assert [each["column"] for each in manifest["encoders"]] == views.names(manifest)
    assert [each["model"] for each in manifest["encoders"]] == ["pico-clip", "pico-resnet"]
    assert manifest["precisions"] == ["cpu fp32"]
    embed_alone(shards, tmp_path / "fresh", encoders, TWO)
    assert parts(tmp_path / "later") == parts(tmp_path / "fresh")
    assert status.embed_row(query, paths)[0].state == "done"


def test_verify_reads_every_column(shards, tmp_path, encoders):
    paths = embed_alone(shards[:1], tmp_path, encoders, TWO)
    url = paths.embeddings.file("00000.parquet")
    table, facts = tables.read(url), tables.facts(url)
    manifest = embed.summary([facts], TWO, 0.0)

    def check() -> violations.Violations:
        run = row_checks.RunFacts(
            *(paths, config.fingerprint(TWO), manifest["encoders"], manifest["columns"]),
            *(None, 0, [], None, [], None, {}, False, False, 1 << 26),
        )
        return row_checks.check_rows(manifest["shards"][0], run).found

    def put(column: str, x: np.ndarray) -> None:
        at = table.schema.get_field_index(column)
        tables.write(url, table.set_column(at, column, tables.from_matrix(x)), **facts)

    assert not check().lines
    x = tables.to_matrix(table["embedding_2"]).copy()
    for value, message in ((np.nan, "embedding_2 is not finite"), (0, "is not of unit length")):
        x[3] = value
        put("embedding_2", x)
        assert message in "\n".join(check().lines)
    put("embedding_2", np.ones((TINY, 1)))
    assert "has not the columns it should:" in "\n".join(check().lines)
    tables.write(url, table.drop_columns(["embedding_2"]), **facts)
    assert "has not the columns it should:" in "\n".join(check().lines)
    other = [{**each, "model": "RN50"} for each in facts["encoders"]]
    tables.write(url, table, **facts | {"encoders": other})
    assert "its footer names other encoders than the manifest" in "\n".join(check().lines)


def test_views_side_by_side():
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((5, dim)).astype(np.float16) for dim in (3, 2))
    rows = pa.table({"embedding": tables.from_matrix(a), "embedding_2": tables.from_matrix(b)})
    names = views.names({"config": {"also": ["pico-resnet"]}})
    assert names == ["embedding", "embedding_2"]
    x, dims = views.side_by_side(rows.slice(1), names)
    assert dims == [3, 2] and np.array_equal(x, np.concatenate([a, b], axis=1)[1:])
    x, dims = views.side_by_side(rows, views.names({"config": {}}))
    assert dims == [3] and np.array_equal(x, a)
    assert views.names({"config": {"also": ["a", "b"]}})[2] == "embedding_3"


@pytest.mark.parametrize(
    ("also", "parts"),
    [
        ("pico-resnt", ["embed.also = 'pico-resnt'", "unknown model", "pico-resnet"]),
        ("ViT-B-32", ["embed.also = 'ViT-B-32'", "needs pretrained", "openai"]),
        ("ViT-B-32:opnai", ["embed.also = 'ViT-B-32:opnai'", "unknown pretrained 'opnai'"]),
        ("timm:resnet81", ["embed.also = 'timm:resnet81'", "unknown model of timm", "resnet"]),
        ("timm:resnet18:/no/w.pt", ["/no/w.pt does not exist"]),
    ],
)
def test_unknown_encoders_are_named_before_anything_is_loaded(also, parts):
    with pytest.raises(UserError) as caught:
        embed_settings.check({"embed": replace(ONE, also=(also,))})
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize("name", ["ViT-B-32:openai", "timm:resnet18", "timm:resnet18:none"])
def test_known_encoders_pass(name):
    embed_settings.check({"embed": replace(ONE, also=("pico-resnet", name))})


@pytest.mark.parametrize("also", [("pico-clip",), ("pico-resnet", "pico-resnet")])
def test_an_encoder_that_is_named_twice_is_refused(also):
    with pytest.raises(UserError, match="named twice"):
        embed_settings.Config(also=also)


@pytest.mark.parametrize("model", ["pico-resnet", "timm:resnet18"])
def test_an_encoder_without_words_is_not_the_first(model):
    with pytest.raises(UserError, match=r"no text encoder .* embed\.also"):
        embed_settings.check({"embed": replace(ONE, model=model)})


def test_views_of_given_embeddings_are_the_columns():
    assert views.names({"config": {"columns": []}}) == ["embedding"]
    assert views.names({"config": {"columns": ["a", "b"]}}) == ["embedding", "embedding_2"]
