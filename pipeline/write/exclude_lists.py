"""Samples that are to be left out: lists of them, made ready for one shard at a time.

reads   lists: Parquet with a column `sample_id`, and `reason` if it likes; folders of it, as
        curation leaves them; text files of one sample_id per line
writes  exclude/{stem}.parquet   EXCLUDED   of each shard that has any
        exclude/manifest.json

Lists are read in batches by tasks for some of the shards each, which keep what is theirs: none
holds a whole list, and writing a shard reads a file of its own.
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
TASK_SHARDS = 256  # for fewer one is enough
BATCH_LINES = 1 << 16
PIECE_BYTES = 8 << 20
REASON_CHARS = 1000  # a list is data, and an error_message is one line
TEXTS = (".txt", ".list", ".lst")
FIELDS = ("sample_id", "reason")


def urls_of(given: Sequence[str]) -> tuple[str, ...]:
    """Of a setting whose only text may hold several; absolute, since tasks run elsewhere."""
    listed = given[0].split(",") if len(given) == 1 else given
    found = (url.strip() for url in listed)
    return tuple(storage.absolute(url) for url in found if url)


def digest(url: str) -> str:
    """What changes with a list's content: its manifest's fingerprint, else a hash of its bytes."""
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
    """Those of a list; UserError where there are none, or they are no list of what to leave out."""
    if _is_file(url):
        if not storage.exists(url):
            raise UserError(f"write.exclude: {url} is not there; correct it")
        return [url]
    folder = Folder(url)
    kind = (folder.peek() or {}).get("lists", "removed")
    if kind != "removed":
        raise UserError(
            f"write.exclude: {url} lists what is {kind}, not what is removed; give "
            "curation/duplicates, curation/outliers or curation/balance"
        )
    names = sorted(name for name in folder.names() if name.endswith(".parquet"))
    if not names:
        raise UserError(
            f"write.exclude: {url} holds no list; give Parquet with a column sample_id, a folder "
            "of it, or a .txt of one sample_id per line"
        )
    if folder.peek() is None and "made_of" in tables.facts(folder.file(names[0])):
        raise UserError(
            f"write.exclude: {url} is not finished; run the command that makes it first"
        )
    return [folder.file(name) for name in names]


def batches(url: str) -> Iterator[pa.Table]:
    """FIELDS of one file of a list, some rows at a time."""
    if url.endswith(TEXTS):
        yield from _lines(url)
        return
    for rows in tables.batches(url, FIELDS):
        if "sample_id" not in rows.column_names:
            raise UserError(f"write.exclude: {url} has no column sample_id; give it one")
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
    """Of each row the stem of its shard, which has no slash."""
    return pc.list_element(pc.split_pattern(rows["sample_id"], "/", max_splits=1), 0)


def check(lists: Sequence[str], made: outputs.Manifests) -> None:
    """UserError where the lists name samples, but none of a shard of this run."""
    known = pa.array([facts["shard"]["stem"] for facts in made["embeddings"]["shards"]])
    seen = 0
    for rows in (rows for url in lists for name in files(url) for rows in batches(name)):
        seen += rows.num_rows
        if pc.any(pc.is_in(_shards(rows), known)).as_py():
            return
    if seen:
        raise UserError(
            f"write.exclude: none of {seen:,} ids in {', '.join(lists)} is of a shard of this run; "
            "give sample_ids, {shard}/{key}"
        )


def part(stems: Sequence[str], urls: list[str], folder: Folder, made_of: str) -> tuple[int, int]:
    """Commit what the lists say of some shards; (ids in the lists, those of them of these shards).

    Of a sample that is listed twice the first list tells the reason.
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
    """Make the lists ready, forget those of before; how many samples of each shard are named."""
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
    """sample_id -> why it is left out, of one shard that has any."""
    rows = tables.read(paths.exclude.file(f"{stem}.parquet"))
    return dict(zip(*(rows[name].to_pylist() for name in FIELDS), strict=True))
