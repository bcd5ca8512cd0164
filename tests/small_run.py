"""A run up to its captions, of a few samples, made by the project's schemas and writers alone.

Two shards; a sample's picture is no picture but the name of what it shows, its vector is given by
the test. Names, json and damage are what a web-scale collection has.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.artifacts import layout, schemas
from pipeline.store import columns, tables
from pipeline.store.listing import list_shards
from pipeline.store.samples import MissingImage, Sample
from pipeline.store.shard_writer import ShardWriter
from pipeline.store.shards import ShardReader
from tests import level_tables

THINGS = ("dog", "car", "pizza")
FIRST = [  # members of each sample, by suffix
    {"jpg": b"dog", "json": b'{"url": "u0", "width": 10, "caption": "json says", "key": "own"}'},
    {"jpg": b"car", "txt": b"a red car", "json": b'{"url": "u1", "width": 0.5, "label": "SECRET"}'},
    {"txt": b"no picture"},
    {"png": b"dog", "txt": "ein großer Hund".encode(), "json": b"[not an object"},
    {"seg.jpg": b"pizza", "cls": b"3"},
]
SECOND = [
    {"jpg": b"car", "txt": b"a blue car", "json": b'{"odd": 1, "cluster_id": 77, "note": null}'},
    {"jpg": b"pizza", "json": b'{"odd": [1, {"a": "\\u00e9"}], "status": "x", "big": 1e2}'},
    {"json": b'{"odd": "text", "ratecluster": {"cluster_id": 5}, "width": 7}'},
    {"jpg": b"dog", "txt": b"a dog", "json": b'{"url": "u8",\n "odd": null, "big": NaN}\n'},
]


def build(root: Path, vector: Callable[[str], np.ndarray], shards=(FIRST, SECOND)) -> Path:
    """Input shards in `root`/input, the run in `root`/run; returns the latter."""
    (root / "input").mkdir(parents=True)
    for number, samples in enumerate(shards):
        write_shard(root / "input" / f"{number:05d}.tar", number, samples)
    paths = layout.RunPaths(str(root / "run"))
    facts = [_part(shard, paths, vector) for shard in list_shards(str(root / "input"))]
    kinds: dict[str, str] = {}
    for fact in facts:
        columns.merge(kinds, fact.pop("columns"))
    counts = {n: sum(f[n] for f in facts) for n in ("samples", "embedded", "rejected")}
    model = {"model": "pico-clip", "pretrained": "", "max_sample_bytes": 1000}
    paths.embeddings.finish("e1", config=model, shards=facts, columns=kinds, **counts)
    paths.network.finish("n1", upstream="e1", config={})
    _clusters(paths, facts, vector)
    return root / "run"


def write_shard(path: Path, number: int, samples: list[dict[str, bytes]]) -> None:
    """A tar whose keys are in folders, with a name that is not UTF-8 among them."""
    with path.open("wb") as stream, ShardWriter(stream) as writer:
        for i, members in enumerate(samples):
            key = f"d{number}/{i:03d}" + ("\udce9" if i == 3 else "")
            for suffix, data in members.items():
                writer.add(f"{key}.{suffix}", data)


def read(path: Path) -> list[Sample]:
    """The samples of a whole shard."""
    with path.open("rb") as stream:
        reader = ShardReader(stream, None)
        samples = list(reader)
    assert reader.end == "complete"
    return samples


def _part(shard, paths: layout.RunPaths, vector: Callable[[str], np.ndarray]) -> dict:
    rows, rejects, vectors, assigned = [], [], [], []
    samples = read(Path(shard.url))
    for sample in samples:
        identity = {"sample_id": f"{shard.stem}/{sample.id}", "shard": shard.stem}
        row = {**identity, "key": sample.key, "index": sample.index}
        row |= {"caption": sample.caption(), "json": sample.json_text()}
        try:
            image = sample.image()
        except MissingImage as missing:
            rejects.append({**row, "reason": str(missing)})
            continue
        rows.append({**row, "image_member": image.name, "tar_offset": image.offset})
        rows[-1] |= {"tar_size": image.size, "image_width": 4, "image_height": 3}
        thing = image.data.decode()
        vectors.append(vector(thing))
        assigned.append({**identity, "cluster_id": THINGS.index(thing), "confidence": 0.75})
        assigned[-1] |= {
            "group": THINGS.index(thing),
            "margin": 0.5,
            "outlier_score": 0.1,
            "top_clusters": [0, 1, 2],
        }
        assigned[-1] |= {"top_shares": [0.75, 0.25, 0.0]}
    schema = schemas.embeddings_schema(len(vectors[0]))
    texts = {f.name: pa.array([r.get(f.name) for r in rows], f.type) for f in list(schema)[:-1]}
    part = pa.table({**texts, "embedding": tables.from_matrix(np.stack(vectors))}, schema=schema)
    name = f"{shard.stem}.parquet"
    tables.write(paths.embeddings.file(name), part)
    rejects.append({"shard": shard.stem, "reason": "shard: a note on damage, of no sample"})
    table = pa.Table.from_pylist(rejects, schema=schemas.REJECTS)
    tables.write(paths.rejects.file(name), table)
    table = pa.Table.from_pylist(assigned, schema=schemas.ASSIGNMENTS)
    tables.write(paths.assignments.file(name), table)
    counts = {"samples": len(samples), "embedded": len(rows), "rejected": len(rejects) - 1}
    found = columns.Survey()
    for sample in samples:
        found.add(columns.kinds(sample.values))
    return {"shard": vars(shard), **counts, "end": "complete", "columns": found.kinds}


def _clusters(paths: layout.RunPaths, facts: list[dict], vector: Callable) -> None:
    stems = [fact["shard"]["stem"] for fact in facts]
    parts = [tables.read(paths.assignments.file(f"{stem}.parquet")) for stem in stems]
    labels = np.concatenate([part["cluster_id"].to_numpy() for part in parts])
    sizes = np.bincount(labels, minlength=len(THINGS)).tolist()
    vectors = np.stack([vector(thing) for thing in THINGS]).astype(np.float32)
    schema = schemas.prototypes_schema(vectors.shape[1])
    found = [pa.array(range(3), pa.int32()), tables.from_matrix(vectors, pa.float32())]
    table = pa.Table.from_arrays(found, schema=schema)
    tables.write(paths.clusters.file("prototypes.parquet"), table)
    ids = pa.concat_tables(parts).to_pylist()
    exemplars = [
        {**row, "kind": kind, "rank": rank}
        for kind in schemas.KINDS
        for rank, row in enumerate(ids)
    ]
    table = pa.Table.from_pylist(exemplars, schema=schemas.EXEMPLARS)
    tables.write(paths.clusters.file("exemplars.parquet"), table)
    bits = [10.0 * size for size in sizes]
    level_tables.write(paths, vectors)
    facts = {"sizes": sizes, "levels": [3], "groups": sizes}
    paths.clusters.finish("c1", upstream="n1", **facts, cluster_bits=bits, k=3)
    captions = [
        {"cluster_id": c, "rank": r, "caption": name, "share": 0.5, "source": "vocabulary"}
        for c, thing in enumerate(THINGS)
        for r, name in enumerate((thing, f"two {thing}s"))
    ]
    table = pa.Table.from_pylist(captions, schema=schemas.CAPTIONS)
    tables.write(paths.captions.file("captions.parquet"), table)
    level_tables.captions(paths)
    paths.captions.finish("w1", upstream="c1", captions=list(THINGS))


def axis(thing: str) -> np.ndarray:
    """A vector of its own for each of THINGS."""
    return np.eye(len(THINGS), 4, dtype=np.float32)[THINGS.index(thing)]


def originals(text: bytes) -> dict:
    """A json member's object; empty if it is none."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
