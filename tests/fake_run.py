"""A small finished run, made by the project's own schemas and writers, without any stage.

Two shards of 15 readable pictures in three colours; cluster and true class agree but for one
sample, and one sample has no class. The second shard has two rejected samples and is damaged. Texts
that come from the web are hostile.
"""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.artifacts import layout, schemas
from pipeline.store import storage, tables
from pipeline.store.shard_writer import ShardWriter
from pipeline.store.shards import ShardReader
from tests import level_tables

SCRIPT = "<script>alert(1)</script>"
COLOURS = {"red": (220, 40, 40), "green": (30, 160, 60), "blue": (40, 70, 220)}
STEMS = ("00000", "00001")
PER_SHARD = 15
DIM = 8
FEATURES = 6
WRONG = "00001/key3"  # its class is red, its cluster that of blue
UNLABELLED = "00000/key7"


def build(root: Path, captions: bool = True) -> layout.RunPaths:
    """The run below `root`/run, its input shards in `root`/input."""
    paths = layout.RunPaths(str(root / "run"))
    (root / "input").mkdir(parents=True)
    rows = {stem: _shard(root / "input" / f"{stem}.tar", stem) for stem in STEMS}
    _embeddings(paths, rows, root)
    _network(paths)
    _clusters(paths, [row for stem in STEMS for row in rows[stem]])
    for stem, members in rows.items():
        table = pa.Table.from_pylist(members, schema=schemas.ASSIGNMENTS)
        tables.write(paths.assignments.file(f"{stem}.parquet"), table)
    if captions:
        _captions(paths)
    return paths


def written(paths: layout.RunPaths) -> None:
    """What stage write leaves, as far as it is read."""
    rows = [
        {
            "cluster_id": cluster,
            "size": 10 + (cluster == 2) - (cluster == 0),
            "cluster_caption": SCRIPT,
            "bits_per_sample": 12.5 + cluster,
            "nearest_clusters": [c for c in range(3) if c != cluster],
        }
        for cluster in range(3)
    ]
    tables.write(paths.clusters_table, pa.Table.from_pylist(rows, schema=schemas.CLUSTERS))
    paths.labels.finish("labels-1", upstream="captions-1", config={"shards": True}, seconds=0.5)


def _shard(path: Path, stem: str) -> list[dict]:
    """Write the tar; returns a row with the columns of embeddings and of assignments."""
    rng = np.random.default_rng(int(stem))
    texts = [f"a picture, number {i}" for i in range(PER_SHARD)]
    texts[0] = f'{SCRIPT} "quoted" \u202ereversed\x1b[31m'
    with path.open("wb") as stream, ShardWriter(stream) as writer:
        for i, text in enumerate(texts):
            writer.add(f"key{i}.png", _png(list(COLOURS.values())[i % 3], rng))
            writer.add(f"key{i}.txt", text.encode())
            writer.add(f"key{i}.json", _json(stem, i).encode())
    rows = []
    with path.open("rb") as stream:
        for sample in ShardReader(stream, None):
            image = sample.image()
            rows.append(
                {
                    "sample_id": f"{stem}/{sample.id}",
                    "shard": stem,
                    "key": sample.key,
                    "index": sample.index,
                    "image_member": image.name,
                    "tar_offset": image.offset,
                    "tar_size": image.size,
                    "image_width": 120,
                    "image_height": 80,
                    "caption": texts[sample.index],
                    "json": sample.json_text(),
                    "text_problem": sample.text_problem(),
                    "cls": None,
                    "cluster_id": 2 if f"{stem}/{sample.id}" == WRONG else sample.index % 3,
                    "group": 2 if f"{stem}/{sample.id}" == WRONG else sample.index % 3,
                    "confidence": 0.9,
                    "margin": 0.8,
                    "outlier_score": 0.01 * sample.index,
                    "top_clusters": [0, 1, 2],
                    "top_shares": [0.9, 0.05, 0.05],
                }
            )
    return rows


def _json(stem: str, i: int) -> str:
    facts = {"url": f"https://example.org/{i}", "odd": {"a": 1}}
    if f"{stem}/key{i}" != UNLABELLED:
        facts["label"] = list(COLOURS)[i % 3]
    return json.dumps(facts)


