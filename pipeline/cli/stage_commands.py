"""The commands of the stages, and of all of them. What each says is its manual page."""

from typing import Any

from pipeline.artifacts import layout, stages
from pipeline.artifacts.stages import Stage, named
from pipeline.cli.help_pages import App
from pipeline.cli.options import (
    Address,
    CaptionsFrom,
    ConfigFile,
    Overrides,
    Overwrite,
    Root,
    Shards,
    begin,
    owning,
    with_captions,
)
from pipeline.runtime import console
from pipeline.runtime.config import Sections
from pipeline.runtime.reject_reasons import printable
from pipeline.store.listing import list_shards

LARGEST = 10  # clusters in the summary


def embed_command(
    shards: Shards,
    root: Root,
    config_file: ConfigFile = None,
    sets: Overrides = None,
    address: Address = None,
    overwrite: Overwrite = False,
) -> None:
    """Shards to CLIP embeddings, one part per shard.

    Images are decoded ahead of the encoder. A sample that cannot be read is a row that says why.

    Reads:
      the shards; the encoder's weights, which open_clip downloads once
    Writes:
      {root}/embeddings/{stem}.parquet   a row per readable sample
      {root}/rejects/{stem}.parquet      a row per unreadable one, with the reason
    Settings:
      embed, run
    Examples:
      ratecluster embed --shards my-shards --root my-run
      ratecluster embed --shards 's3://b/{00000..00099}.tar' --root s3://b/run
          --set embed.model=ViT-L-14 --set embed.pretrained=openai
    """
    sections, paths = begin(root, config_file, sets, address)
    found, embed = list_shards(shards), named("embed")
    check(embed, sections)
    with owning(paths.root, sections["run"], found):
        made = embed.stage.run(sections["embed"], paths, found, overwrite)
    _answer(embed, made, paths)


def caption_command(
    root: Root,
    captions_from: CaptionsFrom = None,
    config_file: ConfigFile = None,
    sets: Overrides = None,
    address: Address = None,
) -> None:
    """Ranked captions for every cluster.

    Candidates are a vocabulary and n-grams of the samples' alt texts; members vote by CLIP, and
    what tells a cluster from its neighbours ranks first. With caption.namer a vision-language
    model behind an OpenAI-compatible server names each cluster once; what it is sent stands at
    caption.namer below. Interrupted, it goes on from the names it has.

    Reads:
      {root}/embeddings/, assignments/, clusters/
      the input shards, for caption.namer
    Writes:
      {root}/captions/captions.parquet   a row per cluster and rank
      {root}/captions/voted.parquet      the same without a model's names
      {root}/captions/candidates.parquet
    Settings:
      caption, run
    Examples:
      ratecluster caption --root my-run
      ratecluster caption --root my-run --captions-from my-words.txt
    """
    sections, paths = begin(root, config_file, with_captions(sets, captions_from), address)
    _run_one(named("caption"), sections, paths)


def _command(stage: Stage) -> Any:
    """The command of a stage that reads nothing but the run's root."""

    def command(
        root: Root,
        config_file: ConfigFile = None,
        sets: Overrides = None,
        address: Address = None,
    ) -> None:
        _run_one(stage, *begin(root, config_file, sets, address))

    return command


def _run_one(stage: Stage, sections: Sections, paths: layout.RunPaths) -> None:
    with owning(paths.root, sections["run"]):
        made = stage.stage.run(sections[stage.name], paths)
    _answer(stage, made, paths)


def _answer(stage: Stage, made: dict[str, Any], paths: layout.RunPaths) -> None:
    """Print what a stage prints, if anything; with --json its manifest without the shards."""
    text = getattr(stage.stage, "text", None)  # of evaluate and report
    facts = {name: value for name, value in made.items() if name != "shards"}
    shown = {"stage": stage.name, "root": paths.root, **facts}
    console.answer(text(made) if text else "", shown)


def check(stage: Stage, sections: Sections) -> None:
    """UserError for what would stop the stage, before any stage has begun."""
    if look := getattr(stage.settings, "check", None):
        look(sections)


