"""verify: a sound run is sound; each kind of damage is found, named, and changes the exit code."""

import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from moto.server import ThreadedMotoServer

from pipeline.artifacts import layout, schemas
from pipeline.artifacts.stages import chain
from pipeline.cli import main as cli
from pipeline.ops.verify import row_checks, tar_checks
from pipeline.ops.verify import stage as verify
from pipeline.runtime.errors import UserError
from pipeline.store import storage, tables
from pipeline.store.shard_writer import ShardWriter
from pipeline.store.shards import ShardReader
from pipeline.write import stage as write
from tests import small_run
from tests.conftest import ROOT

pytestmark = pytest.mark.ray


@pytest.fixture
def paths(finished_run, tmp_path):
    """A finished run to spoil."""
    shutil.copytree(finished_run, tmp_path / "run")
    return layout.RunPaths(str(tmp_path / "run"))


def message(paths) -> str:
    found = verify.run(paths)
    assert bool(found.lines) == bool(found.count)
    return "\n".join(found.lines)


def test_a_finished_run_is_sound(paths, capsys):
    found = verify.run(paths)
    assert (found.lines, found.notes, found.count) == ([], [], 0)
    assert cli.invoke(["verify", "--root", paths.root]) == 0
    assert f"{paths.root} is sound" in capsys.readouterr().out


# ---- ways to spoil a run


def edit(name: str, change, **facts: object):
    """Rewrite a table: `change` gets its rows; the footer stays but for `facts`."""

    def spoil(paths):
        url = paths.top.file(name)
        table, before = tables.read(url), tables.facts(url)
        schema = table.schema.remove_metadata()
        rows = table.to_pylist()
        rows = change(rows) or rows
        new = pa.Table.from_pylist(rows, schema=schema)
        tables.write(url, new, **{**before, **facts})

    return spoil


def put(name: str, **values: object):
    """Change values of the first row of a table."""
    return edit(name, lambda rows: rows[0].update(values))


def facts(name: str, change):
    """Change a JSON file."""

    def spoil(paths):
        path = Path(paths.top.file(name))
        found = json.loads(path.read_text())
        change(found)
        path.write_text(json.dumps(found))

    return spoil


def file(name: str, change):
    """Change the bytes of a file."""

    def spoil(paths):
        path = Path(paths.top.file(name))
        path.write_bytes(change(path.read_bytes()))

    return spoil


def _of_another(rows: list[dict]) -> int:
    """The group of a row in another cluster than the first row."""
    return next(row["group"] for row in rows if row["cluster_id"] != rows[0]["cluster_id"])


def gone(name: str):
    return lambda paths: Path(paths.top.file(name)).unlink()


def new(name: str, data: bytes = b"x"):
    return lambda paths: Path(paths.top.file(name)).write_bytes(data)


def vector(change):
    """Change the first embedding of a part."""

    def spoil(paths):
        url = paths.embeddings.file("00000.parquet")
        table, before = tables.read(url), tables.facts(url)
        x = tables.to_matrix(table["embedding"]).copy()
        x[0] = change(x[0])
        at = table.schema.get_field_index("embedding")
        table = table.set_column(at, table.schema.field("embedding"), tables.from_matrix(x))
        tables.write(url, table, **before)

    return spoil


def flipped(data: bytes) -> bytes:
    """One bit in the last page of the first column."""
    column = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0).column(0)
    begin = column.dictionary_page_offset or column.data_page_offset
    at = begin + column.total_compressed_size - 3
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def members(change):
    """Rewrite a labelled tar: `change` gets [(name, bytes)]."""

    def spoil(paths):
        path = Path(paths.labeled.file("00000.tar"))
        with tarfile.open(path) as tar:
            found = [(m.name, tar.extractfile(m).read()) for m in tar]
        with path.open("wb") as stream, ShardWriter(stream) as writer:
            for name, data in change(found):
                writer.add(name, data)

    return spoil


def relabelled(**values: object):
    """Change the label in the json of the first sample of a labelled tar."""

    def change(found):
        for i, (name, data) in enumerate(found):
            if name.endswith(".json"):
                whole = json.loads(data)
                whole["ratecluster"].update(values)
                found[i] = name, json.dumps(whole).encode()
                return found
        raise AssertionError

    return members(change)


