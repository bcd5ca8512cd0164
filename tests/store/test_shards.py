"""Reading shards: against the webdataset library both ways, and damaged in every place."""

import io
import pickle
import random
import tarfile
from pathlib import Path

import pytest
import webdataset

from pipeline.store import samples, shards
from pipeline.store.samples import Member, MissingImage, Sample
from pipeline.store.shard_writer import labelled
from pipeline.store.shards import ShardReader
from tests.store.tars import (
    ODD,
    SMALL,
    as_dict,
    flat,
    oracle,
    read,
    sample_of,
    special,
    tar_of,
    written,
)

# ---- the same as webdataset, both ways


def test_reads_what_webdatasets_writer_wrote(tmp_path):
    path = tmp_path / "0.tar"
    with webdataset.TarWriter(str(path)) as sink:
        for i in range(20):
            sink.write({"__key__": f"d/{i:05d}", "jpg": bytes([i]) * i, "txt": f"cat {i}"})
    samples, end = read(path.read_bytes())
    assert end == "complete" and len(samples) == 20
    assert [as_dict(s) for s in samples] == oracle(path)
    assert [s.id for s in samples] == [s.key for s in samples]
    assert [s.index for s in samples] == list(range(20))


def test_webdataset_reads_what_we_wrote(tmp_path):
    path = tmp_path / "0.tar"
    path.write_bytes(written(flat()))
    theirs = oracle(path)
    assert len(theirs) == len(ODD)
    for sample, names in zip(theirs, ODD, strict=True):
        assert list(sample.values())[1:] == list(names.values())
    assert [as_dict(s) for s in read(path.read_bytes())[0]] == theirs


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_odd_names_as_webdataset_has_them_in_every_format(tmp_path, form):
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in flat():
            if form == tarfile.USTAR_FORMAT and len(name) > 100:
                continue
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    samples, end = read(path.read_bytes())
    assert end == "complete" and all(s.problem is None for s in samples)
    assert [as_dict(s) for s in samples] == oracle(path)


def test_random_names_round_trip_and_agree_with_webdataset(tmp_path):
    draw = random.Random(0)
    for trial in range(40):
        pairs, seen = [], set()
        for _ in range(draw.randrange(1, 12)):
            folder = draw.choice(["", "a/", "b.c/", "d/é/"])
            stem = "".join(draw.choices("abAB_-# 1é", k=draw.randrange(1, 130)))
            for suffix in draw.sample(["jpg", "JSON", "seg.png", "txt", "x.y.z"], k=2):
                if (name := f"{folder}{stem}.{suffix}".lower()) not in seen:
                    pairs.append((f"{folder}{stem}.{suffix}", draw.randbytes(draw.randrange(2000))))
                    seen.add(name)
        data = written(pairs)
        samples, end = read(data)
        members = [m for s in samples for m in s.members]
        assert end == "complete"
        assert [(m.name, m.data) for m in members] == pairs
        assert all(data[m.offset : m.offset + m.size] == m.data for m in members)
        (tmp_path / f"{trial}.tar").write_bytes(data)
        assert [as_dict(s) for s in samples] == oracle(tmp_path / f"{trial}.tar")


def test_what_webdataset_skips_is_skipped(tmp_path):
    path = tmp_path / "0.tar"
    names = [".hidden", "README", "__meta__/a.json", "__info__.json__", "0.jpg", "d/README"]
    path.write_bytes(tar_of(*((n, b"-") for n in names), special("e.d", tarfile.DIRTYPE)))
    samples, end = read(path.read_bytes())
    assert [as_dict(s) for s in samples] == oracle(path) == [{"__key__": "0", "jpg": b"-"}]
    assert end == "complete"


def test_hidden_files_in_folders_are_skipped():
    samples, _ = read(tar_of(("d/.DS_Store", b"-"), ("d/0.jpg", b"-"), ("d/._0.jpg", b"-")))
    assert [(s.key, len(s.members)) for s in samples] == [("d/0", 1)]


