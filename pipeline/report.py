"""Command report: everything a run has found, as one page that needs no network and no scripts.

reads   all manifests; clusters/{curve, exemplars}.parquet, network/history.parquet,
        captions/captions.parquet, rejects/{stem}.parquet of shards that have any, the input shards
        (bytes of the pictures shown); clusters.parquet and evaluation.json if they are there
writes  report/index.html
        report/manifest.json

Captions, alt texts, keys and file names come from the web: the template escapes them, and `visible`
shows what would otherwise act on the text around it. Core: `context`, `render`. Shell: `run`.
"""

import json
import logging
import platform
import re
import time
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import version
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from pipeline import artifacts, config, console, figures, pictures
from pipeline.config import setting
from pipeline.errors import UserError
from pipeline.store import storage, tables

log = logging.getLogger(__name__)
REJECTS = 100  # rejected samples listed, and damaged shards
NEAREST = 3  # neighbours named
MADE_WITH = ("ratecluster", "torch", "open_clip_torch", "pyarrow", "numpy", "matplotlib")
# Control characters, marks and overrides of writing direction, halves of characters.
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ud800-\udfff]"
)

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Config:
    """How much the page shows."""

    gallery: int = setting(12, "pictures of typical members per cluster, 24 at most; 0: none")
    max_clusters: int = setting(
        200, "clusters with a gallery, largest first; the others are in the table"
    )
    thumbnail: int = setting(96, "pixels of a picture's longer side")

    def __post_init__(self) -> None:
        if self.gallery < 0 or self.max_clusters < 0:
            raise UserError("report.gallery and report.max_clusters: give 0 or more")
        if self.thumbnail < 1:
            raise UserError(f"report.thumbnail = {self.thumbnail}: give 1 or more pixels")


@dataclass(frozen=True)
class Run:
    """What the page is made of. A run may be reported before it is written and evaluated."""

    root: str
    embedded: Row  # manifests, of the stages in their order
    trained: Row
    clustered: Row
    captioned: Row
    written: Row | None
    evaluation: Row | None

    @property
    def fingerprints(self) -> list[str | None]:
        """Of all that the page shows."""
        stages = (self.clustered, self.captioned, self.written, self.evaluation)
        return [stage["fingerprint"] if stage else None for stage in stages]


def collect(paths: artifacts.RunPaths) -> Run:
    """The manifests; UserError names the stage that has not finished."""
    made = artifacts.upstream(paths, "captions")
    clustered, captioned = made["clusters"], made["captions"]
    written = paths.labels.peek()
    if written and written["upstream"] != captioned["fingerprint"]:
        written = None
    evaluation = None
    if storage.exists(paths.evaluation_json):
        evaluation = json.loads(storage.read_bytes(paths.evaluation_json))
        if evaluation["clustering"] != clustered["fingerprint"]:
            log.warning("report: evaluation.json is of other clusters: run evaluate again")
            evaluation = None
    return Run(
        paths.root,
        made["embeddings"],
        made["network"],
        clustered,
        captioned,
        written,
        evaluation,
    )


def cluster_rows(found: Run, paths: artifacts.RunPaths) -> list[Row]:
    """What is known of each cluster, largest first."""
    sizes = found.clustered["sizes"]
    rows: list[Row] = [{"id": c, "size": size, "captions": []} for c, size in enumerate(sizes)]
    for caption in tables.read(paths.captions.file("captions.parquet")).to_pylist():
        rows[caption["cluster_id"]]["captions"].append(caption)
    for row in rows:
        row["captions"].sort(key=lambda caption: caption["rank"])
        row["share"] = row["size"] / max(1, found.clustered["samples"])
        row["caption"] = row["captions"][0]["caption"] if row["captions"] else None
    if found.written:
        for more in tables.read(paths.clusters_table).to_pylist():
            row = rows[more["cluster_id"]]
            row["bits"] = more["bits_per_sample"]
            row["nearest"] = [rows[near] for near in more["nearest_clusters"][:NEAREST]]
    for truth in found.evaluation["clusters"] if found.evaluation else ():
        rows[truth["cluster_id"]]["truth"] = truth
    return sorted(rows, key=lambda row: (-row["size"], row["id"]))


def add_galleries(rows: list[Row], found: Run, cfg: Config, paths: artifacts.RunPaths) -> int:
    """Give the first rows their `members` with pictures; returns how many pictures are missing."""
    shown = rows[: cfg.max_clusters]
    for row in shown:
        row["members"] = []
    by_id = {row["id"]: row["members"] for row in shown}
    table = tables.read(paths.clusters.file("exemplars.parquet"))
    table = table.filter(pc.less(table["rank"], cfg.gallery))
    table = table.sort_by([("cluster_id", "ascending"), ("rank", "ascending")])
    members = [member for member in table.to_pylist() if member["cluster_id"] in by_id]
    urls = {s["shard"]["stem"]: s["shard"]["url"] for s in found.embedded["shards"]}
    places = [pictures.Place(urls[m["shard"]], m["tar_offset"], m["tar_size"]) for m in members]
    max_pixels = found.embedded["config"]["max_image_pixels"]
    made = pictures.thumbnails(places, max_pixels, cfg.thumbnail)
    for member, picture in zip(members, made, strict=True):
        by_id[member["cluster_id"]].append({**member, "picture": picture})
    return made.count(None)


