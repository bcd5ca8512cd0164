"""The files of given embeddings: which there are, their columns, their rows block by block.

A file is Parquet with columns of vectors, or clip-retrieval's `img_emb/img_emb_{i}.npy` with
`metadata/metadata_{i}.parquet` beside it. The .npy then counts as the column `img_emb`.
"""

import posixpath
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.runtime.errors import UserError
from pipeline.runtime.redaction import HTTP
from pipeline.store import storage, tables
from pipeline.store.listing import Kind, Paired, Shard, list_files
from pipeline.store.storage import Folder

NPY = ".npy"
NPY_COLUMN = "img_emb"
BLOCK_ROWS = 4096  # rows held at once; a multiple of tables.ROW_GROUP_ROWS
OPTION = "--embeddings"
NO_FOLDER = (".parquet", NPY, ".txt", ".list", ".lst")
FILES = Kind((".parquet", NPY), "file", OPTION, f"correct {OPTION}")


def list_embeddings(url: str) -> list[Shard]:
    """The files of a folder, a glob, a brace pattern, a list file or one file, sorted by URL.

    Of a folder with `img_emb/`, the files in there. UserError where there are none, where .npy and
    .parquet are mixed, and for a .npy without its metadata.
    """
    inner = f"{url.rstrip('/')}/{NPY_COLUMN}"
    found = list_files(inner if _may_be_folder(url) and Folder(inner).names() else url, FILES)
    arrays = [file for file in found if _is_npy(file.url)]
    if not arrays:
        return found
    if len(arrays) < len(found):
        other = next(file.url for file in found if not _is_npy(file.url))
        raise UserError(
            f"{url} has .npy files and others: {arrays[0].url}, {other}; give {OPTION} files of "
            "one kind"
        )
    folders = {posixpath.dirname(metadata_url(file.url)) for file in arrays}
    beside = {f.url: f for folder in sorted(folders) for f in list_files(folder, FILES)}
    return [_with_metadata(file, beside) for file in arrays]


def pair(shards: list[Shard], files: list[Shard]) -> list[Shard]:
    """Each shard with the file of the same stem; UserError where one has no other."""
    by_stem = {file.stem: file for file in files}
    if odd := sorted(by_stem.keys() ^ {shard.stem for shard in shards}):
        raise UserError(
            f"{len(odd)} shards or files of embeddings have no partner, the first: {odd[0]}; give "
            "each shard, such as 00000.tar, a file of the same name, such as 00000.parquet, or "
            "leave --shards out"
        )
    pairs = [(shard, by_stem[shard.stem]) for shard in shards]
    return [
        Paired(**asdict(s), file_url=f.url, file_size=f.size, file_version=f.version)
        for s, f in pairs
    ]


def file_of(shard: Shard) -> Shard:
    """The file with the embeddings of a shard, or the shard itself where it is that file."""
    if isinstance(shard, Paired):
        return Shard(shard.stem, shard.file_url, shard.file_size, shard.file_version)
    return shard


def _may_be_folder(url: str) -> bool:
    return not (url.startswith(HTTP) or url.endswith(NO_FOLDER) or set(url) & set("{*?["))


def _is_npy(url: str) -> bool:
    return url.partition("?")[0].endswith(NPY)


def metadata_url(url: str) -> str:
    """The metadata of a .npy: `a/img_emb/img_emb_7.npy` -> `a/metadata/metadata_7.parquet`."""
    folder, _, name = url.rpartition("/")
    number = name.partition("?")[0].removesuffix(NPY).rpartition("_")[2]
    return f"{posixpath.dirname(folder)}/metadata/metadata_{number}.parquet"


def _with_metadata(file: Shard, beside: dict[str, Shard]) -> Shard:
    """The .npy, with a version that also changes with its metadata."""
    metadata = beside.get(url := metadata_url(file.url))
    if metadata is None:
        raise UserError(f"{file.url} needs {url}, with a row of metadata for each of its rows")
    return replace(file, version=f"{file.version} {metadata.size} {metadata.version}".strip())


