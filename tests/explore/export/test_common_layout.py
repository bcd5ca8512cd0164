"""What all exports promise: of whole runs alone, nothing overwritten, nothing done twice."""

import json
import shutil
import threading
from pathlib import Path

import pytest

from pipeline.artifacts import layout
from pipeline.cli import main as cli
from pipeline.explore.export import clip_retrieval as export_clip_retrieval
from pipeline.explore.export import coco as export_coco
from pipeline.explore.export import common_layout
from pipeline.explore.export import fiftyone as export_fiftyone
from pipeline.runtime.errors import UserError
from pipeline.store import storage
from tests import fake_run, labelled_run

EXPORTS = {
    "clip-retrieval": export_clip_retrieval.run,
    "coco": export_coco.run,
    "fiftyone": lambda paths, out: export_fiftyone.run(paths, out, None),
}
OUT = {"clip-retrieval": "out", "coco": "out.json", "fiftyone": "out"}
every_export = pytest.mark.parametrize("name", EXPORTS)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return labelled_run.build(tmp_path_factory.mktemp("labelled"))


@pytest.fixture
def paths(built, tmp_path):
    """A copy that may be changed."""
    shutil.copytree(built.root, tmp_path / "run")
    return layout.RunPaths(str(tmp_path / "run"))


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    """All files below, with their bytes and times; the one file of an export of one."""
    found = [folder] if folder.is_file() else [p for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in found}


@every_export
def test_the_command_line_knows_it(built, tmp_path, name):
    out = tmp_path / OUT[name]
    assert cli.invoke(["export", name, "--root", built.root, "--out", str(out)]) == 0
    assert files(out)


@every_export
def test_a_second_time_nothing_is_written(built, tmp_path, name, caplog):
    out = tmp_path / OUT[name]
    EXPORTS[name](built, str(out))
    before = files(out)
    caplog.set_level("INFO")
    EXPORTS[name](built, str(out))
    assert files(out) == before
    assert "already done" in caplog.text


@every_export
def test_what_lies_there_and_is_something_else_is_refused(paths, tmp_path, name):
    out = tmp_path / OUT[name]
    if name == "coco":
        out.write_text('{"info": {"ratecluster": "mine"}}')
    else:
        out.mkdir()
        (out / "manifest.json").write_text('{"fingerprint": "mine"}')
    before = files(out)
    with pytest.raises(UserError, match="choose another --out"):
        EXPORTS[name](paths, str(out))
    assert files(out) == before


@every_export
def test_an_export_of_the_run_as_it_was_is_refused(paths, tmp_path, name):
    out = tmp_path / OUT[name]
    EXPORTS[name](paths, str(out))
    before = files(out)
    paths.labels.finish("labels-2", upstream="captions-1")
    with pytest.raises(UserError, match="as it is now"):
        EXPORTS[name](paths, str(out))
    assert files(out) == before


@every_export
def test_labels_are_there_and_of_these_captions(paths, tmp_path, name):
    paths.labels.finish("labels-1", upstream="captions-0")
    with pytest.raises(UserError, match="ratecluster write"):
        EXPORTS[name](paths, str(tmp_path / OUT[name]))
    paths.labels.remove({"manifest.json"})
    with pytest.raises(UserError, match="labels is not finished"):
        EXPORTS[name](paths, str(tmp_path / OUT[name]))
    assert not (tmp_path / OUT[name]).exists()


@every_export
def test_an_interrupted_export_goes_on(paths, tmp_path, name):
    """The second part cannot be read at first; then all is as without the mishap."""
    out, whole = tmp_path / OUT[name], tmp_path / "whole" / OUT[name]
    EXPORTS[name](paths, str(whole))
    second = Path(paths.labels.file("00001.parquet"))
    data = second.read_bytes()
    second.unlink()
    with pytest.raises(FileNotFoundError):
        EXPORTS[name](paths, str(out))
    assert not (out / "manifest.json").exists() and not out.is_file()
    second.write_bytes(data)
    before = files(out) if out.exists() else {}
    EXPORTS[name](paths, str(out))
    after, expected = files(out), files(whole)
    assert after.keys() == expected.keys()
    for file in after.keys() - {"manifest.json"}:  # which has the seconds
        assert after[file][0] == expected[file][0], file
    kept = [file for file in before if file.startswith(("data/00000", "metadata/metadata_0"))]
    assert len(kept) == {"clip-retrieval": 1, "coco": 0, "fiftyone": 15}[name]
    assert all(after[file] == before[file] for file in kept)


def test_claims_that_are_not_ours(built, tmp_path):
    for text in ("", "[]", "{}", "[1", '"made_of"'):
        (tmp_path / "export.json").write_text(text)
        with pytest.raises(UserError, match="choose another --out"):
            export_clip_retrieval.run(built, str(tmp_path))


def test_names_of_clusters_are_unique_and_in_order():
    captions = ["a", "b", None, "a", "a (0)"]
    rows = [{"cluster_id": i, "cluster_caption": c} for i, c in enumerate(captions)]
    names = [row["name"] for row in common_layout.name_clusters(rows[::-1])]
    assert names == ["a (0) (0)", "b", "cluster", "a (3)", "a (0)"]


def test_file_names_take_nothing_from_the_tar_but_a_known_suffix():
    assert common_layout.file_name("00001", 7, "../../etc/x.SEG.JPG") == "00001/00000007.jpg"
    for member in ("x.html", "x.png/../y", "jpg/", "x.p\x00ng", ""):
        with pytest.raises(RuntimeError, match="of the kind"):
            common_layout.file_name("00001", 7, member)


def test_in_order_holds_no_more_than_a_few():
    lock, begun, taken = threading.Lock(), [], 0

    def work(item: int) -> int:
        with lock:
            begun.append(item)
        return item

    for item in common_layout.in_order(work, iter(range(100))):
        assert item == taken
        assert max(begun) < taken + common_layout.AHEAD
        taken += 1
    assert taken == 100


def test_an_error_of_a_part_is_raised():
    with pytest.raises(ZeroDivisionError):
        list(common_layout.in_order(lambda i: 1 // (i - 3), range(100)))


@pytest.mark.parametrize("name", ["clip-retrieval", "coco"])
def test_object_stores(built, tmp_path, name):
    """The same bytes in any store that fsspec knows, but for the seconds in the manifest."""
    EXPORTS[name](built, str(tmp_path / OUT[name]))
    url = f"memory://{tmp_path.name}/{OUT[name]}"
    EXPORTS[name](built, url)
    for file, (data, _) in files(tmp_path / OUT[name]).items():
        if file != "manifest.json":
            assert storage.read_bytes(f"{url}/{file}" if file != "." else url) == data
    EXPORTS[name](built, url)  # done already


def test_rejected_samples_are_left_out(built, tmp_path):
    export_coco.run(built, str(tmp_path / "a.json"))
    ids = {i["sample_id"] for i in json.loads((tmp_path / "a.json").read_text())["images"]}
    assert len(ids) == 2 * fake_run.PER_SHARD
    assert ids == {row["sample_id"] for row in labelled_run.rows(built)}
