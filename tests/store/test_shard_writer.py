"""Writing shards: bytes that depend on nothing else, and labels that leave the rest alone."""

import io
import json
import tarfile
from dataclasses import replace

import pytest

from pipeline.store.shard_writer import ShardWriter, labelled
from tests.store.tars import SMALL, flat, oracle, read, sample_of, special, tar_of, written


def test_names_that_are_not_utf8_survive_and_can_be_stored():
    pairs = [("caf\udce9.jpg", b"1"), ("x" * 120 + "\udcff.jpg", b"2")]
    samples, end = read(written(pairs))
    assert end == "complete" and samples[0].key == samples[0].id == "caf\\xe9"
    for sample in samples:
        for text in (sample.key, sample.id, *(m.name for m in sample.members)):
            text.encode()  # storable
    again = [pair for s in samples for pair in labelled(s, {})]
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


# ---- labelled

LABEL = {"z": 1, "cluster_id": 3, "caption": "Ünï", "none": None}


@pytest.mark.parametrize(
    "text",
    ['{"a": 1.50, "b": "}"}', "{}", " { } \n", '{\n "a": [1, 2]\n}\n', '{"a": NaN}',
     '{"v": "ratecluster"}', '{"a": "\\ud800"}', '{"a": 1, "a": 2}'],
)  # fmt: skip
def test_label_goes_in_before_the_final_brace(text):
    sample = sample_of(jpg=b"j", JSON=text.encode(), txt=b"t")
    out = dict(labelled(sample, LABEL))
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
    out = dict(labelled(sample_of(json=text.encode()), LABEL))
    parsed = json.loads(out["0.json"])
    assert parsed.pop("ratecluster") == LABEL and list(parsed) == ["a", "b"]
    again = sample_of(json=out["0.json"])
    assert dict(labelled(again, LABEL)) == out


def test_label_without_a_json_object():
    (name, data) = list(labelled(sample_of(jpg=b"j"), LABEL))[-1]
    assert name == "0.json" and json.loads(data) == {"ratecluster": LABEL}
    bad = sample_of(jpg=b"j", json=b"[1]")
    out = list(labelled(bad, LABEL))
    assert out[:2] == [("0.jpg", b"j"), ("0.json", b"[1]")] and out[2][0] == "0.ratecluster.json"
    again = sample_of(jpg=b"j", json=b"[1]", ratecluster__json=b"old")
    assert list(labelled(again, LABEL)) == out


def test_label_refuses_nan():
    with pytest.raises(ValueError, match="not JSON compliant"):
        list(labelled(sample_of(jpg=b""), {"confidence": float("nan")}))


def test_unsafe_samples_and_links_yield_nothing():
    data = tar_of(("a/../0.jpg", b"-"), ("a/../0.jpg", b"-"), ("1.jpg", b""),
                  special("1.png", tarfile.SYMTYPE, "1.jpg"))  # fmt: skip
    unsafe, linked = read(data)[0]
    assert list(labelled(unsafe, LABEL)) == []
    assert list(labelled(replace(unsafe, problem="duplicate_key"), LABEL)) == []
    assert [name for name, _ in labelled(linked, LABEL)] == ["1.jpg", "1.json"]


def test_webdataset_reads_labelled_shards(tmp_path):
    before, after = tmp_path / "0.tar", tmp_path / "1.tar"
    before.write_bytes(tar_of(*flat()))
    samples, _ = read(before.read_bytes())
    after.write_bytes(written(p for s in samples for p in labelled(s, {"i": s.index})))
    for i, (old, new) in enumerate(zip(oracle(before), oracle(after), strict=True)):
        facts = json.loads(new.pop("json"))
        assert facts.pop("ratecluster") == {"i": i}
        assert facts == json.loads(old.pop("json", b"{}"))
        assert new == old
