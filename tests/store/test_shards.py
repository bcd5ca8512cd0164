"""Shards: against the webdataset library both ways, damaged in every place, and listed."""

import io
import json
import os
import pickle
import random
import tarfile
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import webdataset

from pipeline.errors import UserError
from pipeline.store import shards
from pipeline.store.shards import MissingImage, Sample, ShardReader, ShardWriter

ODD = [  # names of one sample each, with the names of its members
    {"0.jpg": b"\xff\xd8", "0.json": b'{"a": 1}', "0.txt": b"a dog"},
    {"a/b/1.JPG": b"upper", "a/b/1.Txt": b"mixed"},
    {"dir.v1/2.jpg": b"a dot in the folder"},
    {"3.seg.jpg": b"dotted", "3.left.png": b"dotted too"},
    {"./4.png": b"", "./4.cls": b"7"},
    {"ünïcode/5.webp": b"w"},
    {"long/" + "x" * 150 + ".jpg": b"long", "long/" + "x" * 150 + ".json": b"{}"},
    {"a b/6 6.jpg": b"spaces"},
    {"7.jpg": b"x" * 70_000, "7.": b"empty suffix"},
]


def tar_of(*entries) -> bytes:
    """A tar of (name, data) pairs and ready TarInfo headers."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
            else:
                header = tarfile.TarInfo(entry[0])
                header.size = len(entry[1])
                tar.addfile(header, io.BytesIO(entry[1]))
    return buffer.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.type, header.linkname = kind, target
    return header


def read(data: bytes, limit: int | None = None) -> tuple[list[Sample], str]:
    reader = ShardReader(io.BytesIO(data), limit)
    return list(reader), reader.end


def as_dict(sample: Sample) -> dict:
    return {"__key__": sample.key, **{m.suffix: m.data for m in sample.members}}


def oracle(path: Path) -> list[dict]:
    found = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    return [{k: v for k, v in s.items() if k not in ("__url__", "__local_path__")} for s in found]


def written(pairs) -> bytes:
    buffer = io.BytesIO()
    with ShardWriter(buffer) as writer:
        for name, data in pairs:
            writer.add(name, data)
    return buffer.getvalue()


def flat(samples=ODD) -> list[tuple[str, bytes]]:
    return [pair for sample in samples for pair in sample.items()]


SMALL = [(f"{i:03d}.{s}", bytes([i]) * n) for i in range(3) for s, n in (("jpg", 600), ("txt", 9))]


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


def test_names_that_are_not_utf8_survive_and_can_be_stored():
    pairs = [("caf\udce9.jpg", b"1"), ("x" * 120 + "\udcff.jpg", b"2")]
    samples, end = read(written(pairs))
    assert end == "complete" and samples[0].key == samples[0].id == "caf\\xe9"
    for sample in samples:
        for text in (sample.key, sample.id, *(m.name for m in sample.members)):
            text.encode()  # storable
    again = [pair for s in samples for pair in shards.labelled(s, {})]
    assert [pair for pair in again if pair[0].endswith("jpg")] == pairs


def test_written_tars_depend_on_nothing_but_their_content():
    data = written(SMALL)
    assert data == written(SMALL) and len(data) % 512 == 0
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for m in tar:
            assert (m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) == (0, 0, 0, "", "", 0o644)


def test_writer_leaves_the_stream_open_and_a_failed_tar_without_its_end():
    stream = io.BytesIO()
    with pytest.raises(RuntimeError), ShardWriter(stream) as writer:
        writer.add("0.jpg", b"x")
        raise RuntimeError
    assert not stream.closed
    assert read(stream.getvalue())[1] == "no end-of-archive marker"


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
        assert end == "complete" or end.startswith(("damaged at byte ", "no end-of-archive"))
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
        "member_too_large: jpg has 2000 bytes",
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
    assert samples[0].json_text() is None and samples[0].has_bad_json()
    assert samples[0].image().data == trap
    list(shards.labelled(samples[0], {}))
    assert not (tmp_path / "sprung").exists()


# ---- what a sample says


def sample_of(**members: bytes) -> Sample:
    (sample,), _ = read(tar_of(*((f"0.{k.replace('__', '.')}", v) for k, v in members.items())))
    return sample


def test_image_is_the_exact_suffix_first():
    assert sample_of(seg__jpg=b"1", txt=b"", PNG=b"2", webp=b"3").image().data == b"2"
    assert sample_of(txt=b"", seg__jpg=b"1").image().suffix == "seg.jpg"
    with pytest.raises(MissingImage, match=r"^missing_image$"):
        sample_of(txt=b"", jpgs=b"").image()
    with pytest.raises(MissingImage, match=r"^ambiguous_image: v1\.jpg, v2\.jpg$"):
        sample_of(v1__jpg=b"1", v2__jpg=b"2").image()


def test_caption_drops_what_cannot_be_stored():
    assert sample_of(jpg=b"").caption() is None
    assert sample_of(txt=b"a\0b \xff\xc3\xa9").caption() == "ab \ufffdé"


@pytest.mark.parametrize("bad", [b"", b"[1]", b"1", b"{", b'{"a": "\xff"}', b"[" * 100_000])
def test_bad_json_is_none_and_said_so(bad):
    sample = sample_of(jpg=b"", json=bad)
    assert sample.json_text() is None and sample.has_bad_json()


def test_json_text_is_the_text():
    text = b' {"b": 1e-05, "a": "\\u00e9"}\n'
    assert sample_of(json=text).json_text() == text.decode()
    assert not sample_of(json=text).has_bad_json()
    assert sample_of(jpg=b"").json_text() is None and not sample_of(jpg=b"").has_bad_json()


# ---- labelled

LABEL = {"z": 1, "cluster_id": 3, "caption": "Ünï", "none": None}


@pytest.mark.parametrize(
    "text",
    ['{"a": 1.50, "b": "}"}', "{}", " { } \n", '{\n "a": [1, 2]\n}\n', '{"a": NaN}',
     '{"v": "ratecluster"}', '{"a": "\\ud800"}', '{"a": 1, "a": 2}'],
)  # fmt: skip
def test_label_goes_in_before_the_final_brace(text):
    sample = sample_of(jpg=b"j", JSON=text.encode(), txt=b"t")
    out = dict(shards.labelled(sample, LABEL))
    assert list(out) == ["0.jpg", "0.JSON", "0.txt"]
    assert (out["0.jpg"], out["0.txt"]) == (b"j", b"t")
    new = out["0.JSON"].decode()
    head, _, tail = text.rpartition("}")
    assert new.startswith(head) and new.endswith("}" + tail)
    parsed = json.loads(new)
    assert list(parsed)[-1] == "ratecluster" and parsed.pop("ratecluster") == LABEL
    assert repr(parsed) == repr(json.loads(text))
    assert '"ratecluster": {"caption": "Ünï", "cluster_id": 3, "none": null, "z": 1}' in new


@pytest.mark.parametrize("old", ["1", "null", '{"cluster_id": 9}'])
def test_an_old_label_is_replaced(old):
    text = f'{{"ratecluster": {old}, "a": "\\ud800", "b": NaN}}'
    out = dict(shards.labelled(sample_of(json=text.encode()), LABEL))
    parsed = json.loads(out["0.json"])
    assert parsed.pop("ratecluster") == LABEL and list(parsed) == ["a", "b"]
    again = sample_of(json=out["0.json"])
    assert dict(shards.labelled(again, LABEL)) == out


def test_label_without_a_json_object():
    (name, data) = list(shards.labelled(sample_of(jpg=b"j"), LABEL))[-1]
    assert name == "0.json" and json.loads(data) == {"ratecluster": LABEL}
    bad = sample_of(jpg=b"j", json=b"[1]")
    out = list(shards.labelled(bad, LABEL))
    assert out[:2] == [("0.jpg", b"j"), ("0.json", b"[1]")] and out[2][0] == "0.ratecluster.json"
    again = sample_of(jpg=b"j", json=b"[1]", ratecluster__json=b"old")
    assert list(shards.labelled(again, LABEL)) == out


def test_label_refuses_nan():
    with pytest.raises(ValueError, match="not JSON compliant"):
        list(shards.labelled(sample_of(jpg=b""), {"confidence": float("nan")}))


def test_unsafe_samples_and_links_yield_nothing():
    data = tar_of(("a/../0.jpg", b"-"), ("a/../0.jpg", b"-"), ("1.jpg", b""),
                  special("1.png", tarfile.SYMTYPE, "1.jpg"))  # fmt: skip
    unsafe, linked = read(data)[0]
    assert list(shards.labelled(unsafe, LABEL)) == []
    assert list(shards.labelled(replace(unsafe, problem="duplicate_key"), LABEL)) == []
    assert [name for name, _ in shards.labelled(linked, LABEL)] == ["1.jpg", "1.json"]


def test_webdataset_reads_labelled_shards(tmp_path):
    before, after = tmp_path / "0.tar", tmp_path / "1.tar"
    before.write_bytes(tar_of(*flat()))
    samples, _ = read(before.read_bytes())
    after.write_bytes(written(p for s in samples for p in shards.labelled(s, {"i": s.index})))
    for i, (old, new) in enumerate(zip(oracle(before), oracle(after), strict=True)):
        facts = json.loads(new.pop("json"))
        assert facts.pop("ratecluster") == {"i": i}
        assert facts == json.loads(old.pop("json", b"{}"))
        assert new == old


# ---- listing


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
    return [shard.stem for shard in shards.list_shards(pattern)]


ALL = ["00000", "00001", "00002", "00003"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", ALL), ("/", ALL), ("/*.tar", ALL), ("/0000[12].tar", ALL[1:3]), ("/*", ALL),
        ("/{00000..00003}.tar", ALL), ("/{00001,00003}.tar", [ALL[1], ALL[3]]),
        ("/00002.tar", ["00002"]), ("/{a,b}/*.tar", ["a__00000", "b__00000"]),
        ("/{a,b}/00000.tar", ["a__00000", "b__00000"]), ("/b/**/*.tar", ["00000", "00001"]),
        ("/{00000,a/00000,b/c/00001}.tar", ["00000", "a__00000", "b__c__00001"]),
    ],
)  # fmt: skip
def test_every_kind_of_pattern(root, pattern, expected):
    found = shards.list_shards(root + pattern)
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
    assert [s.url for s in shards.list_shards(f"{root}/list.txt")][:3] == [
        f"{root}/{name}.tar" for name in expected[:3]
    ]
    assert len(stems(f"{root}/list.txt")) == 4


def test_relative_and_file_urls_are_the_same_shard(tmp_path, monkeypatch):
    (tmp_path / "0.tar").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "l.lst").write_text(f"0.tar\nfile://{tmp_path}/0.tar\n./0.tar\n")
    for pattern in ("0.tar", "*.tar", ".", f"file://{tmp_path}", "l.lst"):
        assert [s.url for s in shards.list_shards(pattern)] == [str(tmp_path / "0.tar")]


def test_version_changes_with_the_file(tmp_path):
    path = tmp_path / "0.tar"
    path.write_bytes(b"1")
    (before,) = shards.list_shards(str(path))
    path.write_bytes(b"22")
    os.utime(path, (1, 1))
    (after,) = shards.list_shards(str(path))
    assert before.version != after.version and (before.size, after.size) == (1, 2)


def test_linked_shards_count(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "x").write_bytes(b"12345")
    (tmp_path / "0.tar").symlink_to(tmp_path / "blobs" / "x")
    assert [(s.stem, s.size) for s in shards.list_shards(str(tmp_path))] == [("0", 5)]


def test_folders_are_listed_once(tmp_path, monkeypatch):
    fs = fsspec.filesystem("memory")
    for i in range(30):
        fs.pipe_file(f"/{tmp_path.name}/{i:02d}.tar", b"")
    calls = []
    ls = type(fs).ls
    monkeypatch.setattr(type(fs), "ls", lambda *a, **k: (calls.append(a), ls(*a, **k))[1])
    monkeypatch.setattr(type(fs), "info", None)  # nor is any file asked for alone
    assert len(shards.list_shards(f"memory://{tmp_path.name}/{{00..29}}.tar")) == 30
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("/{00002..00009}.tar", r"6 of 8 shards .*brace pattern.*00004.tar.*00006.tar;"),
        ("/none/{0..3}.tar", r"4 of 4 shards"),
        ("/{0..3.tar", "braces"),
        ("/x*.tar", "no shard matches .*taken as a glob"),
        ("/none", "no shard matches .*taken as a folder"),
        ("/{a,x}/*.tar", r"no shard matches .*/x/\*\.tar"),
        ("/none.tar", "1 of 1 shards .*taken as one shard"),
        ("/z", "0.tar.gz is compressed"), ("/z/*", "compressed"), ("/z/0.tar.gz", "compressed"),
        ("/z/{0,0}.tar.gz", "compressed"),
        ("/y", "0.jpg is not a .tar"), ("/y/{0,0}.jpg", "not a .tar"),
        ("/none.txt", "list file .* cannot be read"),
    ],
)  # fmt: skip
def test_mistakes_are_named_in_one_line(root, pattern, said):
    with pytest.raises(UserError, match=said) as caught:
        shards.list_shards(root + pattern)
    assert "\n" not in str(caught.value) and root in str(caught.value)


def test_empty_lists_and_folders(tmp_path):
    (tmp_path / "l.txt").write_text("# nothing\n\n")
    with pytest.raises(UserError, match="names no shard"):
        shards.list_shards(str(tmp_path / "l.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="taken as a folder"):
        shards.list_shards(str(tmp_path / "empty"))


def test_stems_that_cannot_be_told_apart(tmp_path):
    for name in ("a/b__0.tar", "a__b/0.tar", "c/0.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match="a__b__0"):
        shards.list_shards(f"{tmp_path}/*/*.tar")


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
        found = shards.list_shards(f"{url}/{{0..1}}.tar?token=x")
        assert [(s.stem, s.size) for s in found] == [("0", 4), ("1", 4)]
        assert [(s.stem, s.size) for s in shards.list_shards(url)] == [("0", 4), ("1", 4)]
        with pytest.raises(UserError, match=r"1 of 3 shards .*2\.tar"):
            shards.list_shards(f"{url}/{{0..2}}.tar")
        server.shutdown()
