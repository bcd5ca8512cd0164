"""Lists of samples to exclude, split into one file per shard.

reads   lists: Parquet with a column `sample_id` and optionally `reason`; folders of such files, as
        curation writes them; text files with one sample_id per line
writes  exclude/{stem}.parquet   EXCLUDED   for each shard with excluded samples
        exclude/manifest.json

Each task reads all lists in batches and keeps the rows of its own shards. So no task holds a whole
list, and writing a shard reads one small file.
"""

import io
import logging
import posixpath
from collections.abc import Iterator, Sequence
from hashlib import sha256

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts import layout, outputs, schemas
from pipeline.runtime import config, tasks
from pipeline.runtime.errors import UserError
from pipeline.runtime.reject_reasons import printable
from pipeline.store import storage, tables
from pipeline.store.storage import Folder

log = logging.getLogger(__name__)
MOST_TASKS = 128  # each reads all lists
TASK_SHARDS = 256  # shards of a task
BATCH_LINES = 1 << 16
PIECE_BYTES = 8 << 20
REASON_CHARS = 1000  # the text of a list is untrusted, and an error_message is one line
TEXTS = (".txt", ".list", ".lst")
FIELDS = ("sample_id", "reason")


def urls_of(given: Sequence[str]) -> tuple[str, ...]:
    """The absolute URLs in the setting, whose single text may hold several, separated by commas.

    They are absolute because tasks run in other folders.
    """
    listed = given[0].split(",") if len(given) == 1 else given
    found = (url.strip() for url in listed)
    return tuple(storage.absolute(url) for url in found if url)


def digest(url: str) -> str:
    """Changes with a list's content: the fingerprint in its manifest, else a hash of its bytes."""
    manifest = None if _is_file(url) else Folder(url).peek()
    if manifest is not None and "lists" in manifest:
        return str(manifest["fingerprint"])
    found = sha256()
    for name in files(url):
        with storage.open_read(name) as stream:
            while piece := stream.read(PIECE_BYTES):
                found.update(piece)
    return found.hexdigest()[:12]


def _is_file(url: str) -> bool:
    return url.endswith((".parquet", *TEXTS))


def files(url: str) -> list[str]:
    """The files of a list; UserError if there are none, or if it lists samples to keep."""
    if _is_file(url):
        if not storage.exists(url):
            raise UserError(f"write.exclude: {url} does not exist; correct it")
        return [url]
    folder = Folder(url)
    kind = (folder.peek() or {}).get("lists", "removed")
    if kind != "removed":
        raise UserError(
            f"write.exclude: {url} lists samples that are {kind}, not removed; give "
            "curation/duplicates, curation/outliers or curation/balance"
        )
    names = sorted(name for name in folder.names() if name.endswith(".parquet"))
    if not names:
        raise UserError(
            f"write.exclude: {url} holds no list; give Parquet with a column sample_id, a folder "
            "of such files, or a .txt with one sample_id per line"
        )
    if folder.peek() is None and "made_of" in tables.facts(folder.file(names[0])):
        raise UserError(
            f"write.exclude: {url} is not finished; first run the command that writes it"
        )
    return [folder.file(name) for name in names]


def batches(url: str) -> Iterator[pa.Table]:
    """The rows of one file of a list as tables of FIELDS; UserError if it has no sample_id."""
    if url.endswith(TEXTS):
        yield from _lines(url)
        return
    for rows in tables.batches(url, FIELDS):
        if "sample_id" not in rows.column_names:
            raise UserError(f"write.exclude: {url} has no column sample_id; add it")
        reasons = [f"listed in {posixpath.basename(url)}"] * rows.num_rows
        if "reason" in rows.column_names:
            found = rows["reason"].cast(pa.string()).to_pylist()
            reasons = [text or reason for text, reason in zip(found, reasons, strict=True)]
        ids = rows["sample_id"].cast(pa.string())
        yield pa.table({"sample_id": ids, "reason": pa.array(reasons, pa.string())})


def _lines(url: str) -> Iterator[pa.Table]:
    reason = f"listed in {posixpath.basename(url)}"
    with storage.open_read(url) as stream:
        lines = io.TextIOWrapper(stream, "utf-8-sig", newline="\n")
        try:
            while found := [line for _, line in zip(range(BATCH_LINES), lines, strict=False)]:
                ids = pa.array([i for line in found if (i := line.rstrip("\r\n"))], pa.string())
                reasons = pa.array([reason] * len(ids), pa.string())
                yield pa.table({"sample_id": ids, "reason": reasons})
        except UnicodeDecodeError as error:
            raise UserError(f"write.exclude: {url} is not UTF-8 ({error}); give text") from None


