"""The stage embed on files of given embeddings: resuming, changes, limits. Inside Ray."""

import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.artifacts import layout, views
from pipeline.embed import stage as embed
from pipeline.embed import survey
from pipeline.embed.given import sources
from pipeline.embed.given.settings import Config
from pipeline.embed.settings import Config as EmbedConfig
from pipeline.runtime.errors import UserError
from pipeline.store.listing import list_shards
from tests.given_vectors import rows, write_parquet

pytestmark = pytest.mark.ray
CFG = Config(columns=("clip", "dino"))


@pytest.fixture(scope="module")
def vectors(tmp_path_factory) -> Path:
    return write_parquet(tmp_path_factory.mktemp("v"), n=50)


def run(vectors: Path, root: Path, cfg: Config = CFG, **options) -> dict:
    files = sources.list_embeddings(str(vectors))
    return embed.run(cfg, layout.RunPaths(str(root)), files, **options)


def test_the_manifest_is_as_that_of_encoders(vectors, tmp_path, ray_session):
    made = run(vectors, tmp_path)
    counts = [made[name] for name in ("samples", "embedded", "rejected", "damaged")]
    assert counts == [100, 100, 0, 0] and made["columns"] == {"label": "str", "width": "int"}
    assert views.names(made) == ["embedding", "embedding_2"]
    assert [s["shard"]["stem"] for s in made["shards"]] == ["00000", "00001"]


def test_parts_that_are_done_are_kept_after_a_kill(vectors, tmp_path, ray_session):
    """As a killed run leaves it: one part of two, no manifest, half a file."""
    run(vectors, tmp_path / "whole")
    root = tmp_path / "cut"
    for folder in ("embeddings", "rejects"):
        (root / folder).mkdir(parents=True)
        shutil.copy2(tmp_path / "whole" / folder / "00001.parquet", root / folder)
        (root / folder / ".00000.parquet.partial-0").write_bytes(b"half")
    kept = root / "embeddings" / "00001.parquet"
    before = kept.stat()
    _, todo = survey.plan(CFG, sources.list_embeddings(str(vectors)), layout.RunPaths(str(root)))
    assert [file.stem for file in todo] == ["00000"]
    made = run(vectors, root)
    assert (kept.stat().st_ino, kept.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert made["fingerprint"] == run(vectors, tmp_path / "whole")["fingerprint"]
    for folder in ("embeddings", "rejects"):
        one, two = (tmp_path / name / folder / "00000.parquet" for name in ("cut", "whole"))
        assert one.read_bytes() == two.read_bytes()
        assert not list((root / folder).glob(".*"))


def test_a_changed_file_is_imported_again(vectors, tmp_path, ray_session):
    folder = shutil.copytree(vectors, tmp_path / "v")
    run(folder, tmp_path / "run")
    pq.write_table(pa.table(rows(90, 7)[1]), folder / "00001.parquet")
    assert [s["samples"] for s in run(folder, tmp_path / "run")["shards"]] == [50, 90]


def test_other_settings_and_encoders_are_refused_without_overwrite(
    vectors, tiny_shards, tmp_path, ray_session
):
    run(vectors, tmp_path)
    one = Config(columns=("clip",))
    with pytest.raises(UserError, match=r"embeddings.columns was \['clip', 'dino'\], is \['clip'"):
        run(vectors, tmp_path, one)
    with pytest.raises(UserError, match=r"made with different settings \(with --embeddings\)"):
        embed.run(EmbedConfig(), layout.RunPaths(str(tmp_path)), list_shards(str(tiny_shards)))
    assert views.names(run(vectors, tmp_path, one, overwrite=True)) == ["embedding"]


def test_too_many_rejects_and_nothing_left_fail(tmp_path, ray_session):
    table = pa.table({"id": ["a", "b", "c"], "v": [[1.0], None, None]})
    pq.write_table(table, tmp_path / "a.parquet")
    why = re.escape("more than embeddings.max_reject_fraction = 0.5: 2 missing_embedding. See")
    with pytest.raises(RuntimeError, match=f"2 of 3 samples of the run were rejected, {why}"):
        run(tmp_path, tmp_path / "run", Config())
    nothing = pa.table({"id": [None, ""], "v": [[1.0], [2.0]]})
    pq.write_table(nothing, tmp_path / "a.parquet")
    with pytest.raises(RuntimeError, match="no row has an id and whole vectors; see rejects/"):
        run(tmp_path, tmp_path / "all", Config(max_reject_fraction=1))
