"""gs:// over HTTP, on the emulator of Google's store that PyPI has."""

import gcsfs
import pytest
from gcp_storage_emulator.server import create_server

from pipeline.runtime.errors import UserError
from pipeline.store import listing, lock, read_ahead, storage
from pipeline.store.storage import Folder


@pytest.fixture(scope="module")
def gcs():
    """A bucket, reached as the store's own clients reach an emulator."""
    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    server.start()
    host, port = server._api._httpd.server_address[:2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://{host}:{port}")
        gcsfs.GCSFileSystem.clear_instance_cache()
        yield "gs://bucket"
    gcsfs.GCSFileSystem.clear_instance_cache()
    server.stop()


def test_files_are_written_listed_read_ahead_and_deleted(gcs, monkeypatch):
    monkeypatch.setattr(read_ahead, "BLOCK_BYTES", 1000)
    folder, data = Folder(f"{gcs}/run"), bytes(range(256)) * 40
    for name in ("0.tar", "1.tar", "2[1].tar"):
        storage.write_bytes(folder.file(name), data)
    shards = listing.list_shards(f"{gcs}/run/*.tar")
    assert [shard.stem for shard in shards] == ["0", "1", "2[1]"]
    for shard in shards:
        assert shard.size == len(data) and shard.version
        with storage.open_read(shard.url, shard.size, shard.version) as stream:
            assert stream.read(7) + stream.read() == data
    assert storage.read_range(folder.file("0.tar"), 300, 17) == data[300:317]
    assert storage.read_tail(folder.file("0.tar"), 17) == data[-17:]
    folder.remove({"manifest.json"})  # which is not there yet
    folder.finish("f")
    assert folder.manifest() == {"fingerprint": "f"}
    folder.remove({"0.tar", "2[1].tar", "not there"})
    assert folder.names() == {"1.tar", "manifest.json"}
    folder.clear()
    assert folder.names() == set() and folder.peek() is None


def test_one_driver_at_a_time(gcs):
    """The second is refused by what it reads: the emulator knows no create-if-absent."""
    root = f"{gcs}/locked"
    with (
        lock.acquire(root, lambda: None, lambda reason: None),
        pytest.raises(UserError, match="in use by"),
    ):
        lock._take(root)
    assert lock.read(root) == (0, {"released": True})