def _shards(rows: pa.Table) -> pa.ChunkedArray:
    """The stem of each row's shard: the sample_id up to its first slash."""
    return pc.list_element(pc.split_pattern(rows["sample_id"], "/", max_splits=1), 0)


def check(lists: Sequence[str], made: outputs.Manifests) -> None:
    """UserError if the lists name samples, but none of a shard of this run."""
    known = pa.array([facts["shard"]["stem"] for facts in made["embeddings"]["shards"]])
    seen = 0
    for rows in (rows for url in lists for name in files(url) for rows in batches(name)):
        seen += rows.num_rows
        if pc.any(pc.is_in(_shards(rows), known)).as_py():
            return
    if seen:
        raise UserError(
            f"write.exclude: none of {seen:,} ids in {', '.join(lists)} is of a shard of this run; "
            "give sample_ids in the form {shard}/{key}"
        )


def part(stems: Sequence[str], urls: list[str], folder: Folder, made_of: str) -> tuple[int, int]:
    """Commit the excluded samples of some shards: the numbers of all ids, and of these shards' ids.

    If a sample is listed twice, the reason is that of the first list.
    """
    wanted, found, seen = pa.array(stems, pa.string()), [], 0
    for number, url in enumerate(urls):
        for rows in batches(url):
            seen += rows.num_rows
            shards = _shards(rows)
            rows = rows.append_column("shard", shards)
            rows = rows.append_column("list", pa.array([number] * rows.num_rows, pa.int32()))
            found.append(rows.filter(pc.is_in(shards, wanted)))
    if not sum(rows.num_rows for rows in found):
        return seen, 0
    rows = pa.concat_tables(found).combine_chunks()
    rows = rows.sort_by([(name, "ascending") for name in ("shard", "sample_id", "list", "reason")])
    shards = rows["shard"].to_numpy()
    starts = np.flatnonzero(np.r_[True, shards[1:] != shards[:-1]]).tolist()
    for start, stop in zip(starts, [*starts[1:], len(shards)], strict=True):
        _write(rows.slice(start, stop - start), folder, made_of)
    return seen, len(shards)


def _write(rows: pa.Table, folder: Folder, made_of: str) -> None:
    reasons: dict[str, str] = {}
    for sample_id, reason in zip(*(rows[name].to_pylist() for name in FIELDS), strict=True):
        reasons.setdefault(sample_id, printable(reason[:REASON_CHARS]))
    columns = [list(reasons), list(reasons.values())]
    table = pa.table(dict(zip(FIELDS, columns, strict=True)), schema=schemas.EXCLUDED)
    url = folder.file(f"{rows['shard'][0].as_py()}.parquet")
    tables.write(url, table, made_of=made_of, rows=table.num_rows)


def run(
    lists: Sequence[str], digests: list[str], made: outputs.Manifests, paths: layout.RunPaths
) -> dict[str, int]:
    """Split the lists by shard, replacing earlier ones; returns the ids listed for each shard."""
    folder = paths.exclude
    if not digests:
        folder.clear()
        return {}
    made_of = config.digest({}, digests, made["embeddings"]["fingerprint"])
    before = folder.peek()
    if before is not None and before["fingerprint"] == made_of:
        return dict(before["parts"])
    folder.clear()
    stems = [facts["shard"]["stem"] for facts in made["embeddings"]["shards"]]
    urls = [name for url in lists for name in files(url)]
    chunks = tasks.chunks(stems, min(MOST_TASKS, -(-len(stems) // TASK_SHARDS)))
    counts = list(tasks.results(part, chunks, urls, folder, made_of))
    seen, own = counts[0][0], sum(of_these for _, of_these in counts)
    if own < seen:
        log.warning("write: %d of %d ids to exclude are of no shard of this run", seen - own, seen)
    parts = {stem: facts["rows"] for stem, facts in outputs.part_facts(folder, stems).items()}
    folder.finish(made_of, lists="ready", parts=parts, digests=digests)
    return parts


def reasons(stem: str, paths: layout.RunPaths) -> dict[str, str]:
    """sample_id -> why it is excluded, for one shard with excluded samples."""
    rows = tables.read(paths.exclude.file(f"{stem}.parquet"))
    return dict(zip(*(rows[name].to_pylist() for name in FIELDS), strict=True))