def test_the_caption_is_the_txt_else_that_of_the_json():
    assert sample_of(txt=b"a cat", json=b'{"caption": "a dog"}').caption() == "a cat"
    assert sample_of(txt=b"", json=b'{"caption": "a dog"}').caption() == "a dog"
    assert sample_of(txt=b" \n").caption() == " \n" and sample_of(txt=b"").caption() == ""
    assert sample_of(json=b'{"caption": "a \\ud83d dog"}').caption() == "a \ufffd dog"
    for text in (b'{"caption": 3}', b'{"caption": null}', b"{}", b"[]", b"{"):
        assert sample_of(json=text).caption() is None


# ---- damage


def test_no_cut_raises_and_what_is_read_is_a_prefix():
    data = tar_of(*SMALL, ("long" * 40 + ".jpg", b"pax header"))
    whole, _ = read(data)
    content = len(data.rstrip(b"\0"))
    for cut in range(0, len(data), 64):
        samples, end = read(data[:cut])
        good = [s for s in samples if s.problem is None]
        sure, last = good[:-1], good[-1:]
        assert sure == whole[: len(sure)]
        for sample in last:  # at a member boundary nothing tells that members are lacking
            full = whole[len(sure)]
            assert sample.key == full.key
            assert sample.members == full.members[: len(sample.members)]
            assert sample == full or end == "no end-of-archive marker"
        assert all(s.problem == shards.CUT_OFF for s in samples[len(good) :])
        assert len(samples) - len(good) <= 1
        if cut < content:
            assert end != "complete"
        if end == "complete":
            assert samples == whole


def test_cut_inside_a_member_keeps_the_samples_before_it():
    data = tar_of(*SMALL)
    place = data.index(bytes([1]) * 600) + 100
    samples, end = read(data[:place])
    assert [s.problem for s in samples] == [None, shards.CUT_OFF]
    assert end.startswith(f"damaged at byte {place}: ")
    (member,) = samples[1].members
    assert (member.name, member.data, member.whole) == ("001.jpg", b"", False)


def test_cut_inside_a_header_and_at_a_boundary():
    data = tar_of(*SMALL)
    header = 512 + 1024 + 512 + 512  # of 001.jpg
    samples, end = read(data[: header + 100])
    assert end.startswith(f"damaged at byte {header}: ") and len(samples) == 1
    samples, end = read(data[:header])
    assert end == "no end-of-archive marker" and [s.problem for s in samples] == [None]


def test_one_zero_block_is_an_end():
    content = tar_of(*SMALL).rstrip(b"\0")
    padded = content + b"\0" * (-len(content) % 512)
    assert read(padded)[1] == "no end-of-archive marker"
    assert read(padded + b"\0" * 512)[1] == "complete"


def test_damaged_header_in_the_middle_is_not_an_end():
    data = bytearray(tar_of(*SMALL))
    header = data.index(b"002.jpg")
    data[header + 148] ^= 0x55
    samples, end = read(bytes(data))
    assert end == f"damaged at byte {header}: bad header"
    assert [s.key for s in samples] == ["000", "001"]
    assert [s.problem for s in samples] == [None, shards.CUT_OFF]


@pytest.mark.parametrize(
    "data", [b"", b"\x89PNG\r\n" * 300, b"<html>404</html>", b"\xff" * 5000, b"x"]
)
def test_what_is_no_tar_is_damaged_at_byte_0(data):
    samples, end = read(data)
    assert samples == [] and end.startswith("damaged at byte 0: ")


def test_empty_tar_is_complete():
    assert read(tar_of()) == ([], "complete")


def test_random_bytes_written_over_a_tar_never_raise():
    draw = random.Random(1)
    data = tar_of(*flat(), special("l.jpg", tarfile.SYMTYPE, "0.jpg"))
    for _ in range(600):
        bad = bytearray(data)
        for _ in range(draw.randrange(1, 6)):
            start = draw.randrange(len(bad))
            bad[start : start + 4] = draw.randbytes(4)
        samples, end = read(bytes(bad), 1 << 20)
        assert end.startswith(("complete", "damaged at byte ", "no end-of-archive", "zeros from"))
        assert len({s.id for s in samples}) == len(samples)


