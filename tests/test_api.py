"""The Python API on a finished run, and docs/how-to/python.md as it is written."""

import io
import re
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest

import pipeline
from pipeline.runtime.errors import UserError
from pipeline.store.shards import ShardReader
from tests.conftest import TINY, WORDS

pytestmark = pytest.mark.ray
PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "python.md"


@pytest.fixture
def opened(finished_run):
    return pipeline.open_run(str(finished_run))


def test_tables_are_those_of_the_run(opened):
    labels = opened.labels().to_table(columns=["sample_id", "status", "cluster_id"])
    assert labels.num_rows == 2 * TINY + 3
    embeddings = opened.embeddings().to_table()
    assert embeddings.num_rows == 2 * TINY
    assert embeddings["sample_id"].to_pylist() == [
        row["sample_id"] for row in labels.to_pylist() if row["status"] == "success"
    ]
    x = np.stack(embeddings["embedding"].to_numpy()).astype(np.float32)
    assert np.allclose(np.linalg.norm(x, axis=1), 1, atol=1e-2)
    clusters = opened.clusters()
    assert sum(clusters["size"].to_pylist()) == 2 * TINY


def test_members_come_most_typical_first(opened):
    sizes = opened.clusters()["size"].to_pylist()
    for cluster, size in enumerate(sizes):
        found = opened.members(cluster)
        scores = found["outlier_score"].to_pylist()
        assert len(scores) == size and scores == sorted(scores)
        assert set(found["cluster_id"].to_pylist()) == {cluster}
    with pytest.raises(UserError, match=f"clusters 0 to {len(sizes) - 1}"):
        opened.members(len(sizes))


def test_an_image_is_that_of_the_shard(opened, tiny_shards):
    with (tiny_shards / "00001.tar").open("rb") as stream:
        sample = next(iter(ShardReader(stream, None)))
    data = next(m.data for m in sample.members if m.name.endswith(("png", "jpg", "webp")))
    image = opened.image(f"00001/{sample.key}")
    from PIL import Image

    assert image.mode == "RGB" and image.size == Image.open(io.BytesIO(data)).size


@pytest.mark.parametrize(
    ("sample_id", "why"),
    [
        ("00007/x", "no shard '00007'"),
        ("00000/no-such-key", "is not in the run"),
        ("00001/bad-text", "has no picture: not_an_image"),
    ],
)
def test_an_image_that_cannot_be_had(opened, sample_id, why):
    with pytest.raises(UserError, match=why):
        opened.image(sample_id)


def test_an_image_of_a_shard_that_changed_or_is_gone(opened, tmp_path):
    sample = opened.embeddings().head(1)["sample_id"][0].as_py()
    for shard in opened.manifests["embeddings"]["shards"]:
        copy = shutil.copy(shard["shard"]["url"], tmp_path)
        shard["shard"]["url"] = str(copy)
    with Path(opened._shard(sample)["url"]).open("ab") as file:
        file.write(b"\0" * 512)
    with pytest.raises(UserError, match="was changed after it was embedded"):
        opened.image(sample)
    Path(opened._shard(sample)["url"]).unlink()
    with pytest.raises(UserError, match="is gone"):
        opened.image(sample)


def test_a_run_on_another_store(finished_run, opened):
    memory = fsspec.filesystem("memory")
    memory.put(f"{finished_run}/", "/api-run/", recursive=True)
    try:
        copy = pipeline.open_run("memory://api-run")
        assert copy.labels().to_table().equals(opened.labels().to_table())
        assert copy.members(0).equals(opened.members(0))
    finally:
        memory.rm("/api-run", recursive=True)


def test_a_run_that_has_not_finished(tmp_path):
    with pytest.raises(UserError, match="run `ratecluster embed` first"):
        pipeline.open_run(str(tmp_path))


def test_run_is_the_command(finished_run, tiny_shards, tmp_path):
    root = shutil.copytree(finished_run, tmp_path / "run")
    settings: dict[str, dict[str, object]] = {
        "embed": {"batch_size": 16},
        "train": {"steps": 12, "batch_size": 64, "vocabulary": str(WORDS)},
        "select_k": {"k": 3},
        "caption": {"vocabulary": str(WORDS)},
    }
    found = pipeline.run(tiny_shards, root, **settings)
    assert found.clusters().num_rows == 3
    with pytest.raises(UserError, match=r"select_k\.clusters"):
        pipeline.run(tiny_shards, root, select_k={"clusters": 3})
    with pytest.raises(UserError, match="select_k = 3: give the settings"):
        pipeline.run(tiny_shards, root, select_k=3)  # type: ignore[arg-type]
    settings["embed"]["model"] = "no-such-model"
    with pytest.raises(UserError, match="no-such-model"):
        pipeline.run(tiny_shards, tmp_path / "other", **settings)


def test_the_page_does_what_it_says(finished_run, tiny_shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo-run").symlink_to(finished_run)
    (tmp_path / "my-shards").symlink_to(tiny_shards)
    names: dict[str, object] = {}
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)  # the page's own code
    assert names["image"].mode == "RGB" and names["members"].num_rows > 0  # type: ignore[attr-defined]
    assert names["made"].clusters().num_rows == 4  # type: ignore[attr-defined]
