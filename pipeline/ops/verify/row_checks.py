"""Checks the rows of one shard in every table of a run.

It shares no code with the stages, except how json columns are read.

reads   embeddings/, rejects/, assignments/, exclude/, labels/ of one stem; each is read whole,
        except the vectors, which are read in batches

k clusters.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.artifacts import layout, schemas
from pipeline.ops.verify.violations import (
    DAMAGE,
    Violations,
    footer,
    open_part,
    read_part,
)
from pipeline.store import columns, tables
from pipeline.store.storage import Folder

BATCH_ROWS = 4096
UNIT = 1e-3  # tolerance of the length of a float16 vector
CLOSE = 1e-5  # tolerance of a float32
IDENTITY = [name for name, _ in schemas.IDENTITY]


@dataclass(frozen=True)
class RunFacts:
    """Facts from the manifests that all shards share; None for stages that have not run."""

    paths: layout.RunPaths
    embedded: str  # fingerprint in the footers of embed's parts
    encoders: list[dict[str, Any]]  # column, model, pretrained and dim of each
    columns: dict[str, str]  # kinds of the json columns
    clustered: str | None  # fingerprint of the clusters
    k: int
    groups: list[dict[str, Any]]  # cluster_id and levels of each small group
    captions: list[str | None] | None  # of each cluster
    levels: list[dict[int, str | None]]  # captions of the clusters of each level
    written: str | None  # fingerprint of the labels
    excluded: dict[str, int]  # stem -> rows of exclude/, where it has any
    shards: bool  # whether the input is shards
    tars: bool  # whether there are labelled shards
    limit: int  # bytes of a sample that embed read


@dataclass
class Shard:
    """The tables of one shard as far as they can be read, and their violations."""

    run: RunFacts
    facts: dict[str, Any]  # about the shard, from the manifest of the embeddings
    found: Violations = field(default_factory=Violations)
    sizes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    keys: set[str] | None = None  # of the samples, embedded or rejected
    labels: pa.Table | None = None

    @property
    def stem(self) -> str:
        return str(self.facts["shard"]["stem"])

    def add(self, folder: str, what: str, keys: Iterable[str] = ("",)) -> None:
        """Add a violation of the shard's part in a folder, or one for each key."""
        self.found.add(f"{folder}/{self.stem}", what, keys)


def check_rows(facts: dict[str, Any], run: RunFacts) -> Shard:
    """Check all tables of one shard."""
    shard = Shard(run, facts, sizes=np.zeros(run.k, np.int64))
    embedded, rejected = _embedded(shard), _rejected(shard)
    if embedded is not None and rejected is not None:
        _every_sample_once(shard, embedded, rejected)
    if run.clustered is None:
        return shard
    assigned, same = _assigned(shard), False
    if embedded is not None and assigned is not None:
        same = _same_samples(shard, "assignments", assigned, embedded["sample_id"])
    if run.written is None or run.captions is None:
        return shard
    schema = schemas.labels_schema(run.columns, len(run.levels))
    shard.labels = _part(shard, run.paths.labels, schema, {"made_of": run.written})
    left_out = _excluded(shard)
    if same and rejected is not None and shard.labels is not None and left_out is not None:
        wanted = expected(embedded, assigned, rejected, left_out, run)
        _labels_agree(shard, wanted, shard.labels)
    return shard


def _excluded(shard: Shard) -> pa.Table | None:
    """Check exclude/: the number of rows in its manifest; no table for other shards."""
    if shard.stem not in shard.run.excluded:
        return schemas.EXCLUDED.empty_table()
    table = _part(shard, shard.run.paths.exclude, schemas.EXCLUDED, {})
    if table is not None:
        _count(shard, "exclude", table, shard.run.excluded[shard.stem])
    return table


def _count(shard: Shard, folder: str, table: pa.Table, wanted: int, what: str = "rows") -> None:
    if table.num_rows != wanted:
        shard.add(folder, f"has {table.num_rows} {what}, not {wanted}")


