"""Which columns of the files are vectors, ids and captions; whether they are alike in all files."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.embed.given import sources
from pipeline.embed.given.settings import Config
from pipeline.runtime.errors import UserError
from pipeline.store.listing import Shard

IDS = ("sample_id", "key", "id", "image_path", "image_id", "uid", "url")
CAPTIONS = ("caption", "text")
READERS = 32  # files whose columns are read at once
LISTED = 20  # columns in a message


@dataclass(frozen=True)
class Columns:
    """The columns that are read. Every other column of one value per row is kept as json."""

    vectors: tuple[str, ...]  # in the order of the views
    dims: tuple[int, ...]
    id: str
    caption: str  # "" for none; a file may lack it


def choose(cfg: Config, files: Sequence[Shard]) -> Columns:
    """The columns by the settings, else by the first file.

    UserError where a file lacks one, where its type is wrong, and where dimensions differ.
    """
    with ThreadPoolExecutor(READERS) as pool:
        schemas = list(pool.map(sources.schema, files))
        vectors = cfg.columns or _only_vectors(files[0], schemas[0])
        named = cfg.id_column or _first(IDS, schemas[0])
        if not named:
            raise UserError(
                f"{files[0].url} has no column of ids ({', '.join(IDS)}): set "
                f"embeddings.id_column to one of {_listed(schemas[0].names)}"
            )
        for file, schema in zip(files, schemas, strict=True):
            _check(file, schema, vectors, named, cfg)
        dims = []
        for name in vectors:
            found = list(pool.map(partial(dim, column=name), files, schemas))
            dims.append(_same(files, found, name))
    caption = cfg.caption_column or _first(CAPTIONS, schemas[0])
    return Columns(vectors, tuple(dims), named, caption)


def _first(names: Sequence[str], schema: pa.Schema) -> str:
    """The first of the names that there is, in any case of its letters; "" without one."""
    there = {name.lower(): name for name in reversed(schema.names)}
    return next((there[name] for name in names if name in there), "")


def _only_vectors(file: Shard, schema: pa.Schema) -> tuple[str, ...]:
    found = [field.name for field in schema if is_vectors(field.type)]
    if not found:
        raise UserError(
            f"{file.url} has no column of vectors, which are lists of floats; its columns: "
            f"{_listed(schema.names)}; give {sources.OPTION} files that have one"
        )
    if len(found) > 1:
        raise UserError(
            f"{file.url} has several columns of vectors: {_listed(found)}; set embeddings.columns, "
            "with the main one first"
        )
    return tuple(found)


def _check(file: Shard, schema: pa.Schema, vectors: Sequence[str], named: str, cfg: Config) -> None:
    """UserError where a column of a file is not there, or not of the right type."""
    wanted = [("columns", name, is_vectors, "lists of floats") for name in vectors]
    wanted.append(("id_column", named, _is_id, "text or numbers"))
    if cfg.caption_column:
        wanted.append(("caption_column", cfg.caption_column, is_text, "text"))
    for setting, name, fits, what in wanted:
        at = [i for i, other in enumerate(schema.names) if other == name]
        if len(at) != 1:
            how = "no column" if not at else f"{len(at)} columns"
            raise UserError(
                f"{file.url} has {how} {name!r} (embeddings.{setting}); its columns: "
                f"{_listed(schema.names)}"
            )
        if not fits(kind := schema.field(at[0]).type):
            raise UserError(
                f"{file.url}: column {name!r} (embeddings.{setting}) is of type {kind}, not "
                f"{what}; name another one"
            )


def is_vectors(kind: pa.DataType) -> bool:
    """Whether a column of this type has lists of floats."""
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(of(kind) for of in lists) and pa.types.is_floating(kind.value_type)


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type has texts."""
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_id(kind: pa.DataType) -> bool:
    return bool(is_text(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind))


def dim(file: Shard, schema: pa.Schema, column: str) -> int:
    """Dimensions of the vectors of a file: the commonest length in its first rows; 0 without."""
    kind = schema.field(column).type
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size)
    lengths = pc.drop_null(pc.list_value_length(sources.first_rows(file, column)))
    lengths = lengths.filter(pc.greater(lengths, 0))
    return int(pc.mode(lengths)[0]["mode"].as_py()) if len(lengths) else 0


def _same(files: Sequence[Shard], dims: Sequence[int], column: str) -> int:
    """The dimensions that all files with vectors have."""
    known = [(file, own) for file, own in zip(files, dims, strict=True) if own]
    if not known:
        raise UserError(
            f"{files[0].url}: column {column!r} has no vector in its first rows; name another one "
            "in embeddings.columns"
        )
    for file, own in known:
        if own != known[0][1]:
            raise UserError(
                f"{file.url}: the vectors of {column!r} have {own} dimensions, those of "
                f"{known[0][0].url} have {known[0][1]}; give files of one encoder"
            )
    return known[0][1]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:LISTED]) + (", …" if len(names) > LISTED else "")


def is_kept(field: pa.Field, wanted: Columns) -> bool:
    """Whether a column goes into the json: one value per row, as JSON can hold it."""
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    plain = (pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating, pa.types.is_null)
    also = (is_text, pa.types.is_temporal, pa.types.is_decimal)
    return field.name not in (wanted.id, wanted.caption) and any(of(kind) for of in (*plain, *also))
