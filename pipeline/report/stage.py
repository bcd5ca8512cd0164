"""Command report: show the results of a run on one page that makes no network requests.

reads   all manifests; clusters/, captions/captions.parquet, network/{history, sample}.parquet,
        rejects/{stem}.parquet, the input shards (bytes of the images shown); clusters.parquet and
        evaluation.json if they exist
writes  report/index.html
        report/galleries/{cluster_id}.webp   images that would make the page too large
        report/manifest.json

Captions, alt texts, keys and file names are untrusted. The template escapes them, scripts insert
them as text, and the page's content security policy allows only its own scripts.
"""

import base64
import hashlib
import json
import logging
import re
import time
from importlib import resources
from typing import Any

from markupsafe import Markup

from pipeline.artifacts import inputs, layout, outputs
from pipeline.report import figures, galleries, run_data
from pipeline.report.run_data import Facts, RunData, collect
from pipeline.report.settings import Config, expected
from pipeline.runtime import config, console, templates
from pipeline.runtime.reject_reasons import REMEDIES
from pipeline.store import storage, tables

log = logging.getLogger(__name__)
SCRIPTS = ("echarts/echarts.min.js", "charts.js", "explorer.js")


def charts(run: RunData, clusters: list[Facts], paths: layout.RunPaths) -> dict[str, figures.Chart]:
    """All charts of the page, by name."""
    names = ("curve", "tree", "prototypes")
    curve, merges, vectors = (tables.read(paths.clusters.file(f"{n}.parquet")) for n in names)
    history = tables.read(paths.network.file("history.parquet"))
    kept = figures.landmarks(vectors, paths)
    drawn = {
        "curve": figures.coding_length(run, curve),
        "tree": figures.tree(run, merges, clusters),
        "map": figures.cluster_map(vectors, clusters),
        "heat": figures.heat(kept),
        "spectra": figures.spectra(kept, clusters),
        "training": figures.training(history),
        "validations": figures.validations(run),
    }
    if run.evaluation and "confusion" in run.evaluation:
        drawn["confusion"] = figures.confusion(run.evaluation, clusters)
        drawn["confidence"] = figures.confidence(run.evaluation)
    return drawn


def data(run: RunData, clusters: list[Facts], drawn: dict[str, figures.Chart]) -> Facts:
    """The data that the scripts of the page read."""
    by_id = sorted(clusters, key=lambda row: row["id"])
    return {
        "samples": run.clustered["samples"],
        "clusters": [
            {
                "name": row["caption"] or "(no caption)",
                "words": [caption["caption"] for caption in row["captions"][1:]],
                "size": row["size"],
                "linked": "members" in row,
            }
            for row in by_id
        ],
        "charts": {name: chart["data"] for name, chart in drawn.items()},
    }


def context(cfg: Config, run: RunData, paths: layout.RunPaths) -> tuple[Facts, Facts]:
    """The values of the template, and facts for the manifest."""
    clusters = run_data.clusters(run, paths)
    missing, strips = galleries.add(clusters, run, cfg, paths)
    drawn = charts(run, clusters, paths)
    shown = {
        "run": run,
        "given": inputs.are_given(run.embedded["config"]),
        "pictures": inputs.has_shards(run.embedded),
        "clusters": clusters,
        "levels": run_data.levels(run, clusters, paths),
        "charts": drawn,
        "data": data(run, clusters, drawn),
        "strips": bool(strips),
        "tiles": sum(cfg.counts.values()),
        "rejected": run_data.rejected(run, paths),
        "remedies": REMEDIES,
        "damaged": [s for s in run.embedded["shards"] if s["end"] != "complete"],
        "listed": run_data.REJECTS,
        "stages": run_data.stages(run, paths),
        "views": run.trained.get("views", []),
        "versions": outputs.versions(),
    }
    return shown, {"missing_pictures": missing, "strips": strips}


def as_json(value: Any) -> Markup:
    """JSON for an element of a page; no text in it can close the element."""
    text = json.dumps(templates.visible(value), separators=(",", ":"), allow_nan=False)
    return Markup(re.sub("[<>&]", lambda match: f"\\u{ord(match.group()):04x}", text))


def counted(count: int, what: str) -> str:
    """1 shard, 4 shards."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def digest(text: str) -> str:
    """The hash of an inline script or style, as content security policies write it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def render(context: Facts) -> str:
    """The HTML of the page; all values are escaped."""
    environment = templates.environment()
    environment.filters |= {
        "percent": lambda value: f"{100 * value:.1f}\u00a0%",
        "counted": counted,
        "json": as_json,
        "digest": digest,
    }
    ours = resources.files("pipeline.report")
    steps = max(1, context["tiles"] - 1)
    places = [f".t{i}{{object-position:0 {100 * i / steps:.4f}%}}" for i in range(context["tiles"])]
    style = ours.joinpath("page.css").read_text("utf-8") + "\n".join(places)
    scripts = [Markup(ours.joinpath(name).read_text("utf-8")) for name in SCRIPTS]
    template = environment.from_string(ours.joinpath("page.html").read_text("utf-8"))
    return template.render(context | {"style": Markup(style), "scripts": scripts})


def text(made: dict[str, Any]) -> str:
    """The URL of the page."""
    return str(made["page"])


def run(cfg: Config, paths: layout.RunPaths) -> dict[str, Any]:
    """Write the page unless it is up to date; returns its manifest and its URL, as `page`.

    A page with missing images is written again.
    """
    url, started = paths.report.file("index.html"), time.monotonic()
    made = collect(paths)
    want = expected(cfg, made.manifests, paths)
    before = paths.report.peek() or {}
    if not before.get("missing_pictures") and want.if_done():
        return {**before, "page": url}
    shown, facts = context(cfg, made, paths)
    storage.write_bytes(url, render(shown).encode())
    paths.report.finish(want.made_of, config=config.facts(cfg), **facts)
    clusters = f"{len(shown['clusters']):,} clusters"
    console.log_finished(log, "report", time.monotonic() - started, clusters)
    return {**paths.report.manifest(), "page": url}
