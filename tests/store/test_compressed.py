"""Compressed shards are read as the tars in them; damaged ones are named."""

import bz2
import gzip
import io
import lzma

import pyarrow as pa
import pytest

from pipeline.ops.verify import tar_walk
from pipeline.store import compressed
from pipeline.store.shards import ShardReader
from tests.store import broken_tars


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


PACKERS = {
    ".tar.gz": gzip.compress,
    ".tgz": gzip.compress,
    ".tar.bz2": bz2.compress,
    ".tar.xz": lzma.compress,
    ".TAR.ZST": zstd,
}
TAR = broken_tars.padded(broken_tars.bare(broken_tars.members(0, 6)))


@pytest.fixture(params=PACKERS)
def suffix(request):
    return request.param


def samples(url: str):
    with compressed.open_tar(url) as stream:
        reader = ShardReader(stream, None)
        return list(reader), reader.end


def losses(url: str) -> list[str]:
    found, end = samples(url)
    with compressed.open_tar(url) as stream:
        walked = tar_walk.walk(stream)
    return list(tar_walk.losses(walked, {s.key for s in found}, end))


def test_the_same_samples_as_of_the_tar(tmp_path, suffix):
    (tmp_path / "0.tar").write_bytes(TAR)
    path = tmp_path / f"0{suffix}"
    path.write_bytes(PACKERS[suffix](TAR))
    assert samples(str(path)) == samples(str(tmp_path / "0.tar"))
    assert samples(str(path))[1] == "complete" and not losses(str(path))
    images = [s.image() for s in samples(str(path))[0]]
    places = [(m.offset, m.size) for m in images]
    assert list(compressed.read_ranges(str(path), places)) == [m.data for m in images]
    assert compressed.read_range(str(path), *places[3]) == images[3].data


def test_joined_streams_are_read_to_the_last(tmp_path, suffix):
    path = tmp_path / f"0{suffix}"
    half = len(TAR) // 2
    path.write_bytes(PACKERS[suffix](TAR[:half]) + PACKERS[suffix](TAR[half:]))
    found, end = samples(str(path))
    assert len(found) == 6 and end == "complete"


def test_a_stream_that_is_cut_is_damage(tmp_path, suffix):
    path = tmp_path / f"0{suffix}"
    whole = PACKERS[suffix](TAR)
    for size in (0, 5, len(whole) // 2, len(whole) - 9):
        path.write_bytes(whole[:size])
        found, end = samples(str(path))
        assert "damaged at byte " in end and len(found) <= 6
        assert not losses(str(path))


def test_an_error_of_the_store_is_raised():
    class Broken(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            raise TimeoutError("the store does not answer")

    stream = compressed._Unpacked(Broken(), "gzip")
    with pytest.raises(TimeoutError, match="the store does not answer"):
        list(ShardReader(stream, None))
