"""Which columns are read, and every mistake that is refused before any work."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.embed.given import columns, importing, sources
from pipeline.embed.given.settings import Config, check
from pipeline.runtime.errors import UserError
from tests.given_vectors import write_clip_retrieval, write_parquet


def choose(folder, **settings) -> columns.Columns:
    return columns.choose(Config(**settings), sources.list_embeddings(str(folder)))


def test_defaults_and_settings(tmp_path):
    folder = write_parquet(tmp_path / "one", n=3, leave_out=("dino",))
    assert choose(folder) == columns.Columns(("clip",), (32,), "key", "caption")
    folder = write_parquet(tmp_path / "two", n=3)
    found = choose(folder, columns=("dino", "clip"), id_column="width", caption_column="label")
    assert found == columns.Columns(("dino", "clip"), (16, 32), "width", "label")
    folder = write_clip_retrieval(tmp_path / "npy", n=3)
    assert choose(folder) == columns.Columns(("img_emb",), (32,), "image_path", "caption")


def test_names_are_found_in_any_case(tmp_path):
    table = pa.table({"SAMPLE_ID": [1.0], "TEXT": ["a"], "v": pa.array([[1.0, 2.0]])})
    pq.write_table(table, tmp_path / "laion.parquet")
    assert choose(tmp_path) == columns.Columns(("v",), (2,), "SAMPLE_ID", "TEXT")


def test_the_dimension_is_the_commonest_length(tmp_path):
    ragged = pa.array([None, [], [1.0], [1.0, 2.0], [3.0, 4.0]])
    pq.write_table(pa.table({"id": range(5), "v": ragged}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"id": range(5), "v": ragged}).slice(0, 0), tmp_path / "b.parquet")
    assert choose(tmp_path).dims == (2,)


WHOLE = {"id": ["a"], "v": [[1.0, 2.0]], "w": [[1.0]], "n": [1], "t": ["x"], "s": [["x"]]}


@pytest.mark.parametrize(
    ("keep", "settings", "why"),
    [
        ("in", {}, "a.parquet has no column of vectors, which are lists of floats; its columns: i"),
        ("ivw", {}, "several columns of vectors: v, w; set embeddings.columns"),
        ("v", {}, r"no column of ids \(sample_id, key.*set embeddings.id_column to one of v"),
        ("iv", {"columns": ("x",)}, r"no column 'x' \(embeddings.columns\); its columns: id, v"),
        ("ivt", {"columns": ("t",)}, r"'t' \(embeddings.columns\) is of type string, not lists"),
        ("iv", {"id_column": "v"}, r"'v' \(embeddings.id_column\) is of type list"),
        ("ivn", {"caption_column": "n"}, r"'n' \(embeddings.caption_column\) is of type int64"),
        ("iv", {"caption_column": "c"}, r"no column 'c' \(embeddings.caption_column\)"),
    ],
)
def test_columns_that_are_refused(tmp_path, keep, settings, why):
    pq.write_table(pa.table({n: WHOLE[n] for n in WHOLE if n[0] in keep}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=why):
        choose(tmp_path, **settings)


def test_files_that_are_not_alike_are_refused(tmp_path):
    for name, vector in (("a", [1.0, 2.0]), ("b", [1.0, 2.0, 3.0])):
        pq.write_table(pa.table({"id": ["x"], "v": [vector]}), tmp_path / f"{name}.parquet")
    with pytest.raises(
        UserError, match=r"b.parquet: the vectors of 'v' have 3 dim.*a.parquet have 2"
    ):
        choose(tmp_path)
    pq.write_table(pa.table({"id": ["x"], "u": [[1.0]]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b.parquet has no column 'v' \(embeddings.columns\)"):
        choose(tmp_path)
    pq.write_table(pa.table({"v": [[1.0]]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b.parquet has no column 'id' \(embeddings.id_column\)"):
        choose(tmp_path)


def test_a_column_without_any_vector_is_refused(tmp_path):
    empty = pa.array([None, []], pa.list_(pa.float32()))
    pq.write_table(pa.table({"id": ["a", "b"], "v": empty}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet: column 'v' has no vector in its first rows"):
        choose(tmp_path)


def test_a_model_must_have_the_dimensions_of_the_first_column(tmp_path):
    files = sources.list_embeddings(str(write_parquet(tmp_path / "v", n=3)))
    for model, dim in (("pico-clip", 256), ("ViT-B-32", 512)):
        cfg = Config(columns=("clip",), model=model, pretrained="openai" * (model != "pico-clip"))
        why = f"'{model}': its texts have {dim} dimensions, the vectors of 'clip' have 32"
        with pytest.raises(UserError, match=why):
            importing.prepare(cfg, files)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"columns": ("a", "a")}, r"embeddings.columns = \['a', 'a'\]: 'a' is named twice"),
        ({"pretrained": "openai"}, "embeddings.pretrained = 'openai' needs embeddings.model"),
        ({"max_reject_fraction": 2.0}, "embeddings.max_reject_fraction = 2.0"),
        ({"max_sample_bytes": 0}, "embeddings.max_sample_bytes = 0"),
        ({"model": "pico-resnet"}, "embeddings.model = 'pico-resnet' has no text encoder"),
        ({"model": "no-such"}, "unknown model 'no-such'"),
    ],
)
def test_settings_that_are_refused(settings, why):
    with pytest.raises(UserError, match=why):
        check(Config(**settings))