def _complete(shard: Shard, folder: str, table: pa.Table, names: Iterable[str]) -> bool:
    """Whether every row has a value in these columns; adds a violation otherwise."""
    empty = [name for name in names if table[name].null_count]
    if empty:
        shard.add(folder, f"has rows without {', '.join(empty)}")
    return not empty


def _part(
    shard: Shard, folder: Folder, schema: pa.Schema, facts: dict[str, Any], counted: bool = True
) -> pa.Table | None:
    """Read one table of the shard and check its footer, with the number of rows if `counted`."""
    name = folder.url.rpartition("/")[2]
    place = f"{name}/{shard.stem}"
    file = open_part(folder.file(f"{shard.stem}.parquet"), place, shard.found)
    table = read_part(file, schema, place, shard.found)
    if file is not None and table is not None:
        _check_footer(shard, name, file, facts | ({"rows": table.num_rows} if counted else {}))
    return table


def _check_footer(shard: Shard, folder: str, file: pq.ParquetFile, facts: dict[str, Any]) -> None:
    there = footer(file)
    for name, wanted in sorted(facts.items()):
        if (value := there.get(name)) != wanted:
            shard.add(folder, f"its footer says {name} = {value!r}, not {wanted!r}")


def _embedded(shard: Shard) -> pa.Table | None:
    """Check embeddings/; returns the rows without the vectors."""
    name, place, facts = "embeddings", f"embeddings/{shard.stem}", shard.facts
    file = open_part(shard.run.paths.embeddings.file(f"{shard.stem}.parquet"), place, shard.found)
    if file is None:
        return None
    run = shard.run
    vectors = [encoder["column"] for encoder in run.encoders]
    schema = schemas.embeddings_schema(*(encoder["dim"] for encoder in run.encoders))
    table = read_part(file, schema, place, shard.found, leave_out=vectors)
    if table is None:
        return None
    made_by = [
        {key: e.get(key) for key in run.encoders[0]} for e in footer(file).get("encoders", ())
    ]
    if made_by != run.encoders:
        shard.add(name, f"its footer names other encoders than the manifest: {made_by}")
    recorded = {fact: facts[fact] for fact in ("samples", "embedded", "rejected", "end")}
    _check_footer(shard, name, file, {**recorded, "stage": run.embedded})
    was = footer(file).get("shard", {})
    same = {*facts["shard"]} - {"url", "file_url", "now", "content"}  # files may have moved
    if any(was.get(fact) != facts["shard"][fact] for fact in same):
        shard.add(name, "its footer names another input shard than the manifest")
    _count(shard, name, table, facts["embedded"])
    if not _identified(shard, name, table):
        return None
    try:
        for column in vectors:
            for keys, what in _not_unit(file, table["sample_id"], column):
                shard.add(name, what, keys)
    except DAMAGE as error:
        shard.add(name, f"cannot be read: {error}")
    return table


def _not_unit(
    file: pq.ParquetFile, ids: pa.ChunkedArray, name: str
) -> Iterator[tuple[list[str], str]]:
    """Samples whose embeddings in a column are not vectors of unit length."""
    start = 0
    for batch in file.iter_batches(BATCH_ROWS, columns=[name]):
        own, column = ids.slice(start, len(batch)), batch[name]
        start += len(batch)
        if column.null_count or column.flatten().null_count:
            yield [""], f"has rows without {name}"
            return
        length = np.linalg.norm(tables.to_matrix(column).astype(np.float32), axis=1)
        finite = np.isfinite(length)
        yield own.filter(pa.array(~finite)).to_pylist(), f"{name} is not finite"
        off = finite & (np.abs(length - 1) > UNIT)
        yield own.filter(pa.array(off)).to_pylist(), f"{name} is not of unit length"


