"""Packing: what a folder or CIFAR becomes, the same on every run, and nothing else touched."""

import hashlib
import json
import os

import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from pipeline.prepare import pack
from pipeline.prepare import settings as pack_settings
from pipeline.runtime.errors import UserError
from pipeline.store import storage
from pipeline.store.shards import ShardReader


def save(path, color=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (color, 0, 0)).save(path)


@pytest.fixture
def folder(tmp_path):
    """12 images in two classes and one without, captions, and files that are no images."""
    root = tmp_path / "pictures"
    for i in range(5):
        save(root / "cats" / f"{i}.jpg", i)
        save(root / "dogs" / "big" / f"{i}.PNG", 100 + i)
    save(root / "odd one.webp", 200)
    (root / "cats" / "0.txt").write_text(" a cät \n")
    (root / "cats" / "1.txt").write_text("\n")
    (root / "dogs" / "broken.jpeg").write_bytes(b"\xff\xd8 not really")
    (root / "notes.txt").write_text("no image has this name")
    (root / "data.csv").write_text("1")
    (root / "cats" / "._0.jpg").write_bytes(b"resource fork")
    return root


def packed(folder, out, **settings) -> list[int]:
    pictures, _ = pack.folder_pictures(str(folder))
    plans = pack.plan(pictures, pack_settings.Config(**settings))
    return [pack.pack_shard(shard, str(out)) for shard in plans]


def samples_in(out):
    for path in sorted(out.glob("*.tar")):
        with path.open("rb") as stream:
            reader = ShardReader(stream, None)
            yield from reader
            assert reader.end == "complete"


