"""Shards that were moved, touched or joined by others keep their parts; changed ones do not."""

import os
import shutil
from pathlib import Path

import pytest

from pipeline.artifacts import layout
from pipeline.embed import stage as embed
from pipeline.embed import survey
from pipeline.embed.settings import Config
from pipeline.runtime.errors import UserError
from pipeline.store import tables
from pipeline.store.listing import list_shards
from tests.embed.test_stage import embed_alone, encoder  # noqa: F401 - a fixture

CFG = Config(batch_size=16)
STEMS = ["00000", "00001"]


@pytest.fixture
def folder(tiny_shards, tmp_path) -> Path:
    """Two shards of a user, in a folder of their own."""
    return shutil.copytree(tiny_shards, tmp_path / "a")


@pytest.fixture
def paths(folder, tmp_path, encoder) -> layout.RunPaths:  # noqa: F811
    """Their finished embeddings."""
    facts, paths = embed_alone(list_shards(str(folder)), tmp_path / "run", encoder)
    finish(list_shards(str(folder)), facts, paths)
    return paths


def finish(shards, facts, paths) -> None:
    made_of = survey.fingerprint(CFG, shards)
    paths.embeddings.finish(made_of, **embed.summary(facts, CFG, 0.0))


def todo(paths, *patterns) -> tuple[list[str], list[str]]:
    """Stems of all shards, and of those that are to be embedded."""
    shards = survey.settled(list_shards([str(p) for p in patterns]), paths)
    done, left = survey.plan(CFG, shards, paths)
    assert len(done) + len(left) == len(shards)
    return [s.stem for s in shards], [s.stem for s in left]


def times(paths) -> dict[str, int]:
    """When each part was written."""
    folder = paths.embeddings
    return {name: Path(folder.file(name)).stat().st_mtime_ns for name in folder.names()}


def touch(folder: Path) -> None:
    for path in folder.iterdir():
        os.utime(path, (1, 1))


@pytest.mark.parametrize("finished", [True, False])
def test_a_touched_or_copied_folder_is_not_embedded_again(
    paths, folder, tmp_path, finished, caplog
):
    if not finished:
        paths.embeddings.remove({"manifest.json"})
    touch(folder)
    with caplog.at_level("INFO"):
        assert todo(paths, folder) == (STEMS, [])
    assert "2 shards were moved or touched; their sizes and first and last MiB are" in caplog.text
    shutil.move(folder, tmp_path / "moved")
    assert todo(paths, tmp_path / "moved") == (STEMS, [])


def test_the_manifest_follows_the_files_and_its_fingerprint_stays(paths, folder):
    before = paths.embeddings.manifest()
    touch(folder)
    listed = list_shards(str(folder))
    assert survey.if_done(CFG, listed, paths) is None
    shards = survey.settled(listed, paths)
    done, _ = survey.plan(CFG, shards, paths)
    finish(shards, done, paths)
    after = paths.embeddings.manifest()
    assert after["fingerprint"] == before["fingerprint"]
    assert [s["shard"]["now"] for s in after["shards"]] == ["1.0", "1.0"]
    again = survey.settled(list_shards(str(folder)), paths)
    assert survey.if_done(CFG, again, paths) == after


def test_a_changed_shard_of_the_same_size_is_embedded_again(paths, folder):
    path = folder / "00001.tar"
    data = bytearray(path.read_bytes())
    data[-20_000] ^= 1
    path.write_bytes(data)
    os.utime(path, (1, 1))
    touch(folder)
    assert todo(paths, folder) == (STEMS, ["00001"])


def test_a_link_to_another_file_of_equal_size_is_embedded_again(paths, folder, tmp_path):
    other = tmp_path / "other.tar"
    data = bytearray((folder / "00000.tar").read_bytes())
    data[600] ^= 1
    other.write_bytes(data)
    (folder / "00000.tar").unlink()
    (folder / "00000.tar").symlink_to(other)
    assert todo(paths, folder) == (STEMS, ["00000"])


def test_a_second_folder_with_the_same_names_leaves_the_first_alone(
    paths, folder, tmp_path, tiny_shards
):
    before = {
        n: Path(paths.embeddings.file(n)).stat().st_mtime_ns for n in paths.embeddings.names()
    }
    more = shutil.copytree(tiny_shards, tmp_path / "b")
    for path in more.iterdir():
        path.write_bytes(path.read_bytes() + bytes(10_240))  # other shards
    assert todo(paths, folder, more) == ([*STEMS, "b__00000", "b__00001"], ["b__00000", "b__00001"])
    assert times(paths) == before


def test_two_copies_of_a_folder_that_is_gone(paths, folder, tmp_path):
    """The first takes the place of the old folder, the second is new."""
    for name in ("x", "y"):
        shutil.copytree(folder, tmp_path / name)
    shutil.rmtree(folder)
    stems, left = todo(paths, tmp_path / "x", tmp_path / "y")
    assert stems == [*STEMS, "y__00000", "y__00001"] and left == stems[2:]


def test_another_folder_in_place_of_the_first_is_refused(paths, tmp_path, tiny_shards):
    other = shutil.copytree(tiny_shards, tmp_path / "c")
    for path in other.iterdir():
        path.write_bytes(path.read_bytes() + bytes(10_240))
    with pytest.raises(UserError, match="holds 2 parts of other shards with the same names"):
        todo(paths, other)


def test_parts_of_earlier_versions_have_no_digest_and_are_embedded_again(paths, folder):
    manifest = paths.embeddings.manifest()
    for shard in manifest["shards"]:
        del shard["shard"]["content"], shard["shard"]["now"]
    fingerprint = manifest.pop("fingerprint")
    paths.embeddings.finish(fingerprint, **manifest)
    assert todo(paths, folder) == (STEMS, [])
    touch(folder)
    assert todo(paths, folder) == (STEMS, STEMS)
    facts = tables.facts(paths.embeddings.file("00000.parquet"))
    assert len(facts["shard"]["content"]) == 32