def _rejected(shard: Shard) -> pa.Table | None:
    """Check rejects/; returns the rows of samples. The others describe damage of the shard."""
    name, rejects, facts = "rejects", shard.run.paths.rejects, {"stage": shard.run.embedded}
    table = _part(shard, rejects, schemas.REJECTS, facts, counted=False)
    if table is None:
        return None
    sample = pc.is_valid(table["sample_id"])
    damage = table.filter(pc.invert(sample))["reason"].to_pylist()
    wanted = [] if shard.facts["end"] == "complete" else [f"shard: {shard.facts['end']}"]
    if damage != wanted:
        shard.add(name, f"reports the damage {damage}, not {wanted}")
    table = table.filter(sample)
    _count(shard, name, table, shard.facts["rejected"], "samples")
    unexplained = table.filter(pc.equal(pc.utf8_length(pc.fill_null(table["reason"], "")), 0))
    shard.add(name, "is rejected without a reason", unexplained["sample_id"].to_pylist())
    return table if _identified(shard, name, table) else None


def _identified(shard: Shard, folder: str, table: pa.Table) -> bool:
    """Check sample_id = {stem}/{key}, where a repeated key gets #2, #3, …"""
    if not _complete(shard, folder, table, IDENTITY):
        return False
    rows = zip(*(table[name].to_pylist() for name in ("sample_id", "shard", "key")), strict=True)
    for sample_id, stem, key in rows:
        whole = f"{shard.stem}/{key}"
        again = sample_id.startswith(whole) and re.fullmatch(r"(#\d+)?", sample_id[len(whole) :])
        if stem != shard.stem or not again:
            shard.add(folder, f"sample_id is not {whole}", [sample_id])
    return True


def _every_sample_once(shard: Shard, embedded: pa.Table, rejected: pa.Table) -> None:
    """Check that embedded and rejected rows together are the samples of the tar."""
    name, wanted = "embeddings/ and rejects", shard.facts["samples"]
    both = pa.concat_tables([embedded.select(IDENTITY), rejected.select(IDENTITY)])
    twice = [key for key, n in Counter(both["sample_id"].to_pylist()).items() if n > 1]
    shard.add(name, "is there more than once", twice)
    shard.keys = set(both["key"].to_pylist())
    if sorted(both["index"].to_pylist()) != list(range(wanted)):
        shard.add(name, f"do not hold the {wanted} samples of the tar once each, by index")


def _assigned(shard: Shard) -> pa.Table | None:
    """Check assignments/ and count the clusters' sizes."""
    name, run = "assignments", shard.run
    table = _part(shard, run.paths.assignments, schemas.ASSIGNMENTS, {"made_of": run.clustered})
    if table is None or not _complete(shard, name, table, table.column_names):
        return None
    for row in table.to_pylist():
        if problem := _unsound(row, run.k) or _misplaced(row, run.groups):
            shard.add(name, problem, [row["sample_id"]])
    cluster = table["cluster_id"].to_numpy()
    inside = cluster[(cluster >= 0) & (cluster < run.k)]
    shard.sizes += np.bincount(inside, minlength=run.k)
    return table


def _unsound(row: dict[str, Any], k: int) -> str:
    """The fault of one assignment; "" if there is none."""
    clusters, shares = row["top_clusters"], row["top_shares"]
    if not 0 <= row["cluster_id"] < k:
        return "cluster_id is out of range"
    if not -CLOSE <= row["outlier_score"] <= 2 + CLOSE:
        return "outlier_score is not within 0 and 2"
    if len(shares) != len(clusters) or len(clusters) != min(schemas.TOP, k):
        return "top_clusters and top_shares are not of the right length"
    if len(set(clusters)) < len(clusters) or not all(0 <= c < k for c in clusters):
        return "top_clusters are not different clusters"
    if not all(-CLOSE <= share <= 1 + CLOSE for share in shares) or sum(shares) > 1 + CLOSE:
        return "top_shares are not shares of 1"
    if any(shares[i] < shares[i + 1] - CLOSE for i in range(len(shares) - 1)):
        return "top_shares are not sorted"
    if row["cluster_id"] != clusters[0] or abs(row["confidence"] - shares[0]) > CLOSE:
        return "cluster_id and confidence are not the first of the top"
    if abs(row["margin"] - (shares[0] - (shares[1] if k > 1 else 0))) > CLOSE:
        return "margin is not the difference of the first two shares"
    return ""


