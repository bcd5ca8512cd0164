"""The commands of the stages, and `run`, which runs all stages."""

import logging
from typing import Any

from pipeline.artifacts import inputs, layout, stages
from pipeline.artifacts.stages import Stage, named
from pipeline.cli.options import (
    CaptionsFrom,
    Common,
    Embeddings,
    Overwrite,
    Root,
    Shards,
    SomeShards,
    listed,
    lock_root,
)
from pipeline.runtime import console
from pipeline.runtime.config import Sections
from pipeline.runtime.reject_reasons import printable, top_reasons
from pipeline.store.listing import Shard, list_shards
from pipeline.store.storage import MANIFEST, DamagedError

log = logging.getLogger(__name__)
LARGEST = 10  # clusters in the summary


def commands() -> list[Any]:
    """The commands of the stages in their order, then `run`."""
    own = {"embed": embed_command, "caption": caption_command}
    of_stages = [own.get(stage.name) or _command(stage) for stage in stages.STAGES]
    return [*of_stages, run_command]


def embed_command(
    shards: Shards, root: Root, *, common: Common, overwrite: Overwrite = False
) -> None:
    """Compute the CLIP embeddings of the shards, one part per shard.

    Images are decoded while the encoder works on earlier ones. A sample that
    cannot be read becomes a row with the reason. embed.also lists further
    encoders, each with a column of its own; those that are added to the list
    later encode the shards alone.

    Reads:
      the shards; the encoders' weights, which open_clip and timm download once
    Writes:
      {root}/embeddings/{stem}.parquet   a row per readable sample
      {root}/rejects/{stem}.parquet      a row per unreadable sample, with a reason

    Examples:
      ratecluster embed --shards my-shards --root my-run
      ratecluster embed --shards 's3://b/{00000..00099}.tar' --root s3://b/run
          --set embed.model=ViT-L-14 --set embed.pretrained=openai
    Settings: embed, run
    """
    _run_one(named("embed"), root, common, shards=list_shards(shards, root), overwrite=overwrite)


def caption_command(root: Root, captions_from: CaptionsFrom = None, *, common: Common) -> None:
    """Rank captions for every cluster.

    The candidates are a vocabulary and n-grams of the samples' alt texts. The
    members vote by CLIP similarity. Captions that distinguish a cluster from its
    neighbours rank higher. With caption.namer, a vision-language model behind an
    OpenAI-compatible server also captions each cluster once; the text of that
    setting says what the server receives. After an interruption, the command
    keeps the captions it already has.

    Reads:
      {root}/embeddings/, assignments/, clusters/
      the input shards, for caption.namer
    Writes:
      {root}/captions/captions.parquet   a row per cluster and rank
      {root}/captions/voted.parquet      the same, without captions of the server
      {root}/captions/candidates.parquet

    Examples:
      ratecluster caption --root my-run
      ratecluster caption --root my-run --captions-from my-words.txt
    Settings: caption, run
    """
    _run_one(named("caption"), root, common.with_captions(captions_from))


def _command(stage: Stage) -> Any:
    """The command of a stage that reads only the run's root."""

    def command(root: Root, *, common: Common) -> None:
        _run_one(stage, root, common)

    command.__name__, command.__doc__ = f"{stage.name}_command", PAGES.get(stage.name)
    return command


def _run_one(stage: Stage, root: str, common: Common, **more: Any) -> None:
    """Run a stage and print its text; with --json its manifest without the shards."""
    sections, paths = common.begin(root)
    check(stage, sections)
    with lock_root(paths.root, sections["run"], more.get("shards", ())):
        made = stage.stage.run(sections[stage.name], paths, **more)
    text = getattr(stage.stage, "text", None)  # of evaluate and report
    facts = {name: value for name, value in made.items() if name != "shards"}
    shown = {"stage": stage.name, "root": paths.root, **facts}
    console.print_result(text(made) if text else "", shown)


