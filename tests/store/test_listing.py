"""Listing shards: every kind of pattern, on every store, and the messages about mistakes."""

import os

import fsspec
import pytest

from pipeline.runtime.errors import UserError
from pipeline.store import listing


@pytest.fixture(params=["local", "memory"])
def root(request, tmp_path):
    """A folder with 00000.tar to 00003.tar, other files, and a/, b/ with equal names."""
    url = str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}"
    files = [f"{i:05d}.tar" for i in range(4)] + ["00000.parquet", ".00009.tar"]
    for name in [*files, "a/00000.tar", "b/00000.tar", "b/c/00001.tar", "z/0.tar.gz", "y/0.jpg"]:
        with fsspec.open(f"{url}/{name}", "wb", auto_mkdir=True) as file:
            file.write(name.encode())
    return url


def stems(pattern: str) -> list[str]:
    return [shard.stem for shard in listing.list_shards(pattern)]


ALL = ["00000", "00001", "00002", "00003"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", ALL), ("/", ALL), ("/*.tar", ALL), ("/0000[12].tar", ALL[1:3]), ("/*", ALL),
        ("/{00000..00003}.tar", ALL), ("/{00001,00003}.tar", [ALL[1], ALL[3]]),
        ("/00002.tar", ["00002"]), ("/z", ["0"]), ("/z/0.tar.gz", ["0"]), ("/z/*", ["0"]),
        ("/{a,b}/*.tar", ["a__00000", "b__00000"]),
        ("/{a,b}/00000.tar", ["a__00000", "b__00000"]), ("/b/**/*.tar", ["00000", "00001"]),
        ("/{00000,a/00000,b/c/00001}.tar", ["00000", "a__00000", "b__c__00001"]),
    ],
)  # fmt: skip
def test_every_kind_of_pattern(root, pattern, expected):
    found = listing.list_shards(root + pattern)
    assert [shard.stem for shard in found] == expected
    assert [shard.url for shard in found] == sorted({shard.url for shard in found})
    for shard in found:
        with fsspec.open(shard.url, "rb") as file:
            assert len(file.read()) == shard.size
        assert shard.version


def test_list_file(root, tmp_path):
    lines = ["# shards", "", "00001.tar", " {00002..00003}.tar ", f"{root}/00001.tar", "b/*.tar"]
    with fsspec.open(f"{root}/list.txt", "wb") as file:
        file.write("\n".join(lines).encode())
    expected = ["00001", "00002", "00003", "b__00000"]
    assert [s.url for s in listing.list_shards(f"{root}/list.txt")][:3] == [
        f"{root}/{name}.tar" for name in expected[:3]
    ]
    assert len(stems(f"{root}/list.txt")) == 4


def test_relative_and_file_urls_are_the_same_shard(tmp_path, monkeypatch):
    (tmp_path / "0.tar").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "l.lst").write_text(f"0.tar\nfile://{tmp_path}/0.tar\n./0.tar\n")
    for pattern in ("0.tar", "*.tar", ".", f"file://{tmp_path}", "l.lst"):
        assert [s.url for s in listing.list_shards(pattern)] == [str(tmp_path / "0.tar")]


def test_version_changes_with_the_file(tmp_path):
    path = tmp_path / "0.tar"
    path.write_bytes(b"1")
    (before,) = listing.list_shards(str(path))
    path.write_bytes(b"22")
    os.utime(path, (1, 1))
    (after,) = listing.list_shards(str(path))
    assert before.version != after.version and (before.size, after.size) == (1, 2)


def test_a_linked_shard_has_size_and_version_of_its_target(tmp_path):
    target, link = tmp_path / "blobs" / "x", tmp_path / "0.tar"
    target.parent.mkdir()
    target.write_bytes(b"12345")
    os.utime(target, (1, 1))
    link.symlink_to(target)
    for pattern in (str(tmp_path), str(link), f"{tmp_path}/*.tar"):
        (shard,) = listing.list_shards(pattern)
        assert (shard.stem, shard.size, shard.version) == ("0", 5, "1.0")
    assert listing.current(str(link)) == (5, "1.0")
    target.write_bytes(b"54321")
    assert listing.current(str(link)) != (5, "1.0")
    target.unlink()
    for pattern in (str(tmp_path), str(link), f"{tmp_path}/*.tar"):
        with pytest.raises(UserError, match=r"0.tar is a link to .*x, which cannot be read"):
            listing.list_shards(pattern)


def test_several_patterns_and_those_that_webdataset_joins(root):
    one, two = f"{root}/00001.tar", f"{root}/a/00000.tar"
    for patterns in ([one, two], f"{one}::{two}", [f"{one}::{two}", one]):
        assert [s.url for s in listing.list_shards(patterns)] == [one, two]
    both = listing.list_shards(f"{root}/{{00001..00002}}.tar::{root}/a/*.tar")
    assert [s.stem for s in both] == ["00001", "00002", "00000"]
    for nothing in ("", " ", [], ["x.tar", ""]):
        with pytest.raises(UserError, match="--shards is empty text"):
            listing.list_shards(nothing)


