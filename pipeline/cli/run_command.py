"""The command of all stages, and its summary."""

import logging
from typing import Any

from pipeline.artifacts import layout, stages
from pipeline.artifacts.stages import Stage, named
from pipeline.cli.options import CaptionsFrom, Common, Overwrite, Root, Shards, lock_root
from pipeline.runtime import console
from pipeline.runtime.config import Sections
from pipeline.runtime.reject_reasons import printable
from pipeline.store.listing import Shard, list_shards
from pipeline.store.storage import MANIFEST, DamagedError

log = logging.getLogger(__name__)
LARGEST = 10  # clusters in the summary


def run_command(
    shards: Shards,
    root: Root,
    *,
    common: Common,
    overwrite: Overwrite = False,
    captions_from: CaptionsFrom = None,
) -> None:
    """Run every stage in order, from shards to labels and report.

    The stages are embed, train, select-k, caption, write and report; the command
    ends with a summary. Also evaluates when evaluate.label is set. Finished work
    is skipped.

    Reads:
      the shards, which are never changed
    Writes:
      {root}/labels/{stem}.parquet       the result: a row per sample
      {root}/labeled/{stem}.tar          the shards again, with labels
      {root}/report/index.html           a web page about the result
      {root}/                            more files: see --help of the stages

    Examples:
      ratecluster run --shards my-shards --root my-run
      ratecluster run --shards my-shards --root my-run --config ratecluster.toml
      ratecluster run --shards my-shards --root my-run --quiet --json > summary.json
    Settings: all
    """
    sections, paths = common.with_captions(captions_from).begin(root)
    run_all(sections, paths, list_shards(shards), overwrite)
    facts = {"root": paths.root, **summary(paths), "report": paths.report.file("index.html")}
    texts = [summary_text(facts)]
    if _is_asked(named("evaluate"), sections):
        from pipeline.evaluate import score_tables

        evaluation = paths.top.peek("evaluation.json") or {}
        facts["evaluation"] = evaluation["rows"]
        texts.append(score_tables.text(evaluation))
    console.print_result("\n".join([*texts, f"report: {facts['report']}"]), facts)


def check(stage: Stage, sections: Sections) -> None:
    """UserError for settings that would stop the stage, before any stage starts."""
    if own := getattr(stage.settings, "check", None):
        own(sections)


def run_all(
    sections: Sections, paths: layout.RunPaths, shards: list[Shard], overwrite: bool
) -> None:
    """Run every stage in order under the lock of the root. Finished work is skipped."""
    asked = [stage for stage in stages.STAGES if _is_asked(stage, sections)]
    for stage in asked:
        check(stage, sections)
    with lock_root(paths.root, sections["run"], shards):
        if _all_done(asked, sections, shards, paths):
            for stage in asked:
                folder = paths.folder(stage.folder) if stage.files or stage.parts else paths.top
                console.log_already_done(log, stage.name, folder.url)
            return
        for stage in asked:
            more = {"shards": shards, "overwrite": overwrite} if stage.name == "embed" else {}
            stage.stage.run(sections[stage.name], paths, **more)
            if stage.name == "embed" and named("evaluate") in asked:
                named("evaluate").settings.find_label(sections["evaluate"], paths)


def _is_asked(stage: Stage, sections: Sections) -> bool:
    return not stage.asked_by or bool(getattr(sections[stage.name], stage.asked_by))


def _all_done(
    asked: list[Stage], sections: Sections, shards: list[Shard], paths: layout.RunPaths
) -> bool:
    """Whether no stage has work left, or files of an interruption to remove; needs no torch."""
    from pipeline.embed import survey
    from pipeline.ops import status

    query = status.StatusQuery(sections, shards, as_made=False)
    try:
        if not survey.if_done(sections["embed"], shards, paths):
            return False
        rows = status.collect(query, paths)
    except DamagedError:  # the stage that reads the file decides what to do
        return False
    done = {row.stage for row in rows if (row.state, row.rerun) == ("done", "nothing")}
    return all(
        stage.name in done
        and (
            stage.folder in stage.parts
            or paths.folder(stage.folder).names() <= {*stage.files, *stage.folders, MANIFEST}
        )
        for stage in asked
    )


def summary(paths: layout.RunPaths) -> dict[str, Any]:
    """Counts, k and the clusters of a finished run."""
    embedded, clusters = paths.embeddings.manifest(), paths.clusters.manifest()
    captions = paths.captions.manifest()["captions"]
    counts = {name: embedded[name] for name in ("samples", "embedded", "rejected", "damaged")}
    chosen = {name: clusters[name] for name in ("k", "k_best", "k_low", "k_high")}
    rows = [
        {"cluster_id": number, "size": size, "caption": captions[number]}
        for number, size in enumerate(clusters["sizes"])
    ]
    return {"shards": len(embedded["shards"]), **counts, **chosen, "clusters": rows}


def summary_text(facts: dict[str, Any]) -> str:
    """The summary as a few lines of text."""
    lines = [
        f"{facts['samples']:,} samples in {facts['shards']:,} shards: "
        f"{facts['embedded']:,} labelled, {facts['rejected']:,} rejected"
        + (f", {facts['damaged']:,} shards damaged" if facts["damaged"] else ""),
        f"{facts['k']} clusters (fewest bits at {facts['k_best']}, band "
        f"{facts['k_low']} to {facts['k_high']}); the largest:",
    ]
    for row in facts["clusters"][:LARGEST]:
        name = printable(str(row["caption"]))
        lines.append(f"{row['cluster_id']:>5} {row['size']:>12,}  {name}")
    return "\n".join(lines)