def _png(colour: tuple[int, int, int], rng: np.random.Generator) -> bytes:
    pixels = np.clip(rng.normal(colour, 25, (80, 120, 3)), 0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def _embeddings(paths: layout.RunPaths, rows: dict[str, list[dict]], root: Path) -> None:
    schema = schemas.embeddings_schema(DIM)
    for stem, members in rows.items():
        rng = np.random.default_rng(int(stem))
        x = rng.normal(0, 0.05, (len(members), DIM))
        for row, vector in zip(members, x, strict=True):
            vector[row["index"] % 3] += 1
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        texts = {f.name: pa.array([r[f.name] for r in members], f.type) for f in list(schema)[:-1]}
        part = pa.table({**texts, "embedding": tables.from_matrix(x)}, schema=schema)
        tables.write(paths.embeddings.file(f"{stem}.parquet"), part)
    rejects = [
        {"sample_id": f"00001/{SCRIPT}", "shard": "00001", "key": SCRIPT, "index": 15}
        | {"member": f"{SCRIPT}.jpg", "reason": "not_an_image: \x1b[31mred alert"},
        {"sample_id": "00001/b", "shard": "00001", "key": "b", "index": 16}
        | {"member": "b.jpg", "reason": "empty"},
        {"shard": "00001", "reason": "shard: damaged at byte 512: bad header"},
    ]
    table = pa.Table.from_pylist(rejects, schema=schemas.REJECTS)
    tables.write(paths.rejects.file("00001.parquet"), table)
    tables.write(paths.rejects.file("00000.parquet"), schemas.REJECTS.empty_table())
    paths.embeddings.finish(
        "embeddings-1",
        config={"model": "pico-clip", "pretrained": "", "max_image_pixels": 178_956_970},
        encoders=[{"column": "embedding", "model": "pico-clip", "pretrained": "", "dim": 4}],
        samples=32,
        embedded=30,
        rejected=2,
        reasons={"not_an_image": 1, "empty": 1},
        columns={"label": "str", "odd": "json", "url": "str"},
        precisions=["cpu fp32"],
        shards=[_facts(root, "00000", 0, "complete"), _facts(root, "00001", 2, "damaged at 512")],
        seconds=1.5,
    )


def _facts(root: Path, stem: str, rejected: int, end: str) -> dict:
    url = str(root / "input" / f"{stem}.tar")
    shard = {"stem": stem, "url": url, "size": Path(url).stat().st_size, "version": "1"}
    counts = {"samples": PER_SHARD + rejected, "embedded": PER_SHARD, "rejected": rejected}
    return {"shard": shard, **counts, "end": end}


def _network(paths: layout.RunPaths) -> None:
    history = [
        {
            "step": step,
            "loss": -step / 10,
            "expansion": 10 + step / 10,
            "compression": 9.0,
            "sinkhorn_residual": 0.01,
            "gradient_norm": 1.0,
            "samples_per_s": 100.0 + step,
        }
        for step in range(50)
    ]
    table = pa.Table.from_pylist(history, schema=schemas.HISTORY)
    tables.write(paths.network.file("history.parquet"), table)
    parts = [tables.read(paths.embeddings.file(f"{stem}.parquet")) for stem in STEMS]
    x = np.concatenate([tables.to_matrix(part["embedding"]) for part in parts])
    ids = [name for part in parts for name in part["sample_id"].to_pylist()]
    columns = [ids, tables.from_matrix(x), tables.from_matrix(x[:, :FEATURES], pa.float32())]
    schema = schemas.sample_schema(DIM, FEATURES)
    tables.write(paths.network.file("sample.parquet"), pa.table(columns, schema=schema))
    paths.network.finish(
        "network-1",
        upstream=paths.embeddings.manifest()["fingerprint"],
        config={"eps_sq": 0.1, "seed": 0},
        steps=50,
        looks=[{"step": step, "information": 2 - (step - 20) ** 2 / 1e3} for step in (0, 20, 50)],
        kept_step=20,
        seconds=2.5,
    )


def _clusters(paths: layout.RunPaths, rows: list[dict]) -> None:
    bits = [3000 - 600 * min(k, 3) + 60 * abs(k - 3) for k in range(1, 13)]
    curve = [
        {"k": k, "bits": b, "low": 0.97 * b, "high": 1.03 * b} for k, b in enumerate(bits, start=1)
    ]
    table = pa.Table.from_pylist(curve, schema=schemas.CURVE)
    tables.write(paths.clusters.file("curve.parquet"), table)
    orders = {"typical": ("outlier_score", 1), "borderline": ("margin", 1)}
    orders["odd"] = ("outlier_score", -1)
    exemplars = []
    for kind, (score, sign) in orders.items():
        for cluster in range(3):
            members = [row for row in rows if row["cluster_id"] == cluster]
            members.sort(key=lambda row: (sign * row[score], row["sample_id"]))
            exemplars += [{**row, "kind": kind, "rank": rank} for rank, row in enumerate(members)]
    table = pa.Table.from_pylist(exemplars, schema=schemas.EXEMPLARS)
    tables.write(paths.clusters.file("exemplars.parquet"), table)
    merges = [{"k": 2, "kept": 0, "merged": 2, "bits_saved": -300.0}]
    merges += [{"k": 1, "kept": 0, "merged": 1, "bits_saved": -900.0}]
    table = pa.Table.from_pylist(merges, schema=schemas.TREE)
    tables.write(paths.clusters.file("tree.parquet"), table)
    vectors = tables.from_matrix(np.eye(3, FEATURES), pa.float32())
    table = pa.table([[0, 1, 2], vectors], schema=schemas.prototypes_schema(FEATURES))
    tables.write(paths.clusters.file("prototypes.parquet"), table)
    level_tables.write(paths, np.eye(3, FEATURES))
    paths.clusters.finish(
        "clusters-1",
        upstream="network-1",
        config={"k": 0, "seed": 0},
        samples=30,
        sizes=[9, 10, 11],
        levels=[3],
        groups=[9, 10, 11],
        cluster_bits=[112.5, 135.0, 159.5],
        k=3,
        k_best=3,
        k_low=3,
        k_high=4,
        flat_from=3,
        flat_to=3,
        bits=bits[2],
        bits_of_one=bits[0],
        seconds=0.7,
    )


def _captions(paths: layout.RunPaths) -> None:
    names = ([SCRIPT, "red thing"], ["green & <b>leafy</b>"], ["blue\u202e thing\x1b[2J"])
    rows = [
        {"cluster_id": cluster, "rank": rank, "caption": name, "share": 0.6 / (rank + 1)}
        | {"source": "alt text"}
        for cluster, ranked in enumerate(names)
        for rank, name in enumerate(ranked)
    ]
    table = pa.Table.from_pylist(rows, schema=schemas.CAPTIONS)
    tables.write(paths.captions.file("captions.parquet"), table)
    level_tables.captions(paths)
    paths.captions.finish(
        "captions-1",
        upstream="clusters-1",
        config={"temperature": 0.01},
        captions=[n[0] for n in names],
        seconds=0.3,
    )


def refinish(folder: storage.Folder, **changes: object) -> None:
    """Change facts of a manifest."""
    manifest = folder.manifest() | changes
    folder.finish(manifest.pop("fingerprint"), **manifest)