def sealed(block: bytearray) -> bytes:
    """A header block with the checksum that it should have."""
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K", b"0"])
@pytest.mark.parametrize("size", [b"77777777777\0", b"\x80" + b"\x7f" * 11, b"\xff" * 12])
def test_hostile_sizes_are_damage(kind, size):
    block = bytearray(tar_of(("0.jpg", b""))[:512])
    block[124:136], block[156:157] = size, kind
    samples, end = read(sealed(block) + b"some data" * 100)
    assert end.startswith("damaged at byte ") and all(s.problem for s in samples)


def test_a_chain_of_extended_headers_is_damage():
    block = bytearray(tar_of(("0.jpg", b""))[:512])
    block[156:157] = b"x"
    assert read(sealed(block) * 5000)[1].startswith("damaged")


class Failing(io.BytesIO):
    """A store that gives up at a byte."""

    def __init__(self, data: bytes, at: int, error: Exception) -> None:
        super().__init__(data)
        self.at, self.error = at, error

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() + (size or 0) > self.at:
            raise self.error
        return super().read(size)


@pytest.mark.parametrize("error", [OSError("timed out"), tarfile.ReadError("x"), ValueError("y")])
def test_errors_of_the_store_are_raised_wherever_they_come(error):
    data = tar_of(*SMALL)
    for at in range(0, 6 * 1024, 256):
        with pytest.raises(type(error)) as caught:
            list(ShardReader(Failing(data, at, error), None))
        assert caught.value is error


def test_short_reads_are_no_end():
    class Trickle(io.BytesIO):
        def read(self, size=-1):
            return super().read(min(size, 7))

    data = tar_of(*SMALL)
    reader = ShardReader(Trickle(data), None)
    assert list(reader) == read(data)[0] and reader.end == "complete"


def test_reads_onward_only_and_keeps_no_headers():
    class Pipe:
        def __init__(self, data):
            self.inner = io.BytesIO(data)

        def read(self, size):
            return self.inner.read(size)

    reader = ShardReader(Pipe(tar_of(*SMALL)), None)
    for _ in reader:
        assert len(reader._tar.members) <= 1
    assert reader.end == "complete"


# ---- problems of one sample


def test_duplicate_keys_get_ids_that_never_collide():
    names = ["a", "b", "a", "a#2", "b", "a#2", "a", "a#2#2"]
    samples, _ = read(tar_of(*((f"{n}.jpg", b"-") for n in names)))
    assert [s.key for s in samples] == names
    assert len({s.id for s in samples}) == len(names)
    assert [s.id for s in samples][:4] == ["a", "b", "a#2", "a#2#2"]
    duplicates = [names.index(n) < i for i, n in enumerate(names)]
    assert [s.problem == "duplicate_key" for s in samples] == duplicates


def test_problems_name_their_member():
    data = tar_of(
        ("0.jpg", b"1"), ("0.JPG", b"2"),
        ("1.jpg", b"x" * 2000), ("1.txt", b"y"),
        special("2.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        special("3.jpg", tarfile.LNKTYPE, "0.jpg"),
        special("4.jpg", tarfile.CHRTYPE),
        ("../5.jpg", b"-"), ("/6.jpg", b"-"), ("a/../7.jpg", b"-"),
        ("8.jpg", b"-"),
    )  # fmt: skip
    samples, end = read(data, 1000)
    assert end == "complete"
    assert [s.problem for s in samples] == [
        "duplicate_member: jpg",
        "sample_too_large: 2000 bytes with jpg",
        "link: 2.jpg",
        "link: 3.jpg",
        "special_file: 4.jpg",
        "unsafe_name: ../5.jpg",
        "unsafe_name: /6.jpg",
        "unsafe_name: a/../7.jpg",
        None,
    ]
    large = samples[1].members[0]
    assert (large.data, large.size, large.whole) == (b"", 2000, False)
    assert samples[1].caption() == "y"


def test_a_sparse_file_is_a_problem():
    header = tarfile.TarInfo("0.jpg")
    header.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(1 << 40)}
    samples, end = read(tar_of(header, ("1.jpg", b"-")))
    assert [s.problem for s in samples] == ["sparse_file: 0.jpg", None] and end == "complete"