def _misplaced(row: dict[str, Any], groups: list[dict[str, Any]]) -> str:
    """The fault of the small group of an assignment; "" if there is none, or no table of groups."""
    if not groups:
        return ""
    if not 0 <= row["group"] < len(groups):
        return "group is out of range"
    if groups[row["group"]]["cluster_id"] != row["cluster_id"]:
        return "group is not of its cluster"
    return ""


def _same_samples(shard: Shard, folder: str, table: pa.Table, wanted: pa.ChunkedArray) -> bool:
    """Whether the samples of a table and their order are the wanted ones; adds violations."""
    if table["sample_id"].equals(wanted):
        return True
    there, others = (Counter(ids.to_pylist()) for ids in (table["sample_id"], wanted))
    shard.add(folder, "is missing", (others - there).elements())
    shard.add(folder, "is too many", (there - others).elements())
    if there == others:
        shard.add(folder, "is in another order than embeddings/")
    return False


def expected(
    embedded: pa.Table, assigned: pa.Table, rejected: pa.Table, left_out: pa.Table, run: RunFacts
) -> Iterator[dict[str, Any]]:
    """The labels that follow from the other tables, in the order of the tar."""
    rows = [
        {**row, **label, "status": "success", "cluster_caption": run.captions[label["cluster_id"]]}  # type: ignore[index]
        | _level_columns(label["group"], run)
        for row, label in zip(embedded.to_pylist(), assigned.to_pylist(), strict=True)
        if 0 <= label["cluster_id"] < run.k
    ]
    for row in rejected.to_pylist():
        names = {"image_member": row["member"], "error_message": row["reason"]}
        rows.append({**row, **names, "status": "rejected"})
    own = schemas.label_names(run.columns)
    why = dict(zip(*(left_out[n].to_pylist() for n in ("sample_id", "reason")), strict=True))
    for row in sorted(rows, key=lambda row: int(row["index"])):
        if (reason := why.get(row["sample_id"])) is not None:
            row |= {"status": "excluded", "error_message": reason}
        for name, value in columns.values(columns.parse(row["json"]), run.columns).items():
            row[own[name]] = value
        yield row


def _level_columns(group: int, run: RunFacts) -> dict[str, Any]:
    """The columns of a label for its levels; nothing for a group that is out of range."""
    found: dict[str, Any] = {}
    clusters = run.groups[group]["levels"] if 0 <= group < len(run.groups) else []
    for level, (cluster, captions) in enumerate(zip(clusters, run.levels, strict=False), 1):
        found |= {f"cluster_l{level}": cluster}
        found |= {f"cluster_l{level}_caption": captions.get(cluster)}
    return found


def _labels_agree(shard: Shard, rows: Iterable[dict[str, Any]], labels: pa.Table) -> None:
    """Check that labels have the values of the other tables, row by row."""
    wanted = list(rows)
    ids = pa.chunked_array([pa.array([row["sample_id"] for row in wanted], pa.string())])
    if not _same_samples(shard, "labels", labels, ids):
        return
    for label, row in zip(labels.to_pylist(), wanted, strict=True):
        for name, value in label.items():
            if repr(value) != repr(row.get(name)):  # by repr: NaN is NaN, 1 is not 1.0
                what = f"{name} is {_short(value)}, not {_short(row.get(name))}"
                shard.add("labels", what, [label["sample_id"]])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:60]}…"
