"""The commands of the stages, and of all of them. What each says is its manual page."""

from collections.abc import Callable
from typing import Any

from pipeline.artifacts import layout
from pipeline.caption import stage as caption
from pipeline.caption import vlm_client
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
from pipeline.embed import stage as embed
from pipeline.evaluate import stage as evaluate
from pipeline.report import stage as report
from pipeline.runtime import console
from pipeline.runtime.reject_reasons import printable
from pipeline.select_k import stage as select_k
from pipeline.store.listing import list_shards
from pipeline.train import stage as train
from pipeline.write import stage as write

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
    found = list_shards(shards)
    embed.check(sections["embed"])
    with owning(paths.root, sections["run"], found):
        made = embed.run(sections["embed"], found, paths, overwrite)
    console.answer("", stage_facts("embed", made, paths))


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
    vlm_client.check(sections["caption"])
    with owning(paths.root, sections["run"]):
        made = caption.run(sections["caption"], paths)
    console.answer("", stage_facts("caption", made, paths))


def _stage(section: str, room: Any, shown: Callable[[Any], str]) -> Callable[..., None]:
    """The command of a stage that needs nothing but what lies in the run's root."""

    def command(
        root: Root,
        config_file: ConfigFile = None,
        sets: Overrides = None,
        address: Address = None,
    ) -> None:
        sections, paths = begin(root, config_file, sets, address)
        with owning(paths.root, sections["run"]):
            made = room.run(sections[section], paths)
        made = made if isinstance(made, dict) else {"report": made}
        console.answer(shown(made), stage_facts(section, made, paths))

    return command


def stage_facts(stage: str, made: dict[str, Any], paths: layout.RunPaths) -> dict[str, Any]:
    """What a stage's manifest says, but for the list of shards."""
    facts = {name: value for name, value in made.items() if name != "shards"}
    return {"stage": stage, "root": paths.root, **facts}


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

STAGES = {
    "train": (train, TRAIN),
    "select-k": (select_k, SELECT_K),
    "write": (write, WRITE),
    "report": (report, REPORT),
    "evaluate": (evaluate, EVALUATE),
}
SHOWN = {"report": lambda made: made["report"], "evaluate": lambda made: evaluate.tables_of(made)}


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
    found = list_shards(shards)
    embed.check(sections["embed"])
    train.check(sections["train"], sections["embed"].model)  # before days of embedding
    caption.check(sections["caption"], sections["embed"].model)
    vlm_client.check(sections["caption"])
    scores = None
    with owning(paths.root, sections["run"], found):
        embed.run(sections["embed"], found, paths, overwrite)
        if sections["evaluate"].label:
            evaluate.check(sections["evaluate"], paths)
        for name, stage in RIVER.items():
            stage.run(sections[name], paths)
        if sections["evaluate"].label:
            scores = evaluate.run(sections["evaluate"], paths)
        page = report.run(sections["report"], paths)
    facts = {"root": paths.root, **summary(paths), "report": page}
    if scores:
        facts["evaluation"] = scores["rows"]
    table = [evaluate.tables_of(scores)] if scores else []
    console.answer("\n".join([summary_text(facts), *table, f"report: {page}"]), facts)


RIVER = {"train": train, "select_k": select_k, "caption": caption, "write": write}


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
    """Put them in, in the order in which the river flows."""
    app.command("embed")(embed_command)
    for name, (room, page) in STAGES.items():
        if name == "write":
            app.command("caption")(caption_command)
        app.command(name, help=page)(_stage(name.replace("-", "_"), room, SHOWN.get(name, _silent)))
    app.command("run")(run_command)


def _silent(made: Any) -> str:
    """The result of a stage whose line in the log says enough."""
    return ""