def files(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_every_image_is_packed_once_with_its_own_bytes(folder, tmp_path):
    assert packed(folder, tmp_path / "out", samples_per_shard=5) == [5, 5, 2]
    facts = {}
    for sample in samples_in(tmp_path / "out"):
        assert sample.problem is None
        record = json.loads(sample.json_text())
        original = (folder / record["source"]).read_bytes()
        assert sample.image().data == original
        assert record["sha256"] == hashlib.sha256(original).hexdigest()
        assert record["key"] == sample.key and record["caption"] == sample.caption()
        assert (record["status"], record["error_message"]) == ("success", None)
        facts[record["source"]] = record
    assert len(facts) == 12
    assert {facts[s]["label"] for s in facts if s.startswith("cats/")} == {"cats"}
    assert facts["dogs/big/3.PNG"]["label"] == "big"
    assert facts["odd one.webp"]["label"] is None
    assert (facts["cats/2.jpg"]["width"], facts["cats/2.jpg"]["height"]) == (8, 6)
    assert facts["dogs/broken.jpeg"]["width"] is facts["dogs/broken.jpeg"]["height"] is None
    captions = {s: r["caption"] for s, r in facts.items() if r["caption"] is not None}
    assert captions == {"cats/0.jpg": "a cät"}


def test_the_habits_of_img2dataset(folder, tmp_path):
    out = tmp_path / "out"
    packed(folder, out, samples_per_shard=5)
    stems = ["00000", "00001", "00002"]
    assert sorted(files(out)) == sorted(
        f"{stem}{end}" for stem in stems for end in (".tar", ".parquet", "_stats.json")
    )
    keys = [sample.key for sample in samples_in(out)]
    assert keys == [f"{n // 5:05d}{n % 5:04d}" for n in range(12)]
    stats = json.loads((out / "00002_stats.json").read_bytes())
    assert stats == {"count": 2, "successes": 2, "failed_to_download": 0, "failed_to_resize": 0}
    rows = [row for stem in stems for row in pq.read_table(out / f"{stem}.parquet").to_pylist()]
    assert rows == [json.loads(sample.json_text()) for sample in samples_in(out)]
    theirs = webdataset.WebDataset(str(out / "00000.tar"), shardshuffle=False).decode(
        "pil", only="json"
    )
    assert [sample["json"] for sample in theirs] == rows[:5]


def test_members_are_ordered_as_in_img2dataset(folder, tmp_path):
    packed(folder, tmp_path / "out")
    members = {s.key: [m.suffix for m in s.members] for s in samples_in(tmp_path / "out")}
    assert sorted(map(tuple, members.values())) == sorted(
        [("jpg", "txt", "json"), ("webp", "json"), ("jpeg", "json")]
        + [("jpg", "json")] * 4
        + [("png", "json")] * 5
    )


def test_same_bytes_on_every_run_and_another_order_with_another_seed(folder, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        packed(folder, tmp_path / name, samples_per_shard=5, shuffle_seed=seed)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert (tmp_path / "a/00000.tar").read_bytes() != (tmp_path / "c/00000.tar").read_bytes()


def test_the_shuffle_mixes_classes(tmp_path):
    pictures = [pack.Picture(f"{c}/{i}", c, tmp_path) for c in "abcd" for i in range(250)]
    plans = pack.plan(pictures, pack_settings.Config(samples_per_shard=100))
    assert all({p.label for p in shard.pictures} == set("abcd") for shard in plans)
    assert sorted(p.source for s in plans for p in s.pictures) == sorted(p.source for p in pictures)
    assert pack.plan(pictures, pack_settings.Config(samples_per_shard=100)) == plans


def test_files_left_out_are_counted(folder):
    pictures, left_out = pack.folder_pictures(str(folder))
    assert len(pictures) == 12
    assert left_out == {".txt": 1, ".csv": 1, ".jpg": 1}  # notes.txt, data.csv, ._0.jpg


def test_folders_of_photo_managers_are_left_out(folder):
    for name in (".thumbnails", "@eaDir", "cats/@eaDir", "__MACOSX"):
        save(folder / name / "0.jpg", 1)
    pictures, left_out = pack.folder_pictures(str(folder))
    assert len(pictures) == 12
    assert left_out["@eaDir/"] == 2 and left_out[".thumbnails/"] == left_out["__MACOSX/"] == 1


def test_jpegs_by_other_names_and_captions_in_capitals(tmp_path):
    for name in ("a.jfif", "b.jpe", "c.JPEG"):
        Image.new("RGB", (8, 6)).save(tmp_path / name, "JPEG")
    (tmp_path / "c.TXT").write_text("\ufeffa caption", encoding="utf-8")
    pictures, left_out = pack.folder_pictures(str(tmp_path))
    assert [p.source for p in pictures] == ["a.jfif", "b.jpe", "c.JPEG"] and not left_out
    assert pack.sample(pictures[2], "0")[0]["caption"] == "a caption"


def test_links_that_leave_the_folder_are_not_followed(folder, tmp_path):
    save(tmp_path / "secret" / "s.jpg", 9)
    (tmp_path / "secret" / "s.txt").write_text("secret")
    (folder / "cats" / "out.jpg").symlink_to(tmp_path / "secret" / "s.jpg")
    (folder / "cats" / "2.txt").symlink_to(tmp_path / "secret" / "s.txt")
    (folder / "elsewhere").symlink_to(tmp_path / "secret")
    (folder / "loop").symlink_to(folder)
    (folder / "cats" / "in.jpg").symlink_to(folder / "cats" / "0.jpg")
    (folder / "cats" / "gone.jpg").symlink_to("nowhere.jpg")
    pictures, _ = pack.folder_pictures(str(folder))
    assert {p.source for p in pictures if p.path.is_symlink()} == {"cats/in.jpg"}
    assert len(pictures) == 13
    packed(folder, tmp_path / "out")
    assert b"secret" not in b"".join(files(tmp_path / "out").values())


def test_names_that_are_not_utf8(folder, tmp_path):
    name = os.fsdecode(b"caf\xe9.jpg")
    try:
        (folder / "cats" / name).write_bytes((folder / "cats" / "0.jpg").read_bytes())
    except OSError:
        pytest.skip("this file system has no such names")
    packed(folder, tmp_path / "out")
    sources = pq.read_table(tmp_path / "out" / "00000.parquet")["source"].to_pylist()
    assert "cats/caf\\xe9.jpg" in sources


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        pack.folder_pictures(str(tmp_path / "none"))
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match=r"no images .* among 1 files"):
        pack.folder_pictures(str(tmp_path))
    with pytest.raises(UserError, match="samples_per_shard = 0"):
        pack_settings.Config(samples_per_shard=0)
    with pytest.raises(UserError, match="samples_per_shard = 10001"):
        pack_settings.Config(samples_per_shard=10_001)


def test_what_is_there_is_known_by_what_it_was_made_from(folder, tmp_path):
    out = tmp_path / "out"
    cfg = pack_settings.Config(samples_per_shard=5)
    shards = pack.plan(pack.folder_pictures(str(folder))[0], cfg)
    assert pack.find_done(shards, str(out)) == set()
    pack.pack_shard(shards[0], str(out))
    pack.pack_shard(shards[1], str(out))
    (out / "00001_stats.json").unlink()
    assert pack.find_done(shards, str(out)) == {"00000"}
    (out / "00000.parquet").write_bytes(b"not ours")
    with pytest.raises(UserError, match=r"1 shards of other images or settings \(00000.tar\)"):
        pack.find_done(shards, str(out))


@pytest.mark.parametrize("settings", [{"shuffle_seed": 1}, {"samples_per_shard": 12}])
def test_shards_of_other_settings_are_not_mixed(folder, tmp_path, settings):
    packed(folder, tmp_path / "out", samples_per_shard=5)
    pictures, _ = pack.folder_pictures(str(folder))
    shards = pack.plan(pictures, pack_settings.Config(**{"samples_per_shard": 5} | settings))
    with pytest.raises(UserError, match="choose an empty folder"):
        pack.find_done(shards, str(tmp_path / "out"))


def test_a_shard_that_fails_leaves_nothing(folder, tmp_path):
    pictures, _ = pack.folder_pictures(str(folder))
    (shard,) = pack.plan(pictures, pack_settings.Config())
    shard.pictures[-1].path.unlink()
    with pytest.raises(FileNotFoundError):
        pack.pack_shard(shard, str(tmp_path / "out"))
    assert files(tmp_path / "out") == {}


def test_packs_into_any_store(folder, tmp_path):
    packed(folder, tmp_path / "out")
    url = f"memory://{tmp_path.name}/out"
    pictures, _ = pack.folder_pictures(str(folder))
    (shard,) = pack.plan(pictures, pack_settings.Config())
    pack.pack_shard(shard, url)
    assert {name: storage.read_bytes(f"{url}/{name}") for name in storage.Folder(url).names()} == (
        files(tmp_path / "out")
    )
    assert pack.find_done([shard], url) == {"00000"}


@pytest.mark.ray
def test_run_packs_the_same_bytes_and_only_what_is_missing(folder, tmp_path, ray_session):
    cfg = pack_settings.Config(samples_per_shard=5)
    packed(folder, tmp_path / "alone", samples_per_shard=5)
    out = tmp_path / "out"
    counts = pack.run(cfg, str(folder), str(out))
    assert counts == {
        "shards": 3, "shards_made": 3, "samples": 12, "samples_packed": 12, "files_left_out": 3,
    }  # fmt: skip
    assert files(out) == files(tmp_path / "alone")
    (out / "00001_stats.json").unlink()
    kept = (out / "00000.tar").stat().st_mtime_ns
    counts = pack.run(cfg, str(folder), str(out))
    assert (counts["shards_made"], counts["samples_packed"]) == (1, 5)
    assert (out / "00000.tar").stat().st_mtime_ns == kept
    assert files(out) == files(tmp_path / "alone")


@pytest.mark.ray
def test_run_refuses_an_output_with_other_shards(folder, tmp_path, ray_session):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "00007.tar").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"00007\.tar"):
        pack.run(pack_settings.Config(), str(folder), str(tmp_path / "out"))
    assert files(tmp_path / "out") == {"00007.tar": b"mine"}
