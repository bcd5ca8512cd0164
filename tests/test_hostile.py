"""Hostile and broken input: every sample is a row with its reason, and stays data."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page

from pipeline.artifacts import layout, schemas
from pipeline.embed import decoding, encode_shard, worker
from pipeline.embed import settings as embed_settings
from pipeline.embed.attempts import Attempts, Turns
from pipeline.embed.decoding import Decoder, Limits
from pipeline.report import stage as report
from pipeline.runtime.errors import UserError
from pipeline.runtime.reject_reasons import Reason, printable
from pipeline.store import columns, samples, tables
from pipeline.store.listing import list_shards
from pipeline.store.shards import ShardReader
from pipeline.vision import clip
from tests import chromium, corpus, fake_run
from tests.conftest import FEW_WORDS
from tests.store.tars import oracle, read, tar_of

ROOT = Path(__file__).parents[1]
CFG = embed_settings.Config(max_image_pixels=10**6, max_reject_fraction=1.0)
CODES = {reason.value for reason in Reason}
pytestmark = pytest.mark.filterwarnings("ignore")  # PIL's remarks on broken tags


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the hostile shards in `shards`; what a payload would make lies beside it."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "shards").mkdir()
    corpus.write(folder / "shards", folder / "canary")
    return folder


@pytest.fixture(scope="module")
def encoder():
    return clip.load("pico-clip", "", threads=1)


def embedded(place: Path, root: Path, encoder, cfg: embed_settings.Config = CFG) -> list[dict]:
    paths = layout.RunPaths(str(root))
    found = list_shards(str(place / "shards"))
    with ThreadPoolExecutor(1) as thread:
        return [
            encode_shard.embed_shard(shard, [encoder], thread, cfg, paths, encode_shard.decode)
            for shard in found
        ]


@pytest.fixture(scope="module")
def facts(place, encoder) -> list[dict]:
    return embedded(place, place / "run", encoder)


def rows(root: Path, stem: str) -> list[dict]:
    """Of a shard: what was embedded and what was rejected, in the order of the tar."""
    paths = layout.RunPaths(str(root))
    both = [tables.read(f.file(f"{stem}.parquet")) for f in (paths.embeddings, paths.rejects)]
    found = [row for table in both for row in table.to_pylist() if row["sample_id"] is not None]
    return sorted(found, key=lambda row: row["index"])


def keys_by_tarfile(path: Path) -> list[str]:
    """The keys of neighbouring members, as the tarfile module alone reads them."""
    keys: list[str] = []
    try:
        with tarfile.open(path, ignore_zeros=True) as tar:
            for header in tar:
                folder, slash, file = header.name.rpartition("/")
                stem, dot, _ = file.partition(".")
                if stem and dot and not header.isdir() and folder + slash + stem not in keys[-1:]:
                    keys.append(folder + slash + stem)
    except tarfile.ReadError:  # where it ends
        pass
    return keys


def test_every_sample_of_every_shard_is_a_row(place, facts):
    by_webdataset = 0
    for fact in facts:
        stem = fact["shard"]["stem"]
        found = rows(place / "run", stem)
        assert fact["samples"] == len(found) == fact["embedded"] + fact["rejected"]
        assert [row["index"] for row in found] == list(range(len(found)))
        assert len({row["sample_id"] for row in found}) == len(found)
        path = place / "shards" / f"{stem}.tar"
        assert [row["key"] for row in found] == keys_by_tarfile(path), stem
        try:
            theirs = oracle(path)
        except Exception:  # it reads no further
            continue
        read = [sample["__key__"] for sample in theirs]  # up to the first zeros
        assert read == [row["key"] for row in found][: len(read)]
        assert len(read) == len(found) or stem == "tar-two-in-one"
        by_webdataset += len(found)
    assert sum(fact["samples"] for fact in facts) > 4000 and by_webdataset > 4000


def test_every_reason_is_one_of_the_set_and_can_be_printed(place, facts):
    seen: Counter[str] = Counter()
    for fact in facts:
        stem = fact["shard"]["stem"]
        rejects = tables.read(str(place / "run" / "rejects" / f"{stem}.parquet")).to_pylist()
        assert all(row["reason"].isprintable() for row in rejects)
        assert (fact["end"] != "complete") == any(row["sample_id"] is None for row in rejects)
        seen.update(row["reason"].partition(":")[0] for row in rejects)
    assert set(seen) <= CODES
    # no shard alone makes these
    machine = {Reason.DECODE_TIMEOUT, Reason.EMBEDDING_NOT_FINITE, Reason.QUARANTINED}
    given = {
        Reason.MISSING_EMBEDDING,
        Reason.MISSING_ID,
        Reason.ZERO_VECTOR,
        Reason.WRONG_DIMENSION,
    }
    others = {reason.value for reason in machine | given}  # tests/embed/given make those of `given`
    assert set(seen) == CODES - others - {Reason.SAMPLE_TOO_LARGE.value}


def test_the_docs_explain_every_reason():
    page = (ROOT / "docs" / "rejected.md").read_text()
    assert all(f"`{reason.value}`" in page for reason in Reason)


def test_each_odd_image_is_what_it_is(place, facts):
    found = {row["key"]: row.get("reason") for row in rows(place / "run", "samples")}
    for name, (_, code) in corpus.odd_images().items():
        reason = found[name.partition(".")[0]]
        assert (reason and reason.partition(":")[0]) == code, name


def test_texts_and_json_stay_what_they_are(place, facts):
    found = {row["key"]: row for row in rows(place / "run", "samples")}
    for name, text in corpus.CAPTIONS.items():
        want = "cat \ufffd\ufffd\ufffd" if name == "surrogates" else text.replace("\0", "")
        assert found[f"caption-{name}"]["caption"] == want
    for name, (data, kept) in corpus.jsons().items():
        row, encoding = found[f"json-{name}"], "utf-16" if name == "utf16" else "utf-8-sig"
        assert row["json"] == (data.decode(encoding) if kept else None), name
        assert (row["text_problem"] is None) == kept, name
    survey = columns.Survey()
    for row in found.values():
        survey.add(columns.kinds(columns.parse(row["json"])))
    kinds = survey.facts()["columns"]
    assert max(map(len, kinds)) <= columns.MAX_NAME and "n" * 100_000 not in kinds
    assert len(set(schemas.label_names(kinds).values())) == len(kinds)
    schemas.labels_schema(kinds, 5)


def test_nothing_is_unpickled_and_nothing_made_outside_the_root(place, facts):
    assert sorted(path.name for path in place.iterdir()) == ["run", "shards"]
    folders = {path.parent.name for path in (place / "run").rglob("*") if path.is_file()}
    assert folders == {"embeddings", "rejects"}
    assert not (place.parent / "canary").exists() and not (place.parent / "y.jpg").exists()


def test_the_same_bytes_again_with_other_threads(place, facts, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    embedded(place, tmp_path, encoder)
    for path in (place / "run").rglob("*.parquet"):
        assert (tmp_path / path.relative_to(place / "run")).read_bytes() == path.read_bytes()


def test_one_sample_of_many_files_is_bounded():
    parts = [(f"0.{i}.npy", b"x" * 1000) for i in range(50)]
    samples, end = read(tar_of(("0.jpg", b"x"), *parts, ("1.jpg", b"x" * 9000)), 10_000)
    assert end == "complete" and len(samples) == 2 and samples[1].problem is None
    assert samples[0].problem == "sample_too_large: 10001 bytes with 9.npy"
    assert sum(len(member.data) for member in samples[0].members) == 9001


def test_long_texts_are_cut_and_long_json_is_none():
    size = samples.MAX_TEXT_BYTES
    (fits, over), _ = read(
        tar_of(
            *(("0.txt", b"x" * size), ("0.json", b'{"a": "' + b"x" * (size - 9) + b'"}')),
            *(("1.txt", b"x" * size + b"y"), ("1.json", b'{"a": "' + b"x" * size + b'"}')),
        )
    )
    assert fits.caption() == over.caption() == "x" * size
    assert len(fits.json_text()) == size and over.json_text() is None


# ---- memory and time

MEASURED = """
import json, resource, sys, warnings
import numpy as np
from pathlib import Path
from pipeline.embed.decoding import Decoder, Limits
from pipeline.store.shards import ShardReader
warnings.simplefilter("ignore")
prepare = lambda image: np.asarray(image.resize((8, 8)))
decoder = Decoder("s", prepare, Limits(10**8, float(sys.argv[2]), threads=2, ahead=8))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with Path(sys.argv[1]).open("rb") as stream:
    found = [row.get("reason") for row, _ in decoder.all(ShardReader(stream, 1 << 26))]
took = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps({"reasons": found, "megabytes": took // 1024}))
"""


def measured(path: Path, timeout_s: float = 60) -> tuple[list[str | None], int]:
    """The reasons of a shard's samples, and the megabytes that its decoding took, of a process
    that must end by itself."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(path), str(timeout_s)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    return found["reasons"], found["megabytes"]


@pytest.mark.parametrize("name", [name for name in corpus.BOMBS if name != "scans.jpg"])
def test_a_bomb_takes_little_memory(name, tmp_path):
    make, codes = corpus.BOMBS[name]
    good = corpus.saved(corpus.photograph(0), "jpg")
    path = tmp_path / "0.tar"
    path.write_bytes(tar_of(("0.jpg", good), (f"1.{name.rpartition('.')[2]}", make())))
    (first, second), megabytes = measured(path)
    assert first is None and (second and second.partition(":")[0]) in codes
    assert megabytes < 60 + 6 * path.stat().st_size / 1e6  # its own bytes, a few times over


def test_deep_json_of_any_length_is_no_json_and_takes_little_memory(tmp_path):
    good = corpus.saved(corpus.photograph(0), "jpg")
    pairs = [
        pair
        for i, size in enumerate((10_000, samples.MAX_TEXT_BYTES - 5, 60_000_000, 100_000_000))
        for pair in ((f"{i}.jpg", good), (f"{i}.json", corpus.nested_json(size)))
    ]
    (tmp_path / "0.tar").write_bytes(tar_of(*pairs))
    reasons, megabytes = measured(tmp_path / "0.tar")
    assert reasons[:3] == [None] * 3 and reasons[3].startswith("sample_too_large: ")
    assert megabytes < 200  # one member, and its pieces while they are put together


def test_a_shard_of_a_hundred_thousand_samples(tmp_path):
    with (tmp_path / "many.tar").open("wb") as stream:
        corpus.many(stream)
    reasons, megabytes = measured(tmp_path / "many.tar")
    assert reasons == ["not_an_image"] * 100_000
    assert megabytes < 100


def test_a_picture_that_takes_for_ever_is_given_up(tmp_path):
    """A real one: half a minute of decoding in a third of a megabyte; and the process ends."""
    good = corpus.saved(corpus.photograph(0), "jpg")
    bomb = corpus.jpeg_of_scans()
    names = [("0", good), ("1", bomb), ("2", bomb), ("3", bomb), ("4", good), ("5", good)]
    (tmp_path / "0.tar").write_bytes(tar_of(*((f"{name}.jpg", data) for name, data in names)))
    reasons, _ = measured(tmp_path / "0.tar", timeout_s=2)
    assert reasons == [None, *["decode_timeout: more than 2 s"] * 3, None, None]


def test_a_thread_that_hangs_is_replaced_and_the_rest_is_as_ever():
    good = corpus.saved(corpus.photograph(0), "png")
    wide = corpus.saved(Image.new("RGB", (33, 32)), "png")
    samples, _ = read(tar_of(*((f"{i}.png", wide if i % 3 else good) for i in range(12))))
    released = threading.Event()

    def prepare(image: Image.Image) -> np.ndarray:
        if image.width == 33:
            released.wait()
        return np.asarray(image)

    decoder = Decoder("s", prepare, Limits(10**6, 1.0, threads=3, ahead=4))
    found = list(decoder.all(samples))
    released.set()
    assert [row["index"] for row, _ in found] == list(range(12))
    assert [pixels is None for _, pixels in found] == [i % 3 > 0 for i in range(12)]
    assert {row["reason"] for row, pixels in found if pixels is None} == {
        "decode_timeout: more than 1 s"
    }
    assert all(row["member"] for row, pixels in found if pixels is None)


def test_a_decode_that_was_given_up_ends_at_its_next_read():
    data = corpus.saved(corpus.photograph(0), "png")
    asked = iter([False, False, True])
    with pytest.raises(decoding.images.BadImage, match="decode_timeout"):
        decoding.images.decode(data, 10**6, lambda: next(asked, True))


def test_threads_go_home_when_the_shard_ends_or_its_reader_stops():
    samples, _ = read(tar_of(*((f"{i}.png", b"x") for i in range(50))))
    before = set(threading.enumerate())
    decoder = Decoder("s", np.asarray, Limits(10**6, 60, threads=3, ahead=4))
    assert len(list(decoder.all(samples))) == 50
    halfway = decoder.all(samples)
    next(halfway)
    halfway.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
        assert not thread.is_alive()


def test_what_waits_is_bounded_in_bytes(monkeypatch):
    monkeypatch.setattr(decoding, "AHEAD_BYTES", 2500)
    read_ahead = []

    def reader():
        for sample in read(tar_of(*((f"{i}.png", b"x" * 1000) for i in range(20))))[0]:
            read_ahead.append(sample.index)
            yield sample

    decoder = Decoder("s", np.asarray, Limits(10**6, 60, threads=2, ahead=100))
    for place, (row, _) in enumerate(decoder.all(reader())):
        assert row["index"] == place
        assert len(read_ahead) - place <= 3


def test_an_error_that_is_not_the_pictures_is_raised():
    samples, _ = read(tar_of(("0.png", corpus.saved(corpus.photograph(0), "png"))))

    def prepare(image):
        raise MemoryError("short")

    with pytest.raises(MemoryError, match="short"):
        list(Decoder("s", prepare, Limits(10**6, 60, 1, 1)).all(samples))


# ---- shards that are not there, or may not be read


def test_a_list_with_a_missing_shard_names_it(place, tmp_path):
    listed = tmp_path / "shards.txt"
    listed.write_text(f"{place}/shards/tar-whole.tar\n{place}/shards/gone.tar\n")
    with pytest.raises(UserError, match=r"1 of 2 shards .* missing, the first: .*gone\.tar"):
        list_shards(str(listed))


@pytest.fixture
def nobody():
    """A folder that all may enter, and a user who is not root for as long as the test lasts."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder, lambda: os.seteuid(65534) if os.geteuid() == 0 else None
    if os.getuid() == 0:
        os.seteuid(0)
    shutil.rmtree(folder)


def test_a_shard_that_may_not_be_read_is_named_and_the_others_are_done(place, nobody, encoder):
    folder, become = nobody
    for name in ("whole", "locked"):
        shutil.copy(place / "shards" / "tar-whole.tar", folder / f"{name}.tar")
    (folder / "locked.tar").chmod(0)
    (folder / "list.txt").write_text("whole.tar\nlocked.tar\n")
    (folder / "run").mkdir()
    (folder / "run").chmod(0o777)
    shards = list_shards(str(folder / "list.txt"))
    become()
    actor = object.__new__(worker.Embedder)
    actor.cfg, actor.paths = CFG, layout.RunPaths(str(folder / "run"))
    actor.encoders, actor.name = [encoder], "one"
    actor.attempts, actor.turns = Attempts(actor.paths.attempts, "one"), Turns()
    with ThreadPoolExecutor(1) as actor.thread:
        found = {shard.stem: actor({"shard": json.dumps(asdict(shard))}) for shard in shards}
    assert json.loads(found["whole"]["facts"])["embedded"] == 3
    assert "locked.tar: PermissionError: " in found["locked"]["error"]
    assert not found["locked"]["facts"]


def test_a_list_that_may_not_be_read_is_named(nobody):
    folder, become = nobody
    (folder / "list.txt").write_text("0.tar\n")
    (folder / "list.txt").chmod(0)
    become()
    with pytest.raises(UserError, match=r"list\.txt cannot be read"):
        list_shards(str(folder / "list.txt"))


# ---- what people see


def test_printable_spells_out_what_would_steer_a_terminal():
    assert printable("a\x1b[31m\r\n\x07\u202e\x9b\u2028é 猫") == (
        r"a\x1b[31m\r\n\x07\u202e\x9b\u2028é 猫"
    )


@pytest.mark.slow
@pytest.mark.ray
def test_the_whole_run_by_the_command_line(place, tmp_path):
    """Samples, names and damage through every stage; the terminal and the root are looked at."""
    home, source = tmp_path / "home", tmp_path / "source"
    home.mkdir()
    source.mkdir()
    for stem in ("samples", "named", "truncated", "tar-cut-in-member", "tar-no-bytes"):
        shutil.copy(place / "shards" / f"{stem}.tar", source)
    settings = ("embed.max_reject_fraction=1", "train.steps=8", "train.batch_size=64",
                "train.words=0", "select_k.k=3", "embed.max_image_pixels=1000000")  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", "from pipeline.cli.main import main; main()", "run", "--shards",
         str(source), "--root", f"{home}/root",
         *(part for s in settings for part in ("--set", s)), *FEW_WORDS],
        cwd=home, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    message = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, message
    assert all(line.isprintable() for line in message.split("\n")), message
    assert (
        r"types stay JSON text: a, a\x1b[31m, caption" in message and "2 shards damaged" in message
    )
    assert [path.name for path in home.iterdir()] == ["root"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "source"]
    assert sorted(path.name for path in place.iterdir() if path.name != "run") == ["shards"]
    paths = layout.RunPaths(f"{home}/root")
    for shard in list_shards(str(source)):
        labels = tables.read(paths.labels.file(f"{shard.stem}.parquet")).to_pylist()
        assert [row["key"] for row in labels] == keys_by_tarfile(Path(shard.url))
        for row in labels:
            code = (row["error_message"] or "").partition(":")[0]
            assert code in CODES if row["status"] == "rejected" else not code
        with (home / "root" / "labeled" / f"{shard.stem}.tar").open("rb") as stream:
            copied = ShardReader(stream, None)
            assert not any(samples.is_unsafe(sample.key) for sample in copied)
            assert copied.end == "complete"
    page = (home / "root" / "report" / "index.html").read_text()
    assert not any(payload in page for payload in corpus.PAYLOADS)


def title(page: Page, path: Path) -> str:
    """That of a page once it has loaded and its scripts have run, tooltips and unions made."""
    page.goto(path.as_uri())
    if page.locator("#cut").count():
        page.locator("#cut").fill("2")
        page.locator("#plot-map").hover()
    page.wait_for_timeout(300)
    return page.title()


@pytest.mark.slow
@chromium.needs_chromium
def test_the_report_runs_nothing_of_the_webs(tmp_path, monkeypatch):
    """Captions, alt texts, keys and reasons hold payloads; each of them runs in a plain page."""

    def seen(*paths: Path) -> list[str]:
        with chromium.browser() as browser:
            return [title(browser.new_page(), path) for path in paths]

    plain = tmp_path / "plain.html"
    for payload in corpus.PAYLOADS:
        plain.write_text(f"<!doctype html><title>quiet</title><p>{payload}</p>")
        assert seen(plain) == [corpus.EXECUTED]
    monkeypatch.setattr(fake_run, "SCRIPT", "".join(corpus.PAYLOADS))
    paths = fake_run.build(tmp_path)
    report.run(report.Config(), paths)
    page = tmp_path / "run" / "report" / "index.html"
    text = page.read_text()
    assert text.count("document.title") > 4  # they are on the page
    without = tmp_path / "without_policy.html"  # escaping alone must be enough
    without.write_text(text.replace("Content-Security-Policy", "x-removed"))
    assert without.read_text() != text
    for found in seen(page, without):
        assert found and corpus.EXECUTED not in found