def run_command(
    root: Root,
    shards: SomeShards = None,
    embeddings: Embeddings = None,
    *,
    common: Common,
    overwrite: Overwrite = False,
    captions_from: CaptionsFrom = None,
) -> None:
    """Run every stage in order, from shards to labels and report.

    The stages are embed, train, select-k, caption, write and report; the command
    ends with a summary. Also evaluates when evaluate.label is set. Finished work
    is skipped.

    With --embeddings, embed takes vectors of your own instead of encoding images.
    Pictures and labeled/ then need --shards as well: each shard with a file of
    the same name, whose ids are the keys of the shard.

    Reads:
      the shards or embeddings, which are never changed
    Writes:
      {root}/labels/{stem}.parquet       the result: a row per sample
      {root}/labeled/{stem}.tar          the shards again, with labels
      {root}/report/index.html           a web page about the result
      {root}/                            more files: see --help of the stages

    Examples:
      ratecluster run --shards my-shards --root my-run
      ratecluster run --shards my-shards --root my-run --config ratecluster.toml
      ratecluster run --shards my-shards --root my-run --quiet --json > summary.json
      ratecluster run --embeddings my-vectors --root my-run
          --set 'embeddings.columns=["clip", "dino"]'
    Settings: all
    """
    sections, paths = common.with_captions(captions_from).begin(root)
    sections, files = listed(sections, shards, embeddings, paths.root)
    run_all(sections, paths, files, overwrite)
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

    try:
        shards = survey.settled(shards, paths)
        if not survey.if_done(sections["embed"], shards, paths):
            return False
        rows = status.collect(status.StatusQuery(sections, shards, as_made=False), paths)
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
    from pipeline.store import tables  # imports pyarrow, which other commands do not need

    embedded, clusters = paths.embeddings.manifest(), paths.clusters.manifest()
    captions = tables.read(paths.captions.file("captions.parquet")).to_pylist()
    best = {row["cluster_id"]: row for row in captions if row["rank"] == 0}
    counts = {name: embedded[name] for name in ("samples", "embedded", "rejected", "damaged")}
    why = top_reasons(embedded["reasons"], embedded.get("examples", {}))
    chosen = {name: clusters[name] for name in ("k", "k_best", "k_low", "k_high")}
    rows = [
        {"cluster_id": number, "size": size}
        | {name: best.get(number, {}).get(name) for name in ("caption", "share")}
        for number, size in enumerate(clusters["sizes"])
    ]
    files = {"shards": len(embedded["shards"]), "given": inputs.are_given(embedded["config"])}
    return {**files, **counts, "rejected_because": why, **chosen, "clusters": rows}


def summary_text(facts: dict[str, Any]) -> str:
    """The summary as a few lines of text."""
    lines = [
        f"{facts['samples']:,} samples in {facts['shards']:,} "
        f"{'files' if facts['given'] else 'shards'}: "
        f"{facts['embedded']:,} labelled, {facts['rejected']:,} rejected"
        + (f", {facts['damaged']:,} shards damaged" if facts["damaged"] else ""),
        *(f"  rejected: {reason}" for reason in facts["rejected_because"]),
        f"{facts['k']} clusters (fewest bits at {facts['k_best']}, band "
        f"{facts['k_low']} to {facts['k_high']}); the largest:",
    ]
    for row in facts["clusters"][:LARGEST]:
        name = printable(str(row["caption"]))
        sure = f" ({row['share']:.0%})" if row["share"] else ""
        lines.append(f"{row['cluster_id']:>5} {row['size']:>12,}  {name}{sure}")
    return "\n".join(lines)


PAGES = {  # of the stages whose command has no docstring
    "train": """Train the network that makes the clusters separable.

The objective is maximal coding rate reduction on a sample of the embeddings.
The best network of the training is kept. An interrupted training resumes
from its last checkpoint.

Reads:
  {root}/embeddings/                 a sample of the rows
Writes:
  {root}/network/                    weights, history, landmarks

Examples:
  ratecluster train --root my-run
  ratecluster train --root my-run --set train.words=0
Settings: train, run
""",
    "select_k": """Choose the number of clusters and assign every sample.

k is chosen by coding length, modularity, stability and silhouette.
--set select_k.k=50 sets it by hand.

Reads:
  {root}/network/, {root}/embeddings/   all parts, twice
Writes:
  {root}/clusters/                   curve, tree, prototypes, typical members
  {root}/assignments/{stem}.parquet  a row per embedded sample

Examples:
  ratecluster select-k --root my-run
  ratecluster select-k --root my-run --set select_k.k_min=20
      --set select_k.k_max=200
Settings: select_k, run
""",
    "write": """Write labels, labelled shards and the table of clusters.

Reads:
  {root}/embeddings/, rejects/, assignments/, captions/
  the input shards again; the lists of write.exclude
Writes:
  {root}/labels/{stem}.parquet       a row per sample, also for failed ones
  {root}/labeled/{stem}.tar          the shard, with `ratecluster` in its json
  {root}/clusters.parquet            a row per cluster
  {root}/levels.parquet              a row per coarser, chosen and finer cluster
  {root}/run.json                    versions, settings and counts of the run
  {root}/README.md                   how to load it with Hugging Face datasets
  {root}/exclude/                    the excluded samples, a file per shard

Examples:
  ratecluster write --root my-run
  ratecluster write --root my-run --set write.shards=false
Settings: write, run
""",
    "report": """Write a web page about the run and print its path.

The page is one self-contained file.

Reads:
  all files below {root}; from the input shards the images that are shown
Writes:
  {root}/report/index.html
  {root}/report/galleries/           only if the page would become too large

Examples:
  ratecluster report --root my-run
  ratecluster report --root my-run --set report.gallery=24
Settings: report, run
""",
    "evaluate": """Measure accuracy against a json field with the true class.

Also scores k-means on the same embeddings, and prints the comparison.

Reads:
  {root}/embeddings/                 the true class, in the column `json`
  {root}/assignments/, clusters/, captions/
Writes:
  {root}/evaluation.json

Examples:
  ratecluster evaluate --root my-run --set evaluate.label=label
Settings: evaluate, run
""",
}