def test_chained_urls_of_fsspec_are_one_pattern():
    chained = "simplecache::s3://bucket/0.tar"
    assert listing._split(chained, listing.TARS) == [chained]
    inner = "zip://0.tar::https://host/all.tar"
    assert listing._split(inner, listing.TARS) == [inner]


@pytest.mark.parametrize("name", ["photos [2020]", "a{1,2}", "a*b", "what?", "x[1].tar"])
def test_what_exists_is_taken_by_its_name(tmp_path, name):
    path = tmp_path / name
    if name.endswith(".tar"):
        path.write_bytes(b"x")
    else:
        path.mkdir()
        (path / "0.tar").write_bytes(b"x")
    assert len(listing.list_shards(str(path))) == 1


def test_suffixes_in_any_case_and_of_every_compression(tmp_path):
    names = ["0.TAR", "1.tar.gz", "2.tgz", "3.tar.zst", "4.tar.bz2", "5.tar.xz", "6.Tar.Gz"]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    assert [s.stem for s in listing.list_shards(str(tmp_path))] == list("0123456")
    assert [s.stem for s in listing.list_shards(str(tmp_path / "0.TAR"))] == ["0"]


def test_what_is_left_out_is_logged(root, caplog):
    with fsspec.open(f"{root}/more.zip", "wb") as file:
        file.write(b"x")
    listing.list_shards(root)
    assert f"{root}: 1 archives are left out: {root}/more.zip" in caplog.text
    assert f"{root}: its 4 sub-folders are not searched, and " in caplog.text
    assert f"/a has 1 shards; give {root}/**/*.tar" in caplog.text


def test_what_lies_below_the_root_of_the_run_is_no_input(tmp_path, caplog):
    for name in ("0.tar", "run/labeled/0.tar", "runner/1.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with caplog.at_level("INFO"):
        found = listing.list_shards(f"{tmp_path}/**/*.tar", f"{tmp_path}/run")
    assert [s.stem for s in found] == ["0", "1"]
    assert "1 shards below the run's folder are left out" in caplog.text
    with pytest.raises(UserError, match=r"all shards of .*labeled lie below --root"):
        listing.list_shards(f"{tmp_path}/run/labeled", f"{tmp_path}/run")


def test_folders_are_listed_once(tmp_path, monkeypatch):
    fs = fsspec.filesystem("memory")
    for i in range(30):
        fs.pipe_file(f"/{tmp_path.name}/{i:02d}.tar", b"")
    calls = []
    ls = type(fs).ls
    monkeypatch.setattr(type(fs), "ls", lambda *a, **k: (calls.append(a), ls(*a, **k))[1])
    monkeypatch.setattr(type(fs), "info", None)  # nor is any file asked for alone
    assert len(listing.list_shards(f"memory://{tmp_path.name}/{{00..29}}.tar")) == 30
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("/{00002..00009}.tar", r"6 of 8 shards .*brace pattern.*00004.tar.*00006.tar;"),
        ("/none/{0..3}.tar", r"4 of 4 shards"),
        ("/{0..3.tar", "braces"),
        ("/x*.tar", "no shard matches .*taken as a glob"),
        ("/none", "no shard matches .*taken as a folder"),
        ("/{a,x}/*.tar", r"no shard matches .*/x/\*\.tar"),
        ("/none.tar", "1 of 1 shards .*taken as one shard"),
        ("/y", "0.jpg is not a .tar"), ("/y/{0,0}.jpg", "not a .tar"),
        ("/none.txt", "list file .* cannot be read"),
    ],
)  # fmt: skip
def test_mistakes_are_named_in_one_line(root, pattern, message):
    with pytest.raises(UserError, match=message) as caught:
        listing.list_shards(root + pattern)
    assert "\n" not in str(caught.value) and root in str(caught.value)


def test_empty_lists_and_folders(tmp_path):
    (tmp_path / "l.txt").write_text("# nothing\n\n")
    with pytest.raises(UserError, match="names no shard"):
        listing.list_shards(str(tmp_path / "l.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="taken as a folder"):
        listing.list_shards(str(tmp_path / "empty"))


def test_stems_that_cannot_be_told_apart(tmp_path):
    for name in ("a/b__0.tar", "a__b/0.tar", "c/0.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match="a__b__0"):
        listing.list_shards(f"{tmp_path}/*/*.tar")


def test_http_is_asked_file_by_file(tmp_path):
    import functools
    import http.server
    import threading

    for name in ("0.tar", "1.tar"):
        (tmp_path / name).write_bytes(b"1234")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.func.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        found = listing.list_shards(f"{url}/{{0..1}}.tar?download=true")
        assert [(s.stem, s.size) for s in found] == [("0", 4), ("1", 4)]
        assert [(s.stem, s.size) for s in listing.list_shards(url)] == [("0", 4), ("1", 4)]
        with pytest.raises(UserError, match=r"1 of 3 shards .*2\.tar"):
            listing.list_shards(f"{url}/{{0..2}}.tar")
        server.shutdown()
