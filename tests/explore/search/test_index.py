"""The index: near enough to exact, sharded, whole or absent, and of the run that is there."""

import logging
import sys
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.artifacts import layout
from pipeline.artifacts.layout import Space
from pipeline.explore.search import index
from pipeline.explore.search.index import Rows
from pipeline.explore.search.search import Search
from pipeline.explore.search.settings import Config
from pipeline.runtime.errors import UserError
from pipeline.select_k.assign_parts import load_network
from pipeline.store import tables
from pipeline.store.shards import ShardReader
from pipeline.vision import clip, images
from tests import fake_run
from tests.conftest import ROOT
from tests.explore import points

CIFAR = ROOT.parent / "shared/data/cifar10-test"
COMPRESSED = Config(flat_below=1000)
pytestmark = pytest.mark.ray


def recall(paths: layout.RunPaths, x: np.ndarray, queries: np.ndarray, top: int = 10) -> float:
    """The share of the truly nearest that are found."""
    search = Search(paths, [Space.CLIP])
    found = [search.rank(query, Space.CLIP, top)[0] for query in queries]
    pairs = zip(found, points.exact(x, queries, top), strict=True)
    return float(np.mean([len(np.intersect1d(ids, true)) / top for ids, true in pairs]))


@pytest.fixture(scope="module")
def large(tmp_path_factory, ray_session) -> tuple[layout.RunPaths, np.ndarray]:
    """20,000 samples in seven parts, compressed."""
    x = points.mixture(20_000, 64, 300, 0.7)
    parts = np.split(x, [3000, 3001, 6000, 9500, 13_000, 17_777])
    paths = points.build(str(tmp_path_factory.mktemp("large")), parts)
    assert index.run(COMPRESSED, paths, Space.CLIP)["lists"] == 500
    return paths, x


def test_recall_of_the_compressed_index(large):
    paths, x = large
    queries = points.mixture(200, 64, 300, 0.7)  # of the same directions
    assert recall(paths, x, queries) >= 0.95


def test_every_sample_is_its_own_nearest(large):
    paths, x = large
    search = Search(paths, [Space.CLIP])
    for row in range(0, len(x), 371):
        ids, scores = search.rank(x[row], Space.CLIP, 5)
        assert ids[0] == row and scores[0] == pytest.approx(1, abs=1e-3)
        assert scores.tolist() == sorted(scores.tolist(), reverse=True)
    hit = search.nearest(x[9500], Space.CLIP, 1)[0]
    assert (hit.sample_id, hit.cluster_id, hit.cluster_caption) == ("00004/0", 4, "part 4")


def test_scores_are_the_cosines_of_what_is_stored(large):
    paths, x = large
    query = points.mixture(1, 64, 1, 1.0, seed=3)[0]
    ids, scores = Search(paths, [Space.CLIP]).rank(query, Space.CLIP, 20)
    assert scores == pytest.approx(x[ids].astype(np.float16).astype(np.float32) @ query, abs=1e-5)


def test_a_cluster_gives_as_many_as_are_asked_for_or_as_it_has(large):
    paths, x = large
    search = Search(paths, [Space.CLIP])
    for part, top, row in ((1, 5, 0), (3, 20, 19_999), (5, 300, 3), (6, 1000, 0)):
        members = search.rows.ids(part)
        hits = search.nearest(x[row], Space.CLIP, top, part)
        assert len(hits) == min(top, len(members))
        assert {hit.cluster_id for hit in hits} == {part}
        true = points.exact(x[members.start : members.stop], x[row : row + 1], 1)[0, 0]
        assert hits[0].sample_id == f"{part:05d}/{true}"


def test_no_members_are_none_near(large):
    paths, x = large
    nobody = np.zeros(len(x), bool)
    ids, scores = Search(paths, [Space.CLIP]).rank(x[0], Space.CLIP, 5, nobody)
    assert len(ids) == len(scores) == 0


@pytest.mark.parametrize("cluster", [-1, 7])
def test_an_unknown_cluster_is_refused(large, cluster):
    with pytest.raises(UserError, match=f"no cluster {cluster}; give 0 to 6"):
        Search(large[0], [Space.CLIP]).nearest(large[1][0], Space.CLIP, 1, cluster)