@dataclass(frozen=True)
class Npy:
    """The header of a .npy of vectors."""

    rows: int
    dim: int
    dtype: np.dtype[Any]

    @classmethod
    def read(cls, stream: IO[bytes], url: str) -> "Npy":
        """Read the header, up to the first number; UserError unless it is of rows of floats."""
        remedy = "write it with np.save of a C-contiguous (rows, dimensions) array of floats"
        try:
            version = np.lib.format.read_magic(stream)
            header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version](stream)
        except (ValueError, KeyError) as error:
            raise UserError(f"{url} is no .npy that can be read ({error}); {remedy}") from None
        shape, fortran, dtype = header
        if len(shape) != 2 or dtype.kind != "f" or (fortran and min(shape) > 1):
            order = ", in Fortran order" if fortran else ""
            raise UserError(f"{url} has an array {shape} of {dtype}{order}; {remedy}")
        return cls(*shape, dtype)

    def vectors(self, stream: IO[bytes], rows: int) -> pa.FixedSizeListArray:
        """The next rows of the stream."""
        wanted = rows * self.dim * self.dtype.itemsize
        data = b""
        while len(data) < wanted and (more := stream.read(wanted - len(data))):
            data += more
        if len(data) < wanted:
            raise OSError(f"the .npy ends early, {wanted - len(data)} bytes before its header says")
        native = np.frombuffer(data, self.dtype).astype(self.dtype.newbyteorder("="), copy=False)
        return pa.FixedSizeListArray.from_arrays(pa.array(native), self.dim)


def schema(file: Shard) -> pa.Schema:
    """The columns of a file; UserError where it cannot be read or its rows do not pair up."""
    with _parquet(file) as parquet:
        found: pa.Schema = parquet.schema_arrow.remove_metadata()
        rows = parquet.metadata.num_rows
    if not _is_npy(file.url):
        return found
    with storage.open_pieces(file.url) as stream:
        npy = Npy.read(stream, file.url)
    if npy.rows != rows:
        raise UserError(
            f"{file.url} has {npy.rows} rows, {metadata_url(file.url)} has {rows}: give files of "
            "the same rows"
        )
    kind = pa.list_(pa.from_numpy_dtype(npy.dtype.newbyteorder("=")), npy.dim)
    kept = [field for field in found if field.name != NPY_COLUMN]
    return pa.schema([*kept, pa.field(NPY_COLUMN, kind)])


@contextmanager
def _parquet(file: Shard) -> Iterator[pq.ParquetFile]:
    """The Parquet of a file, or the metadata of a .npy; UserError if it is none."""
    url = metadata_url(file.url) if _is_npy(file.url) else file.url
    with storage.open_pieces(url) as stream:
        try:
            yield pq.ParquetFile(stream, buffer_size=tables.BUFFER_BYTES)
        except pa.ArrowInvalid as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{url} is no Parquet that can be read ({reason}); replace it"
            ) from None


def first_rows(file: Shard, column: str) -> pa.Array:
    """A column of the first rows of a file."""
    with _parquet(file) as parquet:
        for batch in parquet.iter_batches(tables.ROW_GROUP_ROWS, columns=[column]):
            return batch.column(0)
        return pa.array([], parquet.schema_arrow.field(column).type)


def blocks(file: Shard, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Columns of a file in the order of its rows, BLOCK_ROWS at a time."""
    if not _is_npy(file.url):
        yield from tables.batches(file.url, columns, BLOCK_ROWS)
        return
    named = [name for name in columns if name != NPY_COLUMN]
    metadata = tables.batches(metadata_url(file.url), named, BLOCK_ROWS)
    with storage.open_read(file.url, file.size) as stream:
        npy = Npy.read(stream, file.url)
        for block in metadata:
            yield block.append_column(NPY_COLUMN, npy.vectors(stream, len(block)))
