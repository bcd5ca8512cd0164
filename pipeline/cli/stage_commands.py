"""The commands of the stages, and `run`, which runs all stages."""

import logging
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
    lock_root,
    with_captions,
)
from pipeline.cli.run_command import check, run_command
from pipeline.runtime import console
from pipeline.runtime.config import Sections
from pipeline.store.listing import list_shards

log = logging.getLogger(__name__)


def embed_command(
    shards: Shards,
    root: Root,
    config_file: ConfigFile = None,
    sets: Overrides = None,
    address: Address = None,
    overwrite: Overwrite = False,
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
    sections, paths = begin(root, config_file, sets, address)
    found, embed = list_shards(shards), named("embed")
    check(embed, sections)
    with lock_root(paths.root, sections["run"], found):
        made = embed.stage.run(sections["embed"], paths, found, overwrite)
    _print_manifest(embed, made, paths)


def caption_command(
    root: Root,
    captions_from: CaptionsFrom = None,
    config_file: ConfigFile = None,
    sets: Overrides = None,
    address: Address = None,
) -> None:
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
    sections, paths = begin(root, config_file, with_captions(sets, captions_from), address)
    _run_one(named("caption"), sections, paths)


def _command(stage: Stage) -> Any:
    """The command of a stage that reads only the run's root."""

    def command(
        root: Root,
        config_file: ConfigFile = None,
        sets: Overrides = None,
        address: Address = None,
    ) -> None:
        _run_one(stage, *begin(root, config_file, sets, address))

    return command


def _run_one(stage: Stage, sections: Sections, paths: layout.RunPaths) -> None:
    check(stage, sections)
    with lock_root(paths.root, sections["run"]):
        made = stage.stage.run(sections[stage.name], paths)
    _print_manifest(stage, made, paths)


def _print_manifest(stage: Stage, made: dict[str, Any], paths: layout.RunPaths) -> None:
    """Print the text of the stage; with --json its manifest without the shards."""
    text = getattr(stage.stage, "text", None)  # of evaluate and report
    facts = {name: value for name, value in made.items() if name != "shards"}
    shown = {"stage": stage.name, "root": paths.root, **facts}
    console.print_result(text(made) if text else "", shown)


TRAIN = """Train the network that makes the clusters separable.

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
"""
SELECT_K = """Choose the number of clusters and assign every sample.

k is chosen where the features need the fewest bits. --set select_k.k=50 sets
it by hand.

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
"""
WRITE = """Write labels, labelled shards and the table of clusters.

Reads:
  {root}/embeddings/, rejects/, assignments/, captions/
  the input shards again; the lists of write.exclude
Writes:
  {root}/labels/{stem}.parquet       a row per sample, also for failed ones
  {root}/labeled/{stem}.tar          the shard, with `ratecluster` in its json
  {root}/clusters.parquet            a row per cluster
  {root}/run.json                    versions, settings and counts of the run
  {root}/README.md                   how to load it with Hugging Face datasets
  {root}/exclude/                    the excluded samples, a file per shard

Examples:
  ratecluster write --root my-run
  ratecluster write --root my-run --set write.shards=false
Settings: write, run
"""
REPORT = """Write a web page about the run and print its path.

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
"""
EVALUATE = """Measure accuracy against a json field with the true class.

Also scores k-means on the same embeddings, and prints the comparison.

Reads:
  {root}/embeddings/                 the true class, in the column `json`
  {root}/assignments/, clusters/, captions/
Writes:
  {root}/evaluation.json

Examples:
  ratecluster evaluate --root my-run --set evaluate.label=label
Settings: evaluate, run
"""
PAGES = {
    "train": TRAIN,
    "select_k": SELECT_K,
    "write": WRITE,
    "evaluate": EVALUATE,
    "report": REPORT,
}


def add(app: App) -> None:
    """Add the commands of the stages in their order, then `run`."""
    own = {"embed": embed_command, "caption": caption_command}
    for stage in stages.STAGES:
        command = own.get(stage.name) or _command(stage)
        app.command(stage.command, help=PAGES.get(stage.name))(command)
    app.command("run")(run_command)