def test_pickles_are_bytes(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    trap = pickle.dumps(Trap())
    samples, _ = read(tar_of(*((f"0.{s}", trap) for s in ("jpg", "pkl", "pyd", "pth", "json"))))
    assert samples[0].json_text() is None
    assert samples[0].image().data == trap
    list(labelled(samples[0], {}))
    assert not (tmp_path / "sprung").exists()


# ---- what a sample says


def test_image_is_the_exact_suffix_first():
    assert sample_of(seg__jpg=b"1", txt=b"", PNG=b"2", webp=b"3").image().data == b"2"
    assert sample_of(txt=b"", seg__jpg=b"1").image().suffix == "seg.jpg"
    with pytest.raises(MissingImage, match=r"^missing_image: only txt, jpgs$"):
        sample_of(txt=b"", jpgs=b"").image()
    with pytest.raises(MissingImage, match=r"^ambiguous_image: v1\.jpg, v2\.jpg$"):
        sample_of(v1__jpg=b"1", v2__jpg=b"2").image()


def test_caption_drops_what_cannot_be_stored():
    assert sample_of(jpg=b"").caption() is None
    assert sample_of(txt=b"a\0b \xff\xc3\xa9").caption() == "ab \ufffdé"


@pytest.mark.parametrize("bad", [b"", b"[1]", b"1", b"{", b'{"a": "\xff"}', b"[" * 100_000])
def test_bad_json_is_none(bad):
    sample = sample_of(jpg=b"", json=bad)
    assert sample.json_text() is None


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_texts_of_every_encoding_that_names_itself(encoding):
    sample = sample_of(txt="ein Häuschen".encode(encoding), json='{"a": "ä"}'.encode(encoding))
    assert sample.caption() == "ein Häuschen" and sample.values == {"a": "ä"}
    assert sample.json_text() == '{"a": "ä"}' and sample.text_problem() is None


@pytest.mark.parametrize("mark", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_byte_orders(mark):
    sample = sample_of(txt="\ufeffHäuschen".encode(mark), json='\ufeff{"a": 1}'.encode(mark))
    assert (sample.caption(), sample.values) == ("Häuschen", {"a": 1})


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"json": '{"a": "ä"}'.encode("latin-1")}, "json: not UTF-8"),
        ({"json": b"[1, 2]"}, "json: not an object"),
        ({"json": b'"text"'}, "json: not an object"),
        ({"json": b'{"a": 1}\n{"a": 2}\n'}, "json: not valid"),
        ({"json": b"{'a': 1}"}, "json: not valid"),
        ({"json": b" \n"}, "json: empty"),
        ({"json": b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}"}, samples.TOO_DEEP),
        ({"json": b"[" * 100_000}, samples.TOO_DEEP),
        ({"json": b" " * (1 << 20) + b"{}"}, "json: more than 1,048,576 bytes"),
        ({"txt": "ä".encode("latin-1")}, "txt: not UTF-8"),
        ({"txt": "ä".encode("utf-16-le")}, "txt: not UTF-8"),
        ({"txt": b"x" * (1 << 20) + b"y"}, "txt: cut after 1,048,576 bytes"),
        ({"txt": b"\xff", "json": b"{"}, "txt: not UTF-8; json: not valid"),
        ({"txt": b"a cat", "json": b"{}"}, None),
        ({"jpg": b""}, None),
    ],
)
def test_texts_that_cannot_be_read_are_named(files, problem):
    assert sample_of(**files).text_problem() == problem


def test_json_text_is_the_text():
    text = b' {"b": 1e-05, "a": "\\u00e9"}\n'
    assert sample_of(json=text).json_text() == text.decode()
    assert sample_of(json=text).json_text() is not None
    assert sample_of(jpg=b"").json_text() is None


@pytest.mark.parametrize(("depth", "kept"), [(10, True), (60, True), (80, False), (100_000, False)])
def test_deeply_nested_json_is_no_json(depth, kept):
    text = '{"a": ' + "[" * depth + "]" * depth + "}"
    member = Member("x.json", "json", 0, len(text), text.encode())
    sample = Sample("x", "x", 0, (member,), None)
    assert (sample.json_text() == text) is kept
    assert (sample.json_text() is not None) is kept
