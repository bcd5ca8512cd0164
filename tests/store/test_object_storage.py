"""S3 over HTTP as clusters meet it: large files, many keys, slow answers, SlowDown."""

import os
import signal
import subprocess
import sys
import threading
import time

import pyarrow as pa
import pytest
import s3fs
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends

from pipeline.store import listing, read_ahead, storage, tables
from pipeline.store.read_ahead import AHEAD
from pipeline.store.retry import ExhaustedError
from pipeline.store.storage import Folder
from tests.store import test_storage
from tests.store.slow_s3 import client

slow_s3, s3, waits = test_storage.slow_s3, test_storage.s3, test_storage.waits


@pytest.fixture
def impatient(monkeypatch, waits):
    """Neither the client nor s3fs tries again, so that our own waits are seen."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    yield waits
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def folder(s3, tmp_path):
    """An empty folder of the bucket; at its end no thread still reads ahead."""
    yield Folder(f"{s3}/{tmp_path.name}")
    until(lambda: not [t for t in threading.enumerate() if t.name.startswith("ahead")])


def until(condition) -> None:
    end = time.monotonic() + 300  # it hangs
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def uploads(server) -> list:
    """Multipart uploads that were begun and neither completed nor given up."""
    return client(server.url).list_multipart_uploads(Bucket="bucket").get("Uploads", [])


# ---- large files


def test_a_large_file_goes_up_in_parts(slow_s3, folder):
    data = os.urandom(1 << 20) * 101  # s3fs sends less than 100 MiB in one request
    storage.write_bytes(folder.file("x"), data)
    assert (slow_s3.asked["PART"], slow_s3.asked["COMPLETE"], slow_s3.asked["PUT"]) == (3, 1, 0)
    assert storage.read_bytes(folder.file("x")) == data
    assert uploads(slow_s3) == []


def test_a_page_is_put_as_one(slow_s3, folder):
    """A browser shows what is text/html, and downloads what has no type."""
    key = folder.file("index.html").removeprefix("s3://bucket/")
    storage.write_bytes(folder.file("index.html"), b"<!doctype html>")
    head = client(slow_s3.url).head_object(Bucket="bucket", Key=key)
    assert head["ContentType"] == "text/html"


def test_an_upload_that_fails_leaves_nothing(slow_s3, folder, impatient, monkeypatch):
    monkeypatch.setattr(s3fs.core, "calculate_chunksize", lambda size, chunksize: 5 << 20)
    slow_s3.refuses = lambda kind, number: kind == "PART" and number > 1
    with pytest.raises(ExhaustedError, match=f"{folder.url}/x: .*reduce your request rate"):
        storage.write_bytes(folder.file("x"), bytes(11 << 20))
    assert folder.names() == set() and uploads(slow_s3) == []


def test_a_writer_that_is_killed_leaves_no_object(slow_s3, folder):
    code = "import sys; from pipeline.store import storage; storage.write_bytes(sys.argv[1], "
    command = [sys.executable, "-c", f"{code}bytes(101 << 20))", folder.file("x")]
    slow_s3.refuses = lambda kind, number: kind == "PART"
    writer = subprocess.Popen(command)
    until(lambda: slow_s3.asked["PART"] > 2)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    slow_s3.calm()
    assert folder.names() == set() and not storage.exists(folder.file("x"))
    assert len(uploads(slow_s3)) == 1  # of which a rule of the bucket has to rid it


# ---- SlowDown


def test_clients_wait_by_themselves(slow_s3, folder, waits):
    slow_s3.refuses = lambda kind, number: number == 1
    storage.write_bytes(folder.file("0.tar"), b"data")
    (shard,) = listing.list_shards(folder.url)
    with storage.open_read(shard.url, shard.size, shard.version) as stream:
        assert stream.read() == b"data"
    assert slow_s3.asked["PUT"] == slow_s3.asked["GET"] == slow_s3.asked["LIST"] == 2
    assert waits == []


def test_everything_waits_for_a_store_that_asks_for_it(slow_s3, folder, impatient):
    slow_s3.refuses = lambda kind, number: number == 1
    folder.finish("f")
    storage.write_bytes(folder.file("0.tar"), b"data")
    assert folder.manifest() == {"fingerprint": "f"} and storage.exists(folder.file("0.tar"))
    (shard,) = listing.list_shards(folder.url)
    with storage.open_read(shard.url, shard.size, shard.version) as stream:
        assert stream.read() == b"data"
    folder.clear()
    assert folder.names() == set()
    assert impatient.count(1) >= 4 and set(impatient) <= {1, 2}


USES = {
    "reading": lambda folder: storage.read_bytes(folder.file("0.tar")),
    "reading ahead": lambda folder: storage.open_read(folder.file("0.tar"), 4).read(),
    "writing": lambda folder: storage.write_bytes(folder.file("0.tar"), b"data"),
    "listing": lambda folder: folder.names(),
    "listing shards": lambda folder: listing.list_shards(folder.url),
    "looking up": lambda folder: listing.current(folder.file("0.tar")),
    "tables": lambda folder: tables.read(folder.file("0.tar")),
    "deleting": lambda folder: folder.remove({"0.tar"}),
}


@pytest.mark.parametrize("use", USES)
def test_a_store_that_goes_on_refusing_is_named_with_the_remedy(slow_s3, folder, impatient, use):
    slow_s3.refuses = lambda kind, number: True
    with pytest.raises(ExhaustedError) as caught:
        storage.retry(lambda: USES[use](folder))  # as embed and write do around a shard
    message = str(caught.value)
    assert message.startswith(folder.url)  # an answer to HEAD has no text of its own
    assert "reduce your request rate" in message or "Service Unavailable" in message
    assert (
        "tried 4 times" in message
        and "embed.decode_cpus" in message
        and message.count("s3://") == 1
    )
    assert slow_s3.asked.total() == 4 and impatient == [1, 2, 4]


# ---- many keys


def put_many(folder: Folder, count: int) -> None:
    """Shards, made without HTTP."""
    backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
    for number in range(count):
        key = folder.file(f"{number:05d}.tar").removeprefix("s3://bucket/")
        backend.put_object("bucket", key, b"x")


@pytest.fixture(scope="module")
def many(slow_s3):
    """A folder of 10,000 shards."""
    put_many(Folder("s3://bucket/many"), 10_000)
    return "s3://bucket/many"


@pytest.mark.parametrize("pattern", ["", "/*.tar", "/{00000..09999}.tar"])
def test_many_keys_are_listed_a_thousand_at_once(slow_s3, s3, many, pattern):
    found = listing.list_shards(many + pattern)
    assert [shard.stem for shard in found] == [f"{number:05d}" for number in range(10_000)]
    assert all(shard.size == 1 and shard.version for shard in found)
    assert slow_s3.asked["LIST"] <= 11 and slow_s3.asked.total() <= 12


def test_many_keys_are_deleted_a_thousand_at_once(slow_s3, folder):
    put_many(folder, 1500)
    folder.remove({f"{number:05d}.tar" for number in range(1, 1500)})
    assert dict(slow_s3.asked) == {"LIST": 3, "BULK-DELETE": 2}
    assert folder.names() == {"00000.tar"}


def test_what_may_not_be_deleted_is_told(slow_s3, folder, impatient):
    """S3 says so for each key, in an answer that is no error, and s3fs drops it."""
    storage.write_bytes(folder.file("a"), b"")
    slow_s3.replies["BULK-DELETE"] = (
        b"<DeleteResult><Error><Key>a</Key><Code>AccessDenied</Code></Error></DeleteResult>"
    )
    with pytest.raises(OSError, match="1 of 1 files could not be deleted, the first: a; check"):
        folder.remove({"a"})


# ---- reading ahead


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(read_ahead, "BLOCK_BYTES", 1000)


def put(folder: Folder, data: bytes) -> listing.Shard:
    storage.write_bytes(folder.file("0.tar"), data)
    return listing.list_shards(folder.file("0.tar"))[0]


@pytest.mark.parametrize("size", [1, 999, 1000, 1001, 4000, 12345])
@pytest.mark.parametrize("piece", [300, 1000, 5000, -1])
def test_bytes_come_in_order(slow_s3, folder, small_blocks, size, piece):
    data = os.urandom(size)
    shard = put(folder, data)
    slow_s3.calm()
    with storage.open_read(shard.url, shard.size, shard.version) as stream:
        first = stream.read(7)
        assert first + b"".join(iter(lambda: stream.read(piece), b"")) == data
    assert dict(slow_s3.asked) == {"GET": -(-size // 1000)}  # no HEAD


def test_http_with_ranges_is_read_ahead_too(slow_s3, folder, small_blocks):
    data = os.urandom(5500)
    key = put(folder, data).url.removeprefix("s3://bucket/")
    client(slow_s3.url).put_object_acl(Bucket="bucket", Key=key, ACL="public-read")
    slow_s3.calm()
    with storage.open_read(f"{slow_s3.url}/bucket/{key}", len(data)) as stream:
        assert stream.read() == data
    assert slow_s3.asked["GET"] >= 6


def test_blocks_are_under_way_before_they_are_wanted_and_no_more(slow_s3, folder, small_blocks):
    shard = put(folder, os.urandom(20_000))
    slow_s3.calm()
    with storage.open_read(shard.url, shard.size, shard.version) as stream:
        until(lambda: slow_s3.asked["GET"] == AHEAD)
        time.sleep(0.1)
        assert slow_s3.asked["GET"] == AHEAD
        stream.read(10)
        until(lambda: slow_s3.asked["GET"] > AHEAD)
    until(lambda: not [t for t in threading.enumerate() if t.name.startswith("ahead")])
    assert slow_s3.asked["GET"] < 20


def test_a_file_that_changed_since_it_was_listed_is_told(slow_s3, folder, small_blocks):
    shard = put(folder, b"a" * 5000)
    put(folder, b"b" * 5000)
    with (
        storage.open_read(shard.url, shard.size, shard.version) as stream,
        pytest.raises(OSError, match=f"{shard.url} has changed since it was listed; run again"),
    ):
        stream.read()


def test_a_file_that_is_shorter_than_listed_is_told(folder, small_blocks, waits):
    shard = put(folder, bytes(1500))
    with (
        storage.open_read(shard.url, 3500) as stream,
        pytest.raises(OSError, match=f"{shard.url} ended after 1500 of 3500 bytes"),
    ):
        stream.read()


def test_a_file_that_has_gone_is_told(slow_s3, folder, waits):
    shard = put(folder, b"data")
    folder.clear()
    with (
        storage.open_read(shard.url, shard.size, shard.version) as stream,
        pytest.raises(FileNotFoundError),
    ):
        stream.read()
    assert waits == []


# ---- what others write


def test_a_listing_is_not_believed_for_long(slow_s3, folder):
    """Other processes write: neither size nor ETag may come from a listing of before."""
    shard = put(folder, b"first")
    folder.names()
    client(slow_s3.url).put_object(
        Bucket="bucket", Key=shard.url.removeprefix("s3://bucket/"), Body=b"the second one"
    )
    with storage.open_read(shard.url) as stream:
        assert stream.read() == b"the second one"
    assert listing.current(shard.url)[0] == 14


@pytest.mark.parametrize(("length", "requests"), [(10, 1), (200_000, 2)])
def test_facts_of_a_part_cost_no_head(slow_s3, folder, length, requests):
    url = folder.file("0.parquet")
    tables.write(url, pa.table({"n": list(range(50_000))}), text="é" * length)
    slow_s3.calm()
    assert tables.facts(url) == {"text": "é" * length}
    assert dict(slow_s3.asked) == {"GET": requests}