def test_more_are_asked_for_than_the_first_lists_hold(large, monkeypatch):
    paths, x = large
    monkeypatch.setattr(index, "PROBES", 1)
    ids, _ = Search(paths, [Space.CLIP]).rank(x[0], Space.CLIP, 1500)
    assert len(set(ids.tolist())) == 1500


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc to ask")
def test_lists_are_mapped_and_not_read(large):
    opened = Search(large[0], [Space.CLIP])
    mapped = Path("/proc/self/maps").read_text()
    names = [n for n in large[0].index("clip").names() if n.endswith(".lists")]
    assert len(names) == 7 and all(name in mapped for name in names)
    del opened


def test_many_parts_are_few_files_and_a_flat_index_is_exact(tmp_path, ray_session):
    x = points.mixture(70 * 20, 33, 10, 0.5)
    paths = points.build(str(tmp_path), np.split(x, 70))
    manifest = index.run(Config(), paths, Space.CLIP)
    assert manifest["lists"] == 1 and manifest["samples"] == 1400
    assert len(manifest["files"]) == 1 + 35  # two parts each
    queries = points.mixture(50, 33, 10, 0.5, seed=1)
    assert recall(paths, x, queries, top=25) == 1


def test_dimensions_that_the_code_does_not_divide(tmp_path, ray_session, monkeypatch):
    monkeypatch.setattr(index, "CODE_BYTES", 16)
    x = points.mixture(3000, 37, 60, 0.5)
    paths = points.build(str(tmp_path), np.split(x, 2))
    index.run(Config(flat_below=1000), paths, Space.CLIP)
    assert recall(paths, x, x[::100]) >= 0.95