TRAIN = """Embeddings to the network that makes clusters visible.

Maximal coding rate reduction on a sample of the embeddings; the best network on the way is
kept. An interrupted training goes on from its last checkpoint.

Reads:
  {root}/embeddings/                 a sample of the rows
Writes:
  {root}/network/                    weights, history, landmarks
Settings:
  train, run
Examples:
  ratecluster train --root my-run
  ratecluster train --root my-run --set train.words=0
"""
SELECT_K = """Choose the number of clusters; assign every sample.

k is where the features are coded in few bits. --set select_k.k=50 overrides it.

Reads:
  {root}/network/, {root}/embeddings/   all parts, twice
Writes:
  {root}/clusters/                   curve, tree, prototypes, typical members
  {root}/assignments/{stem}.parquet  a row per embedded sample
Settings:
  select_k, run
Examples:
  ratecluster select-k --root my-run
  ratecluster select-k --root my-run --set select_k.k_min=20
      --set select_k.k_max=200
"""
WRITE = """Labels, labelled shards and the table of clusters.

Reads:
  {root}/embeddings/, rejects/, assignments/, captions/
  the input shards again; the lists of write.exclude
Writes:
  {root}/labels/{stem}.parquet       a row per sample, failures included
  {root}/labeled/{stem}.tar          the shard, `ratecluster` added to its json
  {root}/clusters.parquet            a row per cluster
  {root}/run.json                    what made the run
  {root}/README.md                   how Hugging Face datasets reads it
  {root}/exclude/                    what is left out, a file per shard
Settings:
  write, run
Examples:
  ratecluster write --root my-run
  ratecluster write --root my-run --set write.shards=false
"""
REPORT = """One self-contained page to look at. Prints where it is.

Reads:
  everything below {root}; of the input shards the pictures that are shown
Writes:
  {root}/report/index.html
  {root}/report/galleries/           where the page would grow too large
Settings:
  report, run
Examples:
  ratecluster report --root my-run
  ratecluster report --root my-run --set report.gallery=24
"""
EVALUATE = """Accuracy against a json field that holds the truth.

Beside k-means of the same embeddings; prints the comparison.

Reads:
  {root}/embeddings/                 the true class, in `json`
  {root}/assignments/, clusters/, captions/
  the encoder's text side, for evaluate.captions
Writes:
  {root}/evaluation.json
Settings:
  evaluate, run
Examples:
  ratecluster evaluate --root my-run --set evaluate.label=label
"""

PAGES = {
    "train": TRAIN,
    "select_k": SELECT_K,
    "write": WRITE,
    "evaluate": EVALUATE,
    "report": REPORT,
}


def run_command(
    shards: Shards,
    root: Root,
    config_file: ConfigFile = None,
    sets: Overrides = None,
    address: Address = None,
    overwrite: Overwrite = False,
    captions_from: CaptionsFrom = None,
) -> None:
    """Every stage in order, from shards to labels and report.

    That is embed, train, select-k, caption, write and report; it ends with a summary. Evaluates
    too if evaluate.label names a json field. What is done already is not done again.

    Reads:
      the shards, which are never changed
    Writes:
      {root}/labels/{stem}.parquet       what you came for: a row per sample
      {root}/labeled/{stem}.tar          the shards again, with labels
      {root}/report/index.html           what to look at
      {root}/                            what the stages leave: see their --help
    Settings:
      all
    Examples:
      ratecluster run --shards my-shards --root my-run
      ratecluster run --shards my-shards --root my-run --config ratecluster.toml
      ratecluster run --shards my-shards --root my-run --quiet --json > summary.json
    """
    sections, paths = begin(root, config_file, with_captions(sets, captions_from), address)
    found, asked = (
        list_shards(shards),
        [stage for stage in stages.STAGES if _asked(stage, sections)],
    )
    for stage in asked:
        check(stage, sections)
    more: dict[str, dict[str, Any]] = {"embed": {"shards": found, "overwrite": overwrite}}
    made: dict[str, dict[str, Any]] = {}
    with owning(paths.root, sections["run"], found):
        for stage in asked:
            made[stage.name] = stage.stage.run(
                sections[stage.name], paths, **more.get(stage.name, {})
            )
            if stage.name == "embed" and named("evaluate") in asked:
                named("evaluate").settings.find_label(sections["evaluate"], paths)
    facts = {"root": paths.root, **summary(paths), "report": made["report"]["page"]}
    texts = [summary_text(facts)]
    if "evaluate" in made:
        facts["evaluation"] = made["evaluate"]["rows"]
        texts.append(named("evaluate").stage.text(made["evaluate"]))
    console.answer("\n".join([*texts, f"report: {facts['report']}"]), facts)


def _asked(stage: Stage, sections: Sections) -> bool:
    return not stage.asked_by or bool(getattr(sections[stage.name], stage.asked_by))


def summary(paths: layout.RunPaths) -> dict[str, Any]:
    """What a finished run found."""
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
    """The same in a few lines."""
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


def add(app: App) -> None:
    """Add the commands of the stages in their order, then `run`."""
    own = {"embed": embed_command, "caption": caption_command}
    for stage in stages.STAGES:
        command = own.get(stage.name) or _command(stage)
        app.command(stage.command, help=PAGES.get(stage.name))(command)
    app.command("run")(run_command)
