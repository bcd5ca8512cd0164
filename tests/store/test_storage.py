"""Storage: whole or absent, on a local disk, in memory, and on S3 over HTTP."""

import errno
import json
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import fsspec
import pytest
import s3fs
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.runtime.errors import UserError
from pipeline.store import retry, storage
from pipeline.store.storage import Folder
from tests.store.slow_s3 import SlowS3, environment


@pytest.fixture(scope="module")
def slow_s3():
    """A server with a bucket, reached as a user would reach theirs."""
    with SlowS3() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in environment(server.url).items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield server
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def s3(slow_s3):
    """The bucket on an S3 server of our own, without any fault yet."""
    slow_s3.calm()
    yield "s3://bucket"
    slow_s3.calm()


@pytest.fixture(params=["local", "memory", "s3"])
def root(request, tmp_path, monkeypatch):
    """An empty place on each store; temporary files go to a folder of the test's own."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    if request.param == "local":
        return str(tmp_path / "data")
    if request.param == "memory":
        return f"memory://{tmp_path.name}"
    return f"{request.getfixturevalue('s3')}/{tmp_path.name}"


def everything(url: str) -> list[str]:
    """Names of all files below, hidden ones too."""
    fs, path = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    return sorted(name.rpartition("/")[2] for name in fs.find(path)) if fs.exists(path) else []


def scratch(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "scratch").iterdir())


# ---- commit


def test_a_file_appears_whole_at_the_end_of_the_block(root, tmp_path):
    url = f"{root}/a/b.bin"
    with storage.commit(url) as file:
        file.write(b"x" * 100_000)
        file.flush()
        assert not storage.exists(url) and "b.bin" not in everything(root)
        file.write(b"end")
    assert storage.read_bytes(url) == b"x" * 100_000 + b"end"
    assert everything(root) == ["b.bin"] and scratch(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_failed_block_leaves_nothing_and_keeps_what_was_there(root, tmp_path, error):
    def fail(url):
        with pytest.raises(error, match="stop"), storage.commit(url) as file:
            file.write(b"half")
            raise error("stop")

    fail(f"{root}/new.bin")
    assert everything(root) == [] and not storage.exists(f"{root}/new.bin")
    storage.write_bytes(f"{root}/old.bin", b"old")
    fail(f"{root}/old.bin")
    assert storage.read_bytes(f"{root}/old.bin") == b"old"
    assert everything(root) == ["old.bin"] and scratch(tmp_path) == []


def test_a_commit_replaces(root):
    for data in (b"a much longer first one", b"2"):
        storage.write_bytes(f"{root}/x", data)
        assert storage.read_bytes(f"{root}/x") == data


def test_threads_do_not_spoil_each_other(root, tmp_path):
    barrier = threading.Barrier(8)

    def work(n: int) -> str:
        try:
            with storage.commit(f"{root}/{n}") as file:
                file.write(b"%d" % n)
                barrier.wait(10)
                if n % 2:
                    raise RuntimeError(f"number {n}")
            return "done"
        except RuntimeError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        message = list(pool.map(work, range(8)))
    assert message == [f"number {n}" if n % 2 else "done" for n in range(8)]
    assert everything(root) == ["0", "2", "4", "6"] and scratch(tmp_path) == []
    assert [storage.read_bytes(f"{root}/{n}") for n in (0, 2, 4, 6)] == [b"0", b"2", b"4", b"6"]


def test_the_last_of_many_writers_of_one_file_wins_whole(root):
    url = f"{root}/same"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: storage.write_bytes(url, bytes([n]) * 50_000), range(8)))
    data = storage.read_bytes(url)
    assert len(data) == 50_000 and len(set(data)) == 1 and everything(root) == ["same"]


def test_a_put_that_fails_on_the_way_is_tried_again(tmp_path, monkeypatch, waits):
    fs = fsspec.filesystem("memory")
    put, calls = type(fs).put_file, []

    def flaky(self, *args, **kwargs):
        calls.append(args)
        if len(calls) < 3:
            raise ConnectionResetError
        return put(self, *args, **kwargs)

    monkeypatch.setattr(type(fs), "put_file", flaky)
    storage.write_bytes(f"memory://{tmp_path.name}/x", b"1")
    assert storage.read_bytes(f"memory://{tmp_path.name}/x") == b"1"
    assert len(calls) == 3 and waits == [1, 2]


# ---- reading


def test_reading(root):
    data = bytes(range(256)) * 40
    storage.write_bytes(f"{root}/x", data)
    assert storage.read_range(f"{root}/x", 300, 17) == data[300:317]
    assert storage.read_range(f"{root}/x", 0, 10**6) == data
    with storage.open_read(f"{root}/x") as file:
        assert file.read(5) + file.read() == data
    assert storage.exists(f"{root}/x") and not storage.exists(f"{root}/y")
    for read in (storage.read_bytes, storage.open_read):
        with pytest.raises(FileNotFoundError):
            read(f"{root}/y")


# ---- retry


@pytest.fixture
def waits(monkeypatch):
    """The waits that were asked for, none of them waited."""
    asked: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", asked.append)
    return asked


def failing(*errors: Exception):
    """An operation that raises these one after the other, then is done; and its calls."""
    left, calls = list(errors), []

    def operation() -> str:
        calls.append(1)
        if left:
            raise left.pop(0)
        return "done"

    return operation, calls


@pytest.mark.parametrize("error", [TimeoutError(), ConnectionError(), OSError(errno.EIO, "x")])
def test_errors_that_pass_are_tried_again_with_longer_waits(waits, error):
    operation, calls = failing(error, error, error)
    assert storage.retry(operation) == "done"
    assert len(calls) == retry.ATTEMPTS == 4 and waits == [1, 2, 4]


def test_errors_that_stay_are_raised_in_the_end(waits):
    errors = [OSError(f"number {n}") for n in range(9)]
    operation, calls = failing(*errors)
    with pytest.raises(OSError, match="number 3"):
        storage.retry(operation)
    assert len(calls) == 4 and waits == [1, 2, 4]


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(), PermissionError(), IsADirectoryError(), NotADirectoryError(),
        FileExistsError(), OSError(errno.ENOSPC, "full"), OSError(errno.EDQUOT, "quota"),
        OSError(errno.EROFS, "read only"), ValueError(), KeyboardInterrupt(),
    ],
    ids=repr,
)  # fmt: skip
def test_final_errors_are_raised_at_once(waits, error):
    operation, calls = failing(error)
    with pytest.raises(type(error)) as caught:
        storage.retry(operation)
    assert caught.value is error and len(calls) == 1 and waits == []


# ---- folders


def is_done(folder: Folder, fingerprint: str) -> bool:
    return (folder.peek() or {}).get("fingerprint") == fingerprint


def test_a_folder_is_done_when_its_manifest_says_so(root):
    folder = Folder(f"{root}/stage")
    assert folder.names() == set() and folder.peek() is None and not is_done(folder, "f1")
    with pytest.raises(UserError, match="stage is not finished"):
        folder.manifest()
    storage.write_bytes(folder.file("part"), b"1")
    assert folder.names() == {"part"} and not is_done(folder, "f1")
    folder.finish("f1", rows=3, name="é")
    assert folder.manifest() == {"fingerprint": "f1", "rows": 3, "name": "é"}
    assert is_done(folder, "f1") and not is_done(folder, "f2")
    folder.finish("f2")
    assert is_done(folder, "f2") and not is_done(folder, "f1")
    assert folder.names() == {"part", "manifest.json"}


def test_what_killed_writers_left_goes_when_the_stage_is_done(root):
    folder = Folder(f"{root}/stage")
    for name in (".part.parquet.partial-0a", "part.parquet", ".mine", "x.partial-y"):
        storage.write_bytes(folder.file(name), b"1")
    folder.finish("f1")
    assert folder.names() == {"part.parquet", ".mine", "x.partial-y", "manifest.json"}


def test_facts_that_are_no_json_leave_the_old_manifest(root):
    folder = Folder(f"{root}/stage")
    folder.finish("f1")
    with pytest.raises(TypeError):
        folder.finish("f2", odd=object())
    assert folder.manifest() == {"fingerprint": "f1"}


def test_removing_and_clearing(root):
    folder, other = Folder(f"{root}/stage"), Folder(f"{root}/stage2")
    for name in ("a", "b", "c"):
        storage.write_bytes(folder.file(name), b"")
    storage.write_bytes(other.file("a"), b"")
    folder.finish("f")
    folder.remove({"a", "not there"})
    assert folder.names() == {"b", "c", "manifest.json"} and is_done(folder, "f")
    folder.clear()
    assert folder.names() == set() and not is_done(folder, "f")
    folder.clear()
    assert other.names() == {"a"}


def test_the_manifest_goes_first(tmp_path, monkeypatch):
    """Else a folder that was half removed would look finished."""
    folder = Folder(f"memory://{tmp_path.name}")
    for name in ("a", "z"):
        storage.write_bytes(folder.file(name), b"")
    folder.finish("f")
    fs = fsspec.filesystem("memory")
    rm, removed = type(fs).rm_file, []

    def spy(self, path):
        removed.append(path.rpartition("/")[2])
        return rm(self, path)

    monkeypatch.setattr(type(fs), "rm_file", spy)
    folder.clear()
    assert removed[0] == "manifest.json" and sorted(removed) == ["a", "manifest.json", "z"]


def test_names_are_no_patterns(root):
    folder = Folder(f"{root}/stage")
    for name in ("a1", "a[1]", "b"):
        storage.write_bytes(folder.file(name), b"")
    folder.remove({"a[1]", "b*"})
    assert folder.names() == {"a1", "b"}


def test_a_manifest_is_json_a_person_can_read(tmp_path):
    Folder(str(tmp_path)).finish("f", b="ü", a=1)
    text = (tmp_path / "manifest.json").read_text(encoding="utf-8")
    assert text == '{\n "a": 1,\n "b": "ü",\n "fingerprint": "f"\n}'
    assert json.loads(text)["a"] == 1


# ---- places


def test_check_writable_leaves_nothing(root, tmp_path):
    storage.check_writable(f"{root}/new/deep/run")
    assert everything(root) == [] and scratch(tmp_path) == []
    assert not (tmp_path / "data").exists()
    storage.write_bytes(f"{root}/there/x", b"")
    storage.check_writable(f"{root}/there")
    assert everything(root) == ["x"]


def test_a_path_below_a_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("mine")
    for below in ("file", "file/run", "file/deep/run"):
        with pytest.raises(UserError, match=f"{below} cannot be written: ") as caught:
            storage.check_writable(str(tmp_path / below))
        assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_bucket_that_is_not_there_is_refused_in_one_line(s3):
    with pytest.raises(UserError, match="no-such-bucket/run cannot be written: ") as caught:
        storage.check_writable("s3://no-such-bucket/run")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["nosuch://x/y", "nosuch://x"])
def test_unknown_stores_are_named(url):
    for use in (storage.check_writable, storage.read_bytes, lambda url: Folder(url).names()):
        with pytest.raises(UserError, match=f"{url}.*Protocol not known: nosuch"):
            use(url)


def test_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("a/b") == str(tmp_path / "a" / "b")
    assert storage.absolute("/a/b/") == "/a/b"
    assert storage.absolute("~/x") == str(Path.home() / "x")
    assert storage.absolute("s3://b/k/") == "s3://b/k"


class OneAtATime(MemoryFileSystem):
    """A store whose client deletes one path at a time, as those of hf:// and hdfs:// do."""

    protocol = "oneatatime"

    def rm(self, path, recursive=False, maxdepth=None):
        raise TypeError(f"expected a string, got {path!r}")


def test_files_go_from_a_store_that_deletes_one_at_a_time():
    fsspec.register_implementation("oneatatime", OneAtATime, clobber=True)
    folder = Folder("oneatatime://run/clusters")
    for name in ("manifest.json", "a.parquet", "b.parquet"):
        storage.write_bytes(folder.file(name), b"x")
    folder.remove({"a.parquet", "never there"})
    assert folder.names() == {"manifest.json", "b.parquet"}
    folder.clear()
    assert not folder.names()


class Whole(BaseHTTPRequestHandler):
    """A server that gives files as a whole alone."""

    data = bytes(range(256)) * 40_000  # more than two blocks

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.data)))
        self.send_header("Accept-Ranges", "none")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(self.data)

    def do_HEAD(self):
        self.do_GET()

    def log_message(self, *_):
        pass


def test_a_server_without_ranges_is_read_once_from_start_to_end():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Whole)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/x.tar"
    try:
        with storage.open_read(url, len(Whole.data)) as stream:
            found = b"".join(iter(lambda: stream.read(1 << 20), b""))
    finally:
        server.shutdown()
        server.server_close()
    assert found == Whole.data
