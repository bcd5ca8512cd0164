"""Exclude lists: every form they have, whatever their ids are, and what write makes of them."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.artifacts import layout
from pipeline.cli import main as cli
from pipeline.ops.verify import stage as verify
from pipeline.runtime import config
from pipeline.runtime.errors import UserError
from pipeline.store import tables
from pipeline.store.storage import Folder
from pipeline.write import exclude_lists
from pipeline.write import settings as write_settings
from pipeline.write import stage as write
from tests import small_run

HOSTILE = ["a/../../etc/passwd", "a/<script>", "a/\x1b[31m", "a/line\nbreak", "a/ü", "a/x,y", "a//"]


@pytest.fixture
def paths(tmp_path):
    return layout.RunPaths(str(small_run.build(tmp_path, small_run.axis)))


def listing(path, ids, **columns) -> str:
    pq.write_table(pa.table({"sample_id": pa.array(ids, pa.string()), **columns}), path)
    return str(path)


def read(url: str) -> list[tuple[str, str]]:
    rows = [row for table in exclude_lists.batches(url) for row in table.to_pylist()]
    return [(row["sample_id"], row["reason"]) for row in rows]


def ready(folder: Folder) -> dict[str, dict[str, str]]:
    found = {}
    for name in sorted(folder.names()):
        rows = tables.read(folder.file(name)).to_pylist()
        found[name] = {row["sample_id"]: row["reason"] for row in rows}
    return found


# ---- forms


def test_a_text_has_one_id_a_line_whatever_it_holds(tmp_path):
    (tmp_path / "bad.txt").write_bytes("\ufeffa/1\r\na/ 2 \n\nb/#3\na/ü".encode())
    ids = ["a/1", "a/ 2 ", "b/#3", "a/ü"]
    assert read(str(tmp_path / "bad.txt")) == [(i, "listed in bad.txt") for i in ids]
    (tmp_path / "worse.txt").write_bytes(b"a/1\n\xff\xfe")
    with pytest.raises(UserError, match=r"worse.txt is not UTF-8"):
        read(str(tmp_path / "worse.txt"))


def test_a_table_may_have_reasons(tmp_path):
    assert read(listing(tmp_path / "none.parquet", [])) == []
    assert read(listing(tmp_path / "a.parquet", ["s/1"])) == [("s/1", "listed in a.parquet")]
    url = listing(tmp_path / "b.parquet", ["s/1", "s/2"], reason=["ugly", None])
    assert read(url) == [("s/1", "ugly"), ("s/2", "listed in b.parquet")]
    pq.write_table(pa.table({"id": ["s/1"]}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match=r"c.parquet has no column sample_id"):
        read(str(tmp_path / "c.parquet"))


def test_what_is_no_list_of_what_is_removed_is_refused(tmp_path):
    for url in (f"{tmp_path}/none.parquet", f"{tmp_path}/none.txt", f"{tmp_path}/none"):
        with pytest.raises(UserError, match=r"does not exist|holds no list"):
            exclude_lists.files(url)
    kept = Folder(f"{tmp_path}/kept")
    tables.write(kept.file("0.parquet"), pa.table({"sample_id": ["s/1"]}), made_of="x")
    with pytest.raises(UserError, match="is not finished"):
        exclude_lists.files(kept.url)
    kept.finish("x", lists="kept")
    with pytest.raises(UserError, match="lists samples that are kept, not removed"):
        exclude_lists.files(kept.url)
    kept.finish("x", lists="removed")
    assert exclude_lists.files(kept.url) == [kept.file("0.parquet")]


def test_a_setting_may_hold_several_and_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = config.load(
        {"write": write_settings.Config}, None, ["write.exclude=a.txt, s3://b/c.parquet,/d"]
    )
    assert given["write"].exclude == (f"{tmp_path}/a.txt", "s3://b/c.parquet", "/d")
    assert write_settings.Config(exclude=given["write"].exclude) == given["write"]


def test_the_digest_is_of_the_content(tmp_path):
    first = listing(tmp_path / "a.parquet", ["s/1"])
    same = listing(tmp_path / "b.parquet", ["s/1"])
    other = listing(tmp_path / "c.parquet", ["s/2"])
    assert exclude_lists.digest(first) == exclude_lists.digest(same) != exclude_lists.digest(other)


# ---- by shard


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("store", ["", "memory:/"])
def test_each_shard_has_its_own_whatever_the_tasks(tmp_path, tasks, store):
    ids = [f"{stem}/{i}" for i in range(40) for stem in ("a", "b", "a__b", "zz")] + HOSTILE
    np.random.default_rng(0).shuffle(ids)
    urls = [listing(tmp_path / "1.parquet", ids), listing(tmp_path / "2.parquet", ids[:9])]
    folder = Folder(f"{store}{tmp_path}/exclude")
    stems = ["a", "b", "a__b", "c"]
    counts = [
        exclude_lists.part(run.tolist(), urls, folder, "m") for run in np.array_split(stems, tasks)
    ]
    assert {seen for seen, _ in counts} == {len(ids) + 9}
    own = {s: {i for i in ids if i.partition("/")[0] == s} for s in stems}
    found = ready(folder)
    assert {name: set(rows) for name, rows in found.items()} == {
        f"{stem}.parquet": ids for stem, ids in own.items() if ids
    }
    both = sum(i.partition("/")[0] in stems for i in [*ids, *ids[:9]])
    assert sum(of_these for _, of_these in counts) == both
    assert set(HOSTILE) <= found["a.parquet"].keys()


def test_the_first_list_tells_the_reason_in_one_line_that_steers_nothing(tmp_path):
    folder = Folder(f"{tmp_path}/exclude")
    urls = [
        listing(tmp_path / "1.parquet", ["a/1", "a/1"], reason=["\x1b[31mred\n" + "x" * 5000, "y"]),
        listing(tmp_path / "2.parquet", ["a/1", "a/2"], reason=["a", "b"]),
    ]
    exclude_lists.part(["a"], urls, folder, "m")
    found = ready(folder)["a.parquet"]
    assert found["a/2"] == "b" and found["a/1"].startswith("\\x1b[31mred\\nxxx")
    assert len(found["a/1"]) < 1100


# ---- write


def labels(paths) -> dict[str, dict]:
    names = sorted(n for n in paths.labels.names() if n.endswith(".parquet"))
    rows = [row for name in names for row in tables.read(paths.labels.file(name)).to_pylist()]
    return {row["sample_id"]: row for row in rows}


def written(paths, *urls: str) -> dict:
    return write.run(write_settings.Config(exclude=urls), paths)


@pytest.mark.ray
def test_excluded_samples_stay_rows_and_are_in_no_tar(tmp_path, paths, ray_session):
    written(paths)
    before = labels(paths)
    ids = ["00000/d0/001", "00000/d0/002", "00000/d0/003\\xe9", "00001/d1/000"]
    reasons = pa.array(["duplicate: of a dog", "no", None, "outlier"])
    manifest = written(paths, listing(tmp_path / "bad.parquet", ids, reason=reasons))
    after = labels(paths)
    assert list(after) == list(before) and manifest["excluded"] == 4
    errors = ["duplicate: of a dog", "no", "listed in bad.parquet", "outlier"]
    for sample_id, row in before.items():
        if sample_id in ids:
            row |= {"status": "excluded", "error_message": errors[ids.index(sample_id)]}
    assert repr(after) == repr(before)  # of which NaN are some
    for stem, left in (
        ("00000", ["d0/000", "d0/004"]),
        ("00001", ["d1/001", "d1/002", "d1/003\\xe9"]),
    ):
        samples = small_run.read(tmp_path / "run" / "labeled" / f"{stem}.tar")
        assert [sample.key for sample in samples] == left
        for sample in samples:
            names = {m.suffix: m.data for m in sample.members}
            text = names.get("ratecluster.json", names["json"])
            assert json.loads(text)["ratecluster"]["status"] != "excluded"


@pytest.mark.ray
def test_a_shard_of_which_all_is_excluded_is_an_empty_tar(tmp_path, paths, ray_session):
    ids = [f"00001/d1/{i:03d}" for i in range(3)] + ["00001/d1/003\\xe9"]
    manifest = written(paths, listing(tmp_path / "bad.parquet", ids))
    assert manifest["excluded"] == 4
    assert small_run.read(tmp_path / "run" / "labeled" / "00001.tar") == []


@pytest.mark.ray
def test_what_counts_is_the_content_of_the_lists(tmp_path, paths, ray_session, monkeypatch, caplog):
    url = listing(tmp_path / "bad.parquet", ["00000/d0/001"])
    manifest = written(paths, url)
    with monkeypatch.context() as patch:
        patch.setattr(write.tasks, "results", None)
        assert written(paths, url) == manifest
    listing(tmp_path / "bad.parquet", ["00000/d0/000"])
    with caplog.at_level("INFO"):
        assert written(paths, url)["fingerprint"] != manifest["fingerprint"]
    assert "write: runs again: its input has changed" in caplog.text
    assert [i for i, row in labels(paths).items() if row["status"] == "excluded"] == [
        "00000/d0/000"
    ]
    assert written(paths)["excluded"] == 0
    assert not paths.exclude.names()
    assert all(row["status"] != "excluded" for row in labels(paths).values())


@pytest.mark.ray
def test_a_run_reads_the_digest_of_a_list_once(tmp_path, paths, ray_session, monkeypatch):
    """A list that changes in between would be recorded with another content than was used."""
    digests = iter(["first"])
    monkeypatch.setattr(exclude_lists, "digest", lambda url: next(digests))
    manifest = written(paths, listing(tmp_path / "bad.parquet", ["00000/d0/001"]))
    assert manifest["exclude"] == paths.exclude.manifest()["digests"] == ["first"]


@pytest.mark.ray
def test_ids_of_no_sample_are_told_of(tmp_path, paths, ray_session, caplog):
    ids = ["00000/d0/001", "00000/never", "other/1", "", *HOSTILE]
    manifest = written(paths, listing(tmp_path / "bad.parquet", ids))
    assert manifest["excluded"] == 1
    assert f"{len(HOSTILE) + 2} of {len(ids)} ids to exclude are of no shard" in caplog.text
    assert "1 of 2 ids to exclude are of no sample of their shard" in caplog.text
    with pytest.raises(UserError, match=r"none of 1 ids in .*is of a shard of this run"):
        written(paths, listing(tmp_path / "other.parquet", ["other/1"]))
    assert written(paths, str(tmp_path / "bad.parquet")) == manifest  # nothing was given up


@pytest.mark.ray
def test_a_run_with_excluded_samples_is_sound_until_a_table_says_otherwise(
    finished_run, tmp_path, capsys
):
    root = tmp_path / "run"
    shutil.copytree(finished_run, root)
    paths = layout.RunPaths(str(root))
    ids = [*list(labels(paths))[::7], "00001/bad-cut"]
    (tmp_path / "bad.txt").write_text("\n".join(ids))
    arguments = ["write", "--root", str(root), "--set", f"write.exclude={tmp_path}/bad.txt"]
    assert cli.invoke(arguments) == 0
    found = verify.run(paths)
    assert (found.lines, found.notes) == ([], [])
    assert {i for i, row in labels(paths).items() if row["status"] == "excluded"} == set(ids)
    assert cli.invoke(["status", "--root", str(root)]) == 0  # with the settings it was made with
    message = capsys.readouterr().out
    assert "write     done" in message
    manifest = paths.exclude.manifest()
    paths.exclude.finish("x", parts=manifest["parts"], digests=["other"])
    assert "exclude/manifest.json: is not of the lists" in "\n".join(verify.run(paths).lines)
    name = paths.exclude.file("00000.parquet")
    rows = tables.read(name)
    tables.write(name, rows.slice(1), **tables.facts(name))
    message = "\n".join(verify.run(paths).lines)
    assert "exclude/00000" in message and "status is 'excluded', not 'success'" in message
