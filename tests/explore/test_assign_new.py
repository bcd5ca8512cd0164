"""Assign: shards of the run get the labels that they had, new ones those of its own functions."""

import io
import json
import shutil
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from pipeline.artifacts import layout
from pipeline.cli import main as cli
from pipeline.embed import settings as embed_settings
from pipeline.explore import assign_new
from pipeline.ops.verify import stage as verify
from pipeline.runtime.errors import UserError
from pipeline.select_k.assign_parts import load_network
from pipeline.store import storage, tables
from pipeline.store.shard_writer import ShardWriter
from pipeline.store.shards import ShardReader
from tests.conftest import BUNDLED, TINY
from tests.explore import cut_run

COPIES = 12


def recoded(data: bytes, size: int, quality: int) -> bytes:
    """The picture on white, scaled, as a JPEG."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image).convert("RGB").resize((size, size))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()


@pytest.fixture(scope="module")
def new_shards(tiny_shards, tmp_path_factory):
    """The shards of the run, and one that it has not seen: emoji, and some of them re-encoded."""
    folder = tmp_path_factory.mktemp("new")
    for path in tiny_shards.glob("*.tar"):
        shutil.copy2(path, folder)
    with (BUNDLED / "00002.tar").open("rb") as stream:
        samples = [s for s, _ in zip(ShardReader(stream, None), range(TINY), strict=False)]
    with (folder / "held-out.tar").open("wb") as file, ShardWriter(file) as writer:
        for number, sample in enumerate(samples):
            picture = sample.image().data
            writer.add(f"{number:03d}.png", picture)
            writer.add(f"{number:03d}.json", json.dumps({"odd": number}).encode())
            if number < COPIES:
                writer.add(f"{number:03d}-copy.jpg", recoded(picture, 96 + 8 * number, 75))
    return folder


@pytest.fixture(scope="module")
def assigned(finished_run, new_shards, tmp_path_factory):
    """The root of the new shards, by the command line."""
    root = tmp_path_factory.mktemp("assigned")
    assert cli.invoke(arguments(finished_run, new_shards, root)) == 0
    return layout.RunPaths(str(root))


def arguments(run, shards, root) -> list[str]:
    return ["assign", "--run", str(run), "--shards", str(shards), "--root", str(root)]


@pytest.fixture(scope="module")
def source(finished_run):
    return layout.RunPaths(str(finished_run))


pytestmark = pytest.mark.ray


@pytest.mark.parametrize("stem", ["00000", "00001"])
def test_shards_of_the_run_get_the_labels_that_they_had(source, assigned, stem):
    for folder in ("embeddings", "rejects", "assignments"):
        name = f"{folder}/{stem}.parquet"
        assert tables.read(source.top.file(name)).equals(tables.read(assigned.top.file(name)))
    before = tables.read(source.labels.file(f"{stem}.parquet"))
    after = tables.read(assigned.labels.file(f"{stem}.parquet"))
    assert after.select(before.column_names).equals(before)  # `odd` is a column of the new
    names = [storage.read_bytes(p.labeled.file(f"{stem}.tar")) for p in (source, assigned)]
    assert names[0] == names[1]


def test_new_samples_are_where_the_nearest_prototype_is(source, assigned):
    rows = tables.read(assigned.embeddings.file("held-out.parquet"))
    x = torch.from_numpy(tables.to_matrix(rows["embedding"]).astype(np.float32))
    z = load_network(source).features(x)
    prototypes = tables.read(source.clusters.file("prototypes.parquet"))
    cosines = z @ torch.from_numpy(tables.to_matrix(prototypes["vector"]).copy()).T
    nearest = prototypes["cluster_id"].to_numpy()[cosines.argmax(1).numpy()]
    labels = tables.read(assigned.labels.file("held-out.parquet"))
    assert labels["sample_id"].equals(rows["sample_id"])
    assert labels["cluster_id"].to_pylist() == nearest.tolist()
    assert np.allclose(labels["outlier_score"].to_numpy(), 1 - cosines.amax(1).numpy(), atol=1e-6)
    captions = source.captions.manifest()["captions"]
    assert labels["cluster_caption"].to_pylist() == [captions[c] for c in nearest]


def test_the_new_root_is_sound_and_done(source, assigned, new_shards, capsys, caplog):
    found = verify.run(assigned)
    assert (found.lines, found.notes) == ([], [])
    assert cli.invoke(["status", "--root", assigned.root]) == 0
    message = capsys.readouterr().out
    for stage in ("embed", "train", "select_k", "caption", "write"):
        assert f"\n{stage:<8}  done" in message
    assert f"nothing: it is of {source.root}" in " ".join(message.split())
    sizes = assigned.clusters.manifest()["sizes"]
    assert sum(sizes) == 3 * TINY + COPIES == assigned.embeddings.manifest()["embedded"]
    assert tables.read(assigned.clusters_table)["size"].to_pylist() == sizes
    times = {p: p.stat().st_mtime_ns for p in storage.local_path(assigned.root).rglob("*.*")}
    with caplog.at_level("INFO"):
        assert cli.invoke(arguments(source.root, new_shards, assigned.root)) == 0
    assert caplog.text.count("already done") == 6
    assert "2 shards share names with shards of the run, such as 00000" in caplog.text
    again = {p: p.stat().st_mtime_ns for p in storage.local_path(assigned.root).rglob("*.*")}
    assert {p: t for p, t in again.items() if ".lock" not in str(p)} == {
        p: t for p, t in times.items() if ".lock" not in str(p)
    }


def test_samples_farther_than_the_runs_own_are_listed(
    source, assigned, tmp_path, new_shards, capsys
):
    own = np.concatenate(
        [
            tables.read(source.assignments.file(f"{stem}.parquet"))["outlier_score"].to_numpy()
            for stem in ("00000", "00001")
        ]
    )
    before = assigned.folder("curation/unexplained").manifest()
    assert before["threshold"] == own.max() and before["config"]["quantile"] == 0.999
    root = shutil.copytree(assigned.root, tmp_path / "run")
    paths = layout.RunPaths(str(root))
    again = [*arguments(source.root, new_shards, root), "--quantile", "0.9"]
    assert cli.invoke(again) == 0
    limit = float(np.sort(own)[int(np.ceil(0.9 * len(own))) - 1])
    names = [f"{stem}.parquet" for stem in ("00000", "00001", "held-out")]
    every = pa.concat_tables([tables.read(paths.assignments.file(n)) for n in names]).to_pylist()
    expected = {r["sample_id"]: r["outlier_score"] for r in every if r["outlier_score"] > limit}
    rows = cut_run.listed(paths, "unexplained")
    assert {row["sample_id"]: row["outlier_score"] for row in rows} == expected
    assert len(expected) >= 12  # of the run's own 120 a tenth
    assert all(row["reason"].startswith("unexplained: score ") for row in rows)
    message = f"{len(rows)} of {3 * TINY + COPIES} samples"
    assert message in (out := capsys.readouterr().out) and "90% of the run's samples (19" in out


def test_other_shards_are_assigned_anew(source, assigned, tmp_path, new_shards, caplog):
    root = shutil.copytree(assigned.root, tmp_path / "run")
    paths = layout.RunPaths(str(root))
    before = tables.read(paths.labels.file("held-out.parquet"))
    with caplog.at_level("INFO"):
        assert cli.invoke(arguments(source.root, new_shards / "held-out.tar", root)) == 0
    assert "assign: clusters: runs again: its input has changed" in caplog.text
    assert sum(paths.clusters.manifest()["sizes"]) == TINY + COPIES
    after = tables.read(paths.labels.file("held-out.parquet"))
    assert before.select(after.column_names).equals(after)  # fewer json columns
    found = verify.run(paths)
    assert found.lines == [] and len(found.notes) == 4  # parts of embed that are left


def test_planted_copies_are_found(assigned, capsys):
    """Re-encoded, scaled pictures: those in the cluster of their original."""
    assert cli.invoke(["duplicates", "--root", assigned.root, "--threshold", "0.9"]) == 0
    print(capsys.readouterr().out)
    labels = tables.read(assigned.labels.file("held-out.parquet")).to_pylist()
    cluster = {row["key"]: row["cluster_id"] for row in labels}
    together = [i for i in range(COPIES) if cluster[f"{i:03d}"] == cluster[f"{i:03d}-copy"]]
    assert len(together) >= COPIES * 3 / 4
    found = {row["sample_id"]: row for row in cut_run.listed(assigned, "duplicates")}
    pairs = [{f"held-out/{i:03d}", f"held-out/{i:03d}-copy"} for i in together]
    assert sum(bool(pair & found.keys()) for pair in pairs) >= 0.9 * len(pairs)


def test_what_curation_lists_write_leaves_out(assigned, tmp_path):
    root = shutil.copytree(assigned.root, tmp_path / "run")
    paths = layout.RunPaths(str(root))
    assert cli.invoke(["balance", "--root", str(root), "--per-cluster", "10"]) == 0
    assert cli.invoke(["outliers", "--root", str(root), "--quantile", "0.9"]) == 0
    listed = [f"{root}/curation/{name}" for name in ("balance", "outliers")]
    sets = ["--set", f"write.exclude={','.join(listed)}"]
    assert cli.invoke(["write", "--root", str(root), *sets]) == 0
    ids = {
        row["sample_id"] for name in ("balance", "outliers") for row in cut_run.listed(paths, name)
    }
    names = [f"{stem}.parquet" for stem in ("00000", "00001", "held-out")]
    labels = pa.concat_tables([tables.read(paths.labels.file(n)) for n in names]).to_pylist()
    assert {r["sample_id"] for r in labels if r["status"] == "excluded"} == ids
    found = verify.run(paths)
    assert (found.lines, found.notes) == ([], [])
    assert (
        cli.invoke(
            ["write", "--root", str(root), "--set", f"write.exclude={root}/curation/balance-kept"]
        )
        == 2
    )


def test_refusals(source, tmp_path, new_shards, capsys):
    assert cli.invoke(arguments(source.root, new_shards, source.root)) == 2
    assert "is the run itself" in capsys.readouterr().err
    shutil.copytree(source.root, tmp_path / "run")
    assert cli.invoke(arguments(source.root, new_shards, tmp_path / "run")) == 2
    assert "holds a trained run" in capsys.readouterr().err
    assert cli.invoke(arguments(tmp_path / "none", new_shards, tmp_path / "new")) == 2
    assert "embed has not finished there" in capsys.readouterr().err


def test_the_encoder_is_the_runs():
    made_with = {**asdict(embed_settings.Config()), "model": "ViT-B-32", "batch_size": 8}
    found = assign_new.encoder(embed_settings.Config(actors=3), made_with)
    assert (found.model, found.batch_size, found.actors) == ("ViT-B-32", 8, 3)
    with pytest.raises(UserError, match=r"embed.model = 'ViT-L-14', but the run used"):
        assign_new.encoder(embed_settings.Config(model="ViT-L-14"), made_with)
    assert (
        assign_new.encoder(embed_settings.Config(model="ViT-B-32"), made_with).model == "ViT-B-32"
    )
