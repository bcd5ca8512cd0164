"""Which files there are, what belongs to a .npy, and the messages about mistakes."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.embed.given import sources
from pipeline.runtime.errors import UserError
from pipeline.store.listing import Shard
from tests.given_vectors import rows, write_clip_retrieval, write_parquet


def test_a_folder_a_glob_and_a_file(tmp_path):
    folder = write_parquet(tmp_path / "v", n=3)
    (folder / ".hidden.parquet").write_bytes(b"x")
    (folder / "_metadata").write_bytes(b"x")
    for pattern in (folder, f"{folder}/*.parquet", f"{folder}/{{00000,00001}}.parquet"):
        found = sources.list_embeddings(str(pattern))
        assert [file.stem for file in found] == ["00000", "00001"]
    assert [f.stem for f in sources.list_embeddings(f"{folder}/00001.parquet")] == ["00001"]


@pytest.mark.parametrize("inner", ["", "/img_emb", "/img_emb/*.npy", "/img_emb/img_emb_{0..1}.npy"])
def test_clip_retrieval(tmp_path, inner):
    folder = write_clip_retrieval(tmp_path / "v", n=5)
    found = sources.list_embeddings(f"{folder}{inner}")
    assert [file.stem for file in found] == ["img_emb_0", "img_emb_1"]
    assert sources.schema(found[0]).field("img_emb").type == pa.list_(pa.float16(), 32)
    (block,) = sources.blocks(found[1], ["image_path", "img_emb"])
    assert block["image_path"].to_pylist()[0] == "1-0000"
    x = np.load(folder / "img_emb" / "img_emb_1.npy")
    assert np.array_equal(np.stack(block["img_emb"].to_numpy()), x)


def test_the_version_of_a_npy_changes_with_its_metadata(tmp_path):
    folder = write_clip_retrieval(tmp_path / "v", n=5)
    before = sources.list_embeddings(str(folder))
    _, columns = rows(5)
    again = pa.table({"image_path": columns["key"], "more": columns["label"]})
    pq.write_table(again, folder / "metadata" / "metadata_1.parquet")
    after = sources.list_embeddings(str(folder))
    assert before[0] == after[0] and before[1].version != after[1].version


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8"])
def test_blocks_of_a_npy_are_its_rows(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(sources, "BLOCK_ROWS", 7)
    folder = write_clip_retrieval(tmp_path / "v", n=20, files=1, dtype=dtype)
    (file,) = sources.list_embeddings(str(folder))
    blocks = list(sources.blocks(file, ["image_path", "img_emb"]))
    assert [len(block) for block in blocks] == [7, 7, 6]
    x = np.stack(pa.concat_tables(blocks)["img_emb"].to_numpy())
    assert np.array_equal(x, np.load(folder / "img_emb" / "img_emb_0.npy"))


def test_a_store_that_is_not_local(tmp_path):
    import fsspec

    folder = write_clip_retrieval(tmp_path / "v", n=5)
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), f"/{tmp_path.name}", recursive=True)
    found = sources.list_embeddings(f"memory://{tmp_path.name}")
    assert len(found) == 2 and "img_emb" in sources.schema(found[0]).names
    assert sum(len(block) for block in sources.blocks(found[0], ["image_path", "img_emb"])) == 5


def save(folder, x, rows: int = 4) -> Shard:
    for name in ("img_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    np.save(folder / "img_emb" / "img_emb_0.npy", x, allow_pickle=True)
    table = pa.table({"image_path": [str(i) for i in range(rows)]})
    pq.write_table(table, folder / "metadata" / "metadata_0.parquet")
    (file,) = sources.list_embeddings(str(folder))
    return file


@pytest.mark.parametrize(
    ("x", "why"),
    [
        (np.zeros((3, 2), "f4"), "has 3 rows, .*metadata_0.parquet has 4"),
        (np.zeros(4, "f4"), r"an array \(4,\) of float32; write it with np.save"),
        (np.zeros((4, 2), "i4"), "of int32"),
        (np.asfortranarray(np.zeros((4, 2))), "in Fortran order"),
        (np.array([[1], [2, 3], 4, 5], object), "of object"),
    ],
)
def test_arrays_that_are_refused(tmp_path, x, why):
    with pytest.raises(UserError, match=why):
        sources.schema(save(tmp_path / "v", x))


def test_files_that_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no file matches .*nowhere.*correct --embeddings"):
        sources.list_embeddings(str(tmp_path / "nowhere"))
    folder = write_clip_retrieval(tmp_path / "v", n=5)
    (folder / "metadata" / "metadata_1.parquet").unlink()
    with pytest.raises(UserError, match=r"img_emb_1.npy needs .*metadata_1.parquet"):
        sources.list_embeddings(str(folder))
    write_parquet(folder / "img_emb", n=5, files=1)
    with pytest.raises(UserError, match=r"has .npy files and others: .*img_emb_0.npy"):
        sources.list_embeddings(str(folder))
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    (file,) = sources.list_embeddings(f"{tmp_path}/x.parquet")
    with pytest.raises(UserError, match=r"x.parquet is no Parquet that can be read"):
        sources.schema(file)
    (folder / "img_emb" / "img_emb_0.npy").write_bytes(b"\x93NUMPY\x09\x00")
    with pytest.raises(UserError, match=r"img_emb_0.npy is no .npy that can be read"):
        sources.schema(Shard("img_emb_0", f"{folder}/img_emb/img_emb_0.npy", 8, ""))
    (tmp_path / "a.csv").write_bytes(b"")
    with pytest.raises(UserError, match=r"a.csv is not a .parquet or .npy; correct --embeddings"):
        sources.list_embeddings(f"{tmp_path}/*.csv")


def test_a_npy_that_ends_early(tmp_path):
    file = save(tmp_path / "v", np.zeros((4, 2), "f4"))
    path = tmp_path / "v" / "img_emb" / "img_emb_0.npy"
    path.write_bytes(path.read_bytes()[:-1])
    cut = Shard(file.stem, file.url, file.size - 1, file.version)
    with pytest.raises(OSError, match=r"ends early, 1 bytes"):
        list(sources.blocks(cut, ["image_path", "img_emb"]))


def test_shards_and_files_are_paired_by_name():
    tars, files = ([Shard(s, f"/{s}{end}", 1, "v") for s in "ab"] for end in (".tar", ".parquet"))
    first, _ = sources.pair(tars, files)
    assert (first.url, first.file_url) == ("/a.tar", "/a.parquet")
    assert sources.file_of(first) == files[0] and sources.file_of(files[1]) == files[1]
    for some, others in ((tars, files[:1]), (tars[1:], files)):
        with pytest.raises(UserError, match=r"1 shards or files .* no partner, the first"):
            sources.pair(some, others)