def rejected_rows(found: Run, paths: artifacts.RunPaths) -> list[Row]:
    """The first REJECTS rejected samples of the run, in the order of the shards."""
    rows: list[Row] = []
    for shard in found.embedded["shards"]:
        if len(rows) < REJECTS and shard["rejected"]:
            table = tables.read(paths.rejects.file(f"{shard['shard']['stem']}.parquet"))
            table = table.filter(pc.is_valid(table["sample_id"]))  # the others are shards' damage
            rows += table.slice(0, REJECTS - len(rows)).to_pylist()
    return rows


def stages(found: Run) -> list[Row]:
    """Name, seconds and settings of every finished stage."""
    named = {
        "embed": found.embedded,
        "train": found.trained,
        "select_k": found.clustered,
        "caption": found.captioned,
        "write": found.written,
    }
    return [{"name": name, **manifest} for name, manifest in named.items() if manifest]


def drawings(found: Run, curve: pa.Table, history: pa.Table) -> list[Row]:
    """The figures of the page, with what they say in words."""
    chosen, sizes = found.clustered, found.clustered["sizes"]
    return [
        {
            "title": "Coding length",
            "uri": figures.themed(figures.coding_length, curve, chosen),
            "alt": f"Bits per sample for 1 to {curve.num_rows:,} clusters. Fewest at "
            f"{chosen['k_best']:,}; within 0.5 % of the saving from {chosen['flat_from']:,} to "
            f"{chosen['flat_to']:,}; chosen: {chosen['k']:,}. The band holds 90 % of resamples.",
        },
        {
            "title": "Cluster sizes",
            "uri": figures.themed(figures.sizes, sizes),
            "alt": f"Samples in each of {len(sizes):,} clusters, from {max(sizes):,} down to "
            f"{min(sizes):,}.",
        },
        {
            "title": "Training: coding rates and loss",
            "uri": figures.themed(figures.training, history),
            "alt": f"Expansion, compression and loss over {history.num_rows:,} steps.",
        },
        {
            "title": "Training: which network was kept",
            "uri": figures.themed(figures.looks, found.trained["looks"]),
            "alt": "What the clusters of samples tell of those of their neighbours, in nats, at "
            f"{len(found.trained['looks'])} steps; kept: step {found.trained['kept_step']:,}.",
        },
    ]


def versions() -> dict[str, str]:
    """Of the software that makes the page."""
    return {"python": platform.python_version(), **{name: version(name) for name in MADE_WITH}}


def visible(value: Any) -> Any:
    """Characters that are unseen, or that turn the text around them, as their code points."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return UNSEEN.sub(lambda match: f"⟨U+{ord(match.group()):04X}⟩", value)
    return value


def render(context: Row) -> str:
    """The page; everything put into it is escaped."""
    environment = jinja2.Environment(
        autoescape=True,
        finalize=visible,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["number"] = lambda value: f"{value:,}"
    environment.filters["percent"] = lambda value: f"{100 * value:.1f}\u00a0%"
    template = resources.files("pipeline").joinpath("report.html").read_text("utf-8")
    return environment.from_string(template).render(context)


def wanted(
    cfg: Config, fingerprints: list[str | None], paths: artifacts.RunPaths
) -> artifacts.Wanted:
    """What reporting what has these fingerprints is to leave."""
    made_of = config.fingerprint(cfg, fingerprints)
    return artifacts.Wanted("report", paths.report, made_of, cfg, {paths.report: ["index.html"]})


def run(cfg: Config, paths: artifacts.RunPaths) -> str:
    """Make the page unless it is there; returns its URL. Missing pictures are tried again."""
    url, started = paths.report.file("index.html"), time.monotonic()
    found = collect(paths)
    want = wanted(cfg, found.fingerprints, paths)
    before = paths.report.peek() or {}
    if not before.get("missing_pictures") and want.finished():
        return url
    rows = cluster_rows(found, paths)
    missing = add_galleries(rows, found, cfg, paths)
    curve = tables.read(paths.clusters.file("curve.parquet"))
    history = tables.read(paths.network.file("history.parquet"))
    page = render(
        {
            "run": found,
            "clusters": rows,
            "drawings": drawings(found, curve, history),
            "rejected": rejected_rows(found, paths),
            "damaged": [s for s in found.embedded["shards"] if s["end"] != "complete"],
            "listed": REJECTS,
            "stages": stages(found),
            "versions": versions(),
        }
    )
    storage.write_bytes(url, page.encode())
    paths.report.finish(want.made_of, config=config.facts(cfg), missing_pictures=missing)
    console.finished(log, "report", time.monotonic() - started, f"{len(rows):,} clusters")
    return url