E, R, A, L = ("embeddings", "rejects", "assignments", "labels")
FIRST = "00000.parquet"
SPOILT = {  # what is done -> the message
    "manifest no json": (
        file("network/manifest.json", lambda d: d[:-9]),
        "network/manifest.json cannot be read",
    ),
    "manifest lacks a fact": (
        facts("clusters/manifest.json", lambda m: m.pop("sizes")),
        "clusters/manifest.json: lacks sizes",
    ),
    "embed made again": (
        facts("embeddings/manifest.json", lambda m: m.update(fingerprint="0")),
        "network/manifest.json: was made from",
    ),
    "settings changed": (
        facts("clusters/manifest.json", lambda m: m["config"].update(seed=7)),
        "clusters/manifest.json: its fingerprint is not",
    ),
    "identity changed": (
        facts("embeddings/manifest.json", lambda m: m["shards"][0]["shard"].update(size=1)),
        "embeddings/manifest.json: its fingerprint is not",
    ),
    "middle of the chain gone": (
        gone("clusters/manifest.json"),
        "captions/manifest.json: what it was made from is not there",
    ),
    "counts of the manifest": (
        facts("embeddings/manifest.json", lambda m: m.update(samples=5)),
        "samples is 5, of shards 123",
    ),
    "encoder of the manifest": (
        facts("embeddings/manifest.json", lambda m: m["encoders"][0].update(model="RN50")),
        "embeddings/manifest.json: names other encoders than its settings: ['RN50']",
    ),
    "no encoder": (
        facts("embeddings/manifest.json", lambda m: m["encoders"].clear()),
        "embeddings/manifest.json: names other encoders than its settings: []",
    ),
    "shard named twice": (
        facts("embeddings/manifest.json", lambda m: m["shards"].append(m["shards"][0])),
        "embeddings/manifest.json: 00000: names a shard twice",
    ),
    "sizes of the manifest": (
        facts("clusters/manifest.json", lambda m: m["sizes"].__setitem__(0, 99)),
        "sizes are not those of assignments/: clusters [0]",
    ),
    "captions of the manifest": (
        facts("captions/manifest.json", lambda m: m["captions"].__setitem__(0, "x")),
        "captions/captions.parquet: is not what",
    ),
    "part gone": (gone(f"{E}/{FIRST}"), "embeddings/00000: is missing"),
    "rejects gone": (gone(f"{R}/{FIRST}"), "rejects/00000: is missing"),
    "assignments gone": (gone(f"{A}/{FIRST}"), "assignments/00000: is missing"),
    "labels gone": (gone(f"{L}/{FIRST}"), "labels/00000: is missing"),
    "tar gone": (gone("labeled/00000.tar"), "labeled: 00000.tar: is missing"),
    "weights gone": (
        gone("network/network.safetensors"),
        "network: network.safetensors: is missing",
    ),
    "prototypes gone": (
        gone("clusters/prototypes.parquet"),
        "clusters/prototypes.parquet: is missing",
    ),
    "candidates gone": (
        gone("captions/candidates.parquet"),
        "captions/candidates.parquet: is missing",
    ),
    "voted gone": (gone("captions/voted.parquet"), "captions/voted.parquet: is missing"),
    "clusters gone": (gone("clusters.parquet"), "clusters.parquet: is missing"),
    "run.json gone": (gone("run.json"), "run.json: is missing"),
    "part cut": (
        file(f"{E}/{FIRST}", lambda d: d[: len(d) // 2]),
        "embeddings/00000: cannot be read",
    ),
    "part empty": (file(f"{L}/{FIRST}", lambda d: b""), "labels/00000: cannot be read"),
    "bit flipped": (file(f"{A}/{FIRST}", flipped), "assignments/00000: cannot be read"),
    "weights cut": (
        file("network/network.safetensors", lambda d: d[:-9]),
        "network: cannot be read",
    ),
    "other columns": (
        lambda p: tables.write(p.rejects.file(FIRST), pa.table({"a": [1]})),
        "rejects/00000: has not the columns it should: a, ",
    ),
    "stray part": (new(f"{L}/00007.parquet"), "labels: 00007.parquet: belongs to no shard"),
    "half a part": (
        new(f"{A}/.{FIRST}.partial-0"),
        "assignments: .00000.parquet.partial-0: belongs to no",
    ),
    "half a table": (new(".run.json.partial-0"), ".run.json.partial-0: is half a file"),
    "checkpoint left": (
        new("network/checkpoint-5.json"),
        "network: checkpoint-5.json: belongs to no",
    ),
    "stray tar": (new("labeled/00007.tar"), "labeled: 00007.tar: belongs to no shard"),
    "footer of embeddings": (
        edit(f"{E}/{FIRST}", lambda rows: None, stage="0"),
        "embeddings/00000: its footer says stage = '0'",
    ),
    "footer of rejects": (
        edit(f"{R}/{FIRST}", lambda rows: None, stage="0"),
        "rejects/00000: its footer says stage = '0'",
    ),
    "footer of assignments": (
        edit(f"{A}/{FIRST}", lambda rows: None, made_of="0"),
        "assignments/00000: its footer says made_of = '0'",
    ),
    "footer of labels": (
        edit(f"{L}/{FIRST}", lambda rows: None, made_of="0"),
        "labels/00000: its footer says made_of = '0'",
    ),
    "another shard's part": (
        lambda p: shutil.copy(p.embeddings.file("00001.parquet"), p.embeddings.file(FIRST)),
        "embeddings/00000: its footer names another input shard",
    ),
    "another key": (put(f"{E}/{FIRST}", key="other"), "sample_id is not 00000/other"),
    "another shard": (put(f"{E}/{FIRST}", shard="00001"), "sample_id is not 00000/"),
    "no key": (put(f"{E}/{FIRST}", key=None), "embeddings/00000: has rows without key"),
    "embedded twice": (
        edit(f"{E}/{FIRST}", lambda rows: rows + rows[:1]),
        "is there more than once",
    ),
    "embedded row lost": (
        edit(f"{E}/{FIRST}", lambda rows: rows[1:]),
        "embeddings/00000: has 59 rows, not 60",
    ),
    "index twice": (put(f"{E}/{FIRST}", index=1), "do not hold the 60 samples of the tar"),
    "reject lost": (
        edit(f"{R}/00001.parquet", lambda rows: rows[1:]),
        "rejects/00001: has 2 samples, not 3",
    ),
    "reject without reason": (
        put(f"{R}/00001.parquet", reason=""),
        "rejects/00001: 00001/bad-cut: is rejected without a reason",
    ),
    "damage made up": (
        edit(f"{R}/{FIRST}", lambda rows: [{"shard": "00000", "reason": "shard: x"}]),
        "rejects/00000: reports the damage ['shard: x']",
    ),
    "not finite": (vector(lambda x: x * np.nan), "embedding is not finite"),
    "not of unit length": (vector(lambda x: x * 1.01), "embedding is not of unit length"),
    "assigned row lost": (edit(f"{A}/{FIRST}", lambda rows: rows[1:]), "is missing"),
    "assigned twice": (edit(f"{A}/{FIRST}", lambda rows: rows + rows[:1]), "is too many"),
    "assigned in another order": (
        edit(f"{A}/{FIRST}", lambda rows: rows[::-1]),
        "is in another order than embeddings/",
    ),
    "no cluster": (
        put(f"{A}/{FIRST}", cluster_id=None),
        "assignments/00000: has rows without cluster_id",
    ),
    "cluster out of range": (put(f"{A}/{FIRST}", cluster_id=4), "cluster_id is out of range"),
    "another cluster": (
        edit(f"{A}/{FIRST}", lambda r: r[0].update(cluster_id=(r[0]["cluster_id"] + 1) % 4)),
        "are not the first of the top",
    ),
    "confidence": (put(f"{A}/{FIRST}", confidence=0.123), "are not the first of the top"),
    "margin": (put(f"{A}/{FIRST}", margin=-0.5), "margin is not the difference"),
    "outlier score": (
        put(f"{A}/{FIRST}", outlier_score=float("nan")),
        "outlier_score is not within 0 and 2",
    ),
    "shares unsorted": (
        edit(f"{A}/{FIRST}", lambda r: r[0].update(top_shares=r[0]["top_shares"][::-1])),
        "top_shares are not sorted",
    ),
    "shares too large": (
        put(f"{A}/{FIRST}", top_shares=[0.9, 0.5, 0.1]),
        "top_shares are not shares of 1",
    ),
    "cluster named twice": (
        edit(f"{A}/{FIRST}", lambda r: r[0].update(top_clusters=[r[0]["cluster_id"]] * 3)),
        "top_clusters are not different",
    ),
    "too few named": (put(f"{A}/{FIRST}", top_clusters=[0]), "are not of the right length"),
    "label lost": (edit(f"{L}/{FIRST}", lambda rows: rows[1:]), "is missing"),
    "label twice": (edit(f"{L}/{FIRST}", lambda rows: rows + rows[:1]), "is too many"),
    "labels in another order": (
        edit(f"{L}/{FIRST}", lambda rows: rows[::-1]),
        "labels/00000: is in another order",
    ),
    "label of another cluster": (put(f"{L}/{FIRST}", cluster_id=9), "cluster_id is 9, not "),
    "label's caption": (put(f"{L}/{FIRST}", cluster_caption="x"), "cluster_caption is 'x', not "),
    "label's confidence": (put(f"{L}/{FIRST}", confidence=0.125), "confidence is 0.125, not "),
    "label's status": (
        put(f"{L}/{FIRST}", status="rejected"),
        "status is 'rejected', not 'success'",
    ),
    "label's place": (put(f"{L}/{FIRST}", tar_offset=1), "tar_offset is 1, not "),
    "label's json": (put(f"{L}/{FIRST}", width=-1), "width is -1, not "),
    "tar cut": (
        file("labeled/00000.tar", lambda d: d[: -(-len(d.rstrip(b"\0")) // 512) * 512]),
        "labeled/00000: is no end-of-archive marker",
    ),
    "tar damaged": (file("labeled/00000.tar", lambda d: d[: len(d) // 2]), "labeled/00000: "),
    "tar's pixels": (
        members(lambda m: [(n, d[:-1] + b"!" if i == 0 else d) for i, (n, d) in enumerate(m)]),
        "are not the input's",
    ),
    "tar's member lost": (members(lambda m: m[:4] + m[5:]), "should be"),
    "tar's order": (members(lambda m: [m[1], m[0], *m[2:]]), "should be"),
    "tar's member too many": (
        members(lambda m: [*m, ("zz.txt", b"")]),
        "has zz.txt after all samples",
    ),
    "tar's label": (relabelled(cluster_id=77), "cluster_id is 77 in its json"),
    "tar's confidence": (relabelled(confidence=0.5), "confidence is 0.5 in its json"),
    "tar's unlabelled": (
        members(lambda m: [(n, b"{}" if n.endswith(".json") else d) for n, d in m]),
        "holds no label",
    ),
    "tar's json": (
        members(
            lambda m: [
                (n, d.replace(b"{", b'{"more": 1, ', 1) if n.endswith(".json") else d) for n, d in m
            ]
        ),
        "holds more than the input's json",
    ),
    "captions": (
        put("captions/captions.parquet", caption="x"),
        "captions/captions.parquet: is not what",
    ),
    "curve": (
        edit("clusters/curve.parquet", lambda rows: rows[1:]),
        "curve.parquet: is not of every k",
    ),
    "exemplars": (
        edit("clusters/exemplars.parquet", lambda r: [x for x in r if x["cluster_id"]]),
        "exemplars.parquet: is not of every kind and cluster: [0]",
    ),
    "group out of range": (put(f"{A}/{FIRST}", group=10**6), "group is out of range"),
    "group of another cluster": (
        edit(f"{A}/{FIRST}", lambda r: r[0].update(group=_of_another(r))),
        "group is not of its cluster",
    ),
    "levels gone": (gone("clusters/levels.parquet"), "clusters/levels.parquet: is missing"),
    "levels not nested": (
        edit("clusters/levels.parquet", lambda r: r[0]["levels"].__setitem__(0, 1)),
        "clusters/levels.parquet:",
    ),
    "levels' captions": (put("levels.parquet", cluster_caption="x"), "levels.parquet: is not what"),
    "levels' sizes": (put("levels.parquet", size=1), "levels.parquet: is not what"),
    "groups' sizes": (
        facts("clusters/manifest.json", lambda m: m["groups"].__setitem__(0, 10**6)),
        "groups are not those of assignments/",
    ),
    "clusters' sizes": (put("clusters.parquet", size=1), "clusters.parquet: is not what sizes"),
    "clusters' captions": (
        put("clusters.parquet", cluster_caption="x"),
        "clusters.parquet: is not what sizes",
    ),
    "run.json of another run": (
        facts("run.json", lambda r: r["stages"]["train"].update(fingerprint="0")),
        "run.json: names other fingerprints",
    ),
    "run.json no json": (file("run.json", lambda d: d[:9]), "run.json: cannot be read"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_each_violation_is_named(paths, kind):
    spoil, expected = SPOILT[kind]
    spoil(paths)
    assert expected in message(paths)


def test_a_violation_is_exit_code_1_and_names_shard_and_key(paths, capsys):
    put(f"{L}/{FIRST}", image_member="\x1b[31mx")(paths)
    key = tables.read(paths.labels.file(FIRST), ["sample_id"])["sample_id"][0].as_py()
    assert cli.invoke(["verify", "--root", paths.root]) == 1
    out, err = capsys.readouterr()
    assert f"labels/00000: {key}: image_member is '\\x1b[31mx', not " in out
    assert "is not sound: 1 violations" in err and "\x1b" not in out


def test_nothing_there_is_the_users_mistake(tmp_path, capsys):
    with pytest.raises(UserError, match="no run is there"):
        verify.run(layout.RunPaths(str(tmp_path)))
    assert cli.invoke(["verify", "--root", str(tmp_path / "nowhere")]) == 2
    assert "no run is there" in capsys.readouterr().err


def test_many_violations_are_counted_and_the_first_kept(paths):
    edit(f"{L}/{FIRST}", lambda rows: [row.update(key="x", width=-1) for row in rows] and None)(
        paths
    )
    edit(f"{L}/00001.parquet", lambda rows: [r.update(tar_size=-1) for r in rows] and None)(paths)
    found = verify.run(paths)
    assert found.count == 2 * 60 + 63 and len(found.lines) == 100


@pytest.mark.parametrize("last", ["embeddings", "network", "clusters", "captions"])
def test_stages_that_have_not_run_are_noted(paths, last):
    names = [stage.folder for stage in chain()]
    later = names[names.index(last) + 1 :]
    for name in later:
        paths.folder(name).clear()
    found = verify.run(paths)
    assert found.lines == []
    assert found.notes == [f"{name}: not there, or not finished" for name in later]


def test_embeddings_on_the_way_are_no_violation(paths):
    gone("embeddings/manifest.json")(paths)
    shutil.rmtree(f"{paths.root}/network")
    for name in ("clusters", "captions", "labels"):
        paths.folder(name).clear()
    found = verify.run(paths)
    assert found.count == 0 and "embeddings: not there, or not finished" in found.notes


def test_an_input_that_is_gone_or_new_is_not_compared(paths, tmp_path, tiny_shards):
    shards = tmp_path / "shards"
    shutil.copytree(tiny_shards, shards)

    def moved(manifest):
        for shard in manifest["shards"]:
            shard["shard"]["url"] = str(shards / f"{shard['shard']['stem']}.tar")

    facts("embeddings/manifest.json", moved)(paths)
    for stem in ("00000", "00001"):
        shutil.copystat(tiny_shards / f"{stem}.tar", shards / f"{stem}.tar")
    assert verify.run(paths).notes == []
    (shards / "00000.tar").unlink()
    with (shards / "00001.tar").open("ab") as stream:
        stream.write(b"more")
    found = verify.run(paths)
    assert found.count == 0
    assert "00000: not compared with its input, which cannot be read" in found.notes[0]
    assert "00001: not compared with its input, which has changed" in found.notes[1]


def test_a_users_own_file_is_a_note(paths):
    new("labels/notes.txt")(paths)
    found = verify.run(paths)
    assert found.count == 0 and found.notes == ["labels: notes.txt is no file of the run"]


def test_an_error_of_the_store_is_no_violation(paths, monkeypatch):
    """It is raised: what could not be read may well be sound."""

    def broken(url: str) -> bytes:
        raise TimeoutError("the store does not answer")

    monkeypatch.setattr(row_checks.tables, "FACTS_KEY", b"ratecluster")
    monkeypatch.setattr(storage, "read_bytes", broken)
    with pytest.raises(TimeoutError):
        row_checks.open_part(paths.labels.file(FIRST), "labels/00000", verify.Violations())


@pytest.fixture
def bucket(monkeypatch):
    """A bucket on an S3 server of our own."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "fake")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    boto3.client("s3").create_bucket(Bucket="bucket")
    yield s3fs.S3FileSystem()
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.mark.slow
def test_a_run_on_an_object_store(finished_run, bucket):
    """By the command itself, whose Ray knows the store's variables."""
    bucket.put(f"{finished_run}/", "bucket/run/", recursive=True)
    python = [sys.executable, "-c", "from pipeline.cli.main import main; main()"]
    command = [*python, "verify", "--root", "s3://bucket/run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "s3://bucket/run is sound\n"), done.stderr

    bucket.rm(f"bucket/run/{L}/{FIRST}")
    data = bucket.cat("bucket/run/labeled/00001.tar")
    bucket.pipe("bucket/run/labeled/00001.tar", data[: len(data) // 2])
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert "labels/00000: is missing" in done.stdout and "labeled/00001: " in done.stdout


# ---- labelled tars of odd shards


ODD = [
    {"jpg": b"dog", "json": b'{"a": NaN}', "txt": b"t"},
    {"jpg": b"car", "json": b"[no object", "ratecluster.json": b"old"},
    {"jpg": b"x" * 5000, "json": b'{"big": true}'},
    {"jpg": b"dog"},
    {"json": b'{"ratecluster": {"cluster_id": 5}}', "bin": b"y" * 3000},
    {"jpg": b"dog", "json": b'{"long": "' + b"z" * 2000 + b'"}'},
]


def shard_at(path: Path) -> dict:
    return {"url": str(path), "size": path.stat().st_size, "version": ""}


def odd_shard(path: Path) -> None:
    """ODD, then an unsafe name, a link and a key that comes again; no end-of-archive marker."""
    small_run.write_shard(path, 0, ODD)
    with tarfile.open(path, "a") as tar:
        for name in ("../up.jpg", "d0/000.jpg"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
        link = tarfile.TarInfo("d0/link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    path.write_bytes(path.read_bytes().rstrip(b"\0") + b"\0" * 512)


def test_labelled_shards_of_odd_ones_are_sound_and_hold_large_members_whole(tmp_path):
    source, target, limit = tmp_path / "0.tar", tmp_path / "labelled.tar", 1000
    odd_shard(source)
    with source.open("rb") as stream:
        samples = list(ShardReader(stream, limit))
    empty = dict.fromkeys(schemas.IN_JSON)
    labels = [
        {**empty, "shard": "0", "sample_id": f"0/{s.id}", "status": "success", "confidence": 1 / 3}
        for s in samples
    ]
    with target.open("wb") as file:
        assert write.relabel(shard_at(source), file, labels, limit) == len(samples) == 9
    assert list(tar_checks.differences(shard_at(source), str(target), labels, limit)) == []
    with tarfile.open(target) as tar:
        assert len(tar.extractfile("d0/002.jpg").read()) == 5000
        assert tar.extractfile("d0/004.bin").read() == b"y" * 3000
        names = tar.getnames()
        assert len(set(names)) == len(names) - 2 and "d0/005.ratecluster.json" in names
    data = bytearray(target.read_bytes())
    data[data.index(b"x" * 4000) + 3999] = 0
    target.write_bytes(data)
    found = list(tar_checks.differences(shard_at(source), str(target), labels, limit))
    assert found == [("0/d0/002", "the bytes of d0/002.jpg are not the input's")]


def test_a_large_member_that_is_cut_off_is_left_out(tmp_path):
    source, target = tmp_path / "0.tar", tmp_path / "labelled.tar"
    small_run.write_shard(source, 0, [{"jpg": b"dog"}, {"jpg": b"x" * 9000}])
    source.write_bytes(source.read_bytes()[:6000])
    empty = dict.fromkeys(schemas.IN_JSON)
    labels = [{**empty, "shard": "0", "sample_id": f"0/d0/00{i}", "status": "x"} for i in (0, 1)]
    with target.open("wb") as file:
        assert write.relabel(shard_at(source), file, labels, 1000) == 2
    with tarfile.open(target) as tar:
        assert tar.getnames() == ["d0/000.jpg", "d0/000.json", "d0/001.json"]
    assert list(tar_checks.differences(shard_at(source), str(target), labels, 1000)) == []


def test_an_index_is_of_all_that_was_embedded(paths):
    paths.index("z").finish("i", upstream="other", samples=1, files=["a.lists"])
    found = verify.run(paths)
    assert found.lines == [] and "index/z: is out of date" in "\n".join(found.notes)
    paths.index("z").clear()
    upstream = paths.embeddings.manifest()["fingerprint"]
    paths.index("clip").finish("i", upstream=upstream, samples=1, files=["a.lists"])
    text = message(paths)
    assert "index/clip/manifest.json: has 1 samples, 120 are embedded" in text
    assert "index/clip: a.lists: is missing" in text