def test_a_remote_index_is_copied_once(large, monkeypatch, tmp_path):
    paths, x = large
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = fsspec.filesystem("memory")
    store.put(paths.root, "/remote/run", recursive=True)
    remote = layout.RunPaths("memory://remote/run")
    expected = Search(paths, [Space.CLIP]).nearest(x[77], Space.CLIP, 9)
    assert Search(remote, [Space.CLIP]).nearest(x[77], Space.CLIP, 9) == expected
    copies = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    assert len(copies) == 8
    store.rm("/remote/run/index/clip", recursive=True)
    with pytest.raises(UserError, match="has no index of clip: run `ratecluster index"):
        Search(remote, [Space.CLIP])
    store.put(paths.index("clip").url, "/remote/run/index/clip", recursive=True)
    assert Search(remote, [Space.CLIP]).nearest(x[77], Space.CLIP, 9) == expected
    assert {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*") if f.is_file()} == copies
    store.rm("/remote", recursive=True)


# ---- whole or absent


@pytest.fixture
def small(tmp_path, ray_session) -> layout.RunPaths:
    return points.build(str(tmp_path), np.split(points.mixture(60, 16, 3, 0.5), 3))


def files(paths: layout.RunPaths) -> dict[str, int]:
    folder = Path(paths.index("clip").url)
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


def test_a_rerun_finds_it_done(small, caplog):
    caplog.set_level(logging.INFO)
    manifest = index.run(Config(), small, Space.CLIP)
    before = files(small)
    assert set(before) == {"manifest.json", *manifest["files"]} and len(before) == 5
    assert index.run(Config(), small, Space.CLIP) == manifest
    assert files(small) == before and "already done" in caplog.messages[-1]


def test_no_index_is_told_with_the_command(small):
    with pytest.raises(UserError, match=rf"index --root {small.root} --space clip` first"):
        Search(small, [Space.CLIP])
    assert not Path(small.index("clip").url).exists()


def test_embeddings_made_again_put_it_out_of_date(small):
    index.run(Config(), small, Space.CLIP)
    embedded = small.embeddings.manifest()
    del embedded["fingerprint"]
    small.embeddings.finish("e2", **embedded)
    small.network.finish("n1", upstream="e2")
    with pytest.raises(UserError, match="out of date, its input has changed: run `ratecluster"):
        Search(small, [Space.CLIP])
    before = files(small)
    index.run(Config(), small, Space.CLIP)
    assert not set(files(small)) - {"manifest.json"} & set(before)
    Search(small, [Space.CLIP])


def test_a_missing_file_is_told_and_made_again(small):
    manifest = index.run(Config(), small, Space.CLIP)
    lost = manifest["files"][0]
    Path(small.index("clip").file(lost)).unlink()
    with pytest.raises(UserError, match="out of date, 1 files are missing"):
        Search(small, [Space.CLIP])
    before = files(small)
    index.run(Config(), small, Space.CLIP)
    after = files(small)
    assert {n for n in after if after[n] != before.get(n)} == {lost, "manifest.json"}


def test_an_interrupted_one_is_not_seen_and_goes_on(small):
    index.run(Config(), small, Space.CLIP)
    last = Path(small.embeddings.file("00002.parquet"))
    whole = last.read_bytes()
    table = tables.read(str(last))
    tables.write(str(last), pa.concat_tables([table, table]))
    other = Config(flat_below=2000)
    with pytest.raises(Exception, match="40 rows, its manifest says 20"):
        index.run(other, small, Space.CLIP)
    with pytest.raises(UserError, match="has no index of clip"):
        Search(small, [Space.CLIP])
    left = files(small)
    assert len(left) == 3  # trained, and two of three lists
    last.write_bytes(whole)
    index.run(other, small, Space.CLIP)
    after = files(small)
    assert {name for name in left if after[name] == left[name]} == set(left)
    assert Search(small, [Space.CLIP]).rows.total == 60


def test_lists_without_what_trained_them_are_made_again(small):
    manifest = index.run(Config(), small, Space.CLIP)
    (trained,) = (name for name in manifest["files"] if name.endswith("trained.faiss"))
    Path(small.index("clip").file(trained)).unlink()
    before = files(small)
    index.run(Config(), small, Space.CLIP)
    assert all(files(small)[name] != before[name] for name in before)


def test_a_stage_that_has_not_finished_is_named(small):
    small.network.clear()
    index.run(Config(), small, Space.CLIP)
    with pytest.raises(UserError, match="run `ratecluster train` first"):
        index.run(Config(), small, Space.Z)
    small.embeddings.clear()
    with pytest.raises(UserError, match="run `ratecluster embed` first"):
        index.run(Config(), small, Space.CLIP)


def test_without_faiss_the_package_is_named(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"pip install 'ratecluster\[cpu\]'"):
        index.run(Config(), small, Space.CLIP)


# ---- z, and the parts of it all


def test_z_is_what_the_network_makes_of_embeddings(searchable):
    network = load_network(searchable)
    parts = [tables.read(searchable.embeddings.file(f"{s}.parquet")) for s in fake_run.STEMS]
    x = np.concatenate([tables.to_matrix(part["embedding"]) for part in parts])
    z = network.features(torch.from_numpy(x.astype(np.float32))).numpy()
    search = Search(searchable, [Space.Z])
    for row in range(0, len(z), 7):
        ids, scores = search.rank(z[row], Space.Z, 10)
        assert ids[0] == row
        true = np.sort(z @ z[row])[::-1][:10]
        assert scores == pytest.approx(true, abs=1e-3)  # float16 decides which are near


def test_ids_of_parts_and_parts_of_ids():
    counts = [3, 0, 1, 5]
    shards = [{"shard": {"stem": f"s{i}"}, "embedded": n} for i, n in enumerate(counts)]
    rows = Rows.of({"shards": shards})
    assert rows.stems == ["s0", "s2", "s3"] and rows.total == 9
    assert [list(rows.ids(part)) for part in range(3)] == [[0, 1, 2], [3], [4, 5, 6, 7, 8]]
    assert rows.parts(np.arange(9)).tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("samples", [1, 999, 1000, 10**4, 10**5, 10**6, 10**8, 10**9])
def test_lists_are_one_for_few_samples_and_trained_by_enough(samples):
    assert index.lists(Config(), samples) == 1 or samples >= 10**5
    count = index.lists(COMPRESSED, samples)
    assert (count == 1) == (samples < 1000)
    assert count == 1 or 25 <= count <= min(2**14, samples / index.PER_LIST)


def test_wrong_settings_are_refused():
    with pytest.raises(UserError, match=r"index\.flat_below = 999"):
        Config(flat_below=999)


@pytest.mark.skipif(not CIFAR.is_dir(), reason="CIFAR-10 is not in ../shared/data")
@pytest.mark.slow
def test_recall_on_pictures(tmp_path, ray_session):
    encoder = clip.load("pico-clip", "", device="cpu", precision="fp32")
    with (CIFAR / "00000.tar").open("rb") as stream:
        samples = [s for s, _ in zip(ShardReader(stream, None), range(4000), strict=False)]
    pictures = [encoder.prepare(images.decode(s.image().data, 10**6)) for s in samples]
    batches = np.array_split(np.stack(pictures), 16)
    x = np.concatenate([encoder.encode_images(batch) for batch in batches])
    paths = points.build(str(tmp_path), np.split(x, 4))
    index.run(COMPRESSED, paths, Space.CLIP)
    assert recall(paths, x, x[::40]) >= 0.95
