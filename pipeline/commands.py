"""The commands that make, plan, watch and prove a run. What each says is its manual page."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline import (
    artifacts,
    capacity,
    caption,
    cluster,
    config,
    console,
    embed,
    evaluate,
    init,
    pack,
    plan,
    report,
    select_k,
    status,
    train,
    verify,
    write,
)
from pipeline.manual import App
from pipeline.options import (
    KINDS,
    Address,
    ConfigFile,
    Overrides,
    Overwrite,
    Root,
    Shards,
    begin,
    owning,
)
from pipeline.reasons import printable
from pipeline.store import storage
from pipeline.store.listing import list_shards
from pipeline.use import commands

LARGEST = 10  # clusters in the summary
ABOUT = """Labels a web-scale image collection without labels.

Webdataset shards go in; every image comes back with a cluster, a caption for it, and how sure
that is. The stages are embed, train, select-k, caption, write and report, and `run` is all of
them. Each leaves its files below --root, and does again only what is missing there.

Environment:
  RAY_ADDRESS     of the Ray cluster to join, where --address is not given
  RAY_AUTH_MODE   token, for a cluster that was started with one
  NO_COLOR        if set: plain lines, nothing that steers a terminal
  TERM            dumb: the same
Examples:
  ratecluster init --shards my-shards
  ratecluster run --shards my-shards --root my-run --config ratecluster.toml
  ratecluster status --root my-run
  ratecluster embed --help
  ratecluster --install-completion
"""

app = App(KINDS, help=ABOUT)


@app.command("init")
def init_command(
    shards: Shards,
    out: Annotated[str, typer.Option(metavar="FILE", help="to write")] = "ratecluster.toml",
) -> None:
    """Look at one of your shards and write a commented configuration.

    What it found stands in comments, beside the settings that follow from it and from this
    machine's cores and GPUs. An existing file is left alone.

    Reads:
      the list of shards, and the whole of the first one
    Writes:
      --out, a TOML file for --config
    Examples:
      ratecluster init --shards my-shards
      ratecluster init --shards 's3://laion/{00000..41454}.tar' --out laion.toml
    """
    found = init.run(shards, out)
    console.answer(init.summary(found, shards, out), {"config": out, **init.facts(found)})


@app.command("shards")
def shards_command(
    source: Annotated[
        str,
        typer.Option("--from", metavar="FOLDER", help="folder of images, cifar10 or cifar100"),
    ],
    out: Annotated[str, typer.Option(metavar="URL", help="folder for the shards")],
    data_dir: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="with an extracted CIFAR, or for one")
    ] = None,
    config_file: ConfigFile = None,
    sets: Overrides = None,
    address: Address = None,
) -> None:
    """Pack images into webdataset shards.

    Class folders become the json field `label`. Not needed where there are shards.

    Reads:
      FOLDER/class/.../*.jpg       and png, webp, gif, bmp, tiff; .txt of the same name
      cifar10, cifar100            downloaded, or from --data-dir
    Writes:
      {out}/00000.tar ...          the images' own bytes, .txt, .json
      {out}/00000.parquet ...      the same facts as a table
      {out}/00000_stats.json ...   counts; written last
    Settings:
      shards
    Examples:
      ratecluster shards --from my-photos --out my-shards
      ratecluster shards --from cifar10 --out cifar10-shards --set shards.split=test
    """
    sections, _ = begin(out, config_file, sets, address)
    storage.check_writable(out)
    folder = Path(source).resolve()
    with cluster.sharing(storage.local_path(out), folder if folder.is_dir() else None):
        counts = pack.run(sections["shards"], source, out, data_dir)
    console.answer("", {"out": out, **counts})


@app.command("embed")
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


def _add_stage(
    name: str, stage: Any, page: str, shown: Callable[[Any], str] = lambda _: ""
) -> None:
    """A command for a stage that needs nothing but what lies in the run's root."""
    section = name.replace("-", "_")

    def command(
        root: Root,
        config_file: ConfigFile = None,
        sets: Overrides = None,
        address: Address = None,
    ) -> None:
        sections, paths = begin(root, config_file, sets, address)
        with owning(paths.root, sections["run"]):
            made = stage.run(sections[section], paths)
        made = made if isinstance(made, dict) else {"report": made}
        console.answer(shown(made), stage_facts(section, made, paths))

    app.command(name, help=page)(command)


def stage_facts(stage: str, made: dict[str, Any], paths: artifacts.RunPaths) -> dict[str, Any]:
    """What a stage's manifest says, but for the list of shards."""
    facts = {name: value for name, value in made.items() if name != "shards"}
    return {"stage": stage, "root": paths.root, **facts}


_add_stage(
    "train",
    train,
    """Embeddings to the network that makes clusters visible.

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
    """,
)
_add_stage(
    "select-k",
    select_k,
    """Choose the number of clusters; assign every sample.

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
      ratecluster select-k --root my-run --set select_k.k_min=20 --set select_k.k_max=200
    """,
)
_add_stage(
    "caption",
    caption,
    """Ranked captions for every cluster.

    By the votes of the members' pictures over a vocabulary, and by what their own captions say.

    Reads:
      {root}/embeddings/, {root}/assignments/
    Writes:
      {root}/captions/captions.parquet   a row per cluster and rank
    Settings:
      caption, run
    Examples:
      ratecluster caption --root my-run
      ratecluster caption --root my-run --set caption.vocabulary=my-words.txt
    """,
)
_add_stage(
    "write",
    write,
    """Labels, labelled shards and the table of clusters.

    Reads:
      {root}/embeddings/, rejects/, assignments/, captions/, and the input shards again
    Writes:
      {root}/labels/{stem}.parquet       a row per sample of the shard, failures included
      {root}/labeled/{stem}.tar          the shard again, `ratecluster` added to each json
      {root}/clusters.parquet            a row per cluster
      {root}/run.json                    what made the run
    Settings:
      write, run
    Examples:
      ratecluster write --root my-run
      ratecluster write --root my-run --set write.shards=false
    """,
)
_add_stage(
    "report",
    report,
    """One self-contained page to look at. Prints where it is.

    Reads:
      everything below {root}; of the input shards the pictures that are shown
    Writes:
      {root}/report/index.html
    Settings:
      report, run
    Examples:
      ratecluster report --root my-run
      ratecluster report --root my-run --set report.gallery=24
    """,
    lambda made: made["report"],
)
_add_stage(
    "evaluate",
    evaluate,
    """Accuracy against a json field that holds the truth. Prints the comparison with k-means.

    Reads:
      {root}/embeddings/                 the true class, in `json`
      {root}/assignments/, {root}/captions/
    Writes:
      {root}/evaluation.json
    Settings:
      evaluate, run
    Examples:
      ratecluster evaluate --root my-run --set evaluate.label=label
    """,
    lambda made: evaluate.table(made),
)


@app.command("run")
def run_command(
    shards: Shards,
    root: Root,
    config_file: ConfigFile = None,
    sets: Overrides = None,
    address: Address = None,
    overwrite: Overwrite = False,
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
      {root}/                            what the stages leave: see each stage's --help
    Settings:
      all
    Examples:
      ratecluster run --shards my-shards --root my-run
      ratecluster run --shards my-shards --root my-run --config ratecluster.toml
      ratecluster run --shards my-shards --root my-run --quiet --json > summary.json
    """
    sections, paths = begin(root, config_file, sets, address)
    found = list_shards(shards)
    embed.check(sections["embed"])
    train.check(sections["train"], sections["embed"].model)  # before days of embedding
    caption.check(sections["caption"], sections["embed"].model)
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
    table = [evaluate.table(scores)] if scores else []
    console.answer("\n".join([summary_text(facts), *table, f"report: {page}"]), facts)


RIVER = {"train": train, "select_k": select_k, "caption": caption, "write": write}


def summary(paths: artifacts.RunPaths) -> dict[str, Any]:
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


@app.command("status")
def status_command(
    root: Root,
    shards: Annotated[
        str | None, typer.Option(metavar="SHARDS", help="of the run; tells new, changed, gone")
    ] = None,
    config_file: ConfigFile = None,
    sets: Overrides = None,
) -> None:
    """How far each stage is, and what the same command would do.

    And who is at work. Without --config and --set, settings are those that each stage was made
    with. Starts no Ray, and may be asked while the run goes on.

    Reads:
      {root}: manifests, names of the parts, the lock
    Writes:
      nothing
    Settings:
      all
    Examples:
      ratecluster status --root my-run
      ratecluster status --root my-run --shards my-shards --json
    """
    sections, paths = begin(root, config_file, sets, None)
    found = list_shards(shards) if shards else None
    asked = status.Asked(sections, found, as_made=not (config_file or sets))
    owner = status.owner_of(paths.root)
    rows = status.with_heartbeat(status.collect(asked, paths), owner)
    shown = status.text(paths.root, owner, rows)
    console.answer(shown, status.facts(paths.root, owner, rows))


@app.command("plan")
def plan_command(
    shards: Shards,
    config_file: ConfigFile = None,
    sets: Overrides = None,
    nodes: Annotated[int, typer.Option(metavar="N", help="of the cluster")] = 1,
    cpus: Annotated[int, typer.Option(metavar="N", help="of each node")] = os.cpu_count() or 1,
    gpus: Annotated[int, typer.Option(metavar="N", help="of each node")] = 0,
    encode_rate: Annotated[
        float,
        typer.Option(metavar="RATE", help="images/s of one GPU; 0: measured on this machine"),
    ] = 0.0,
    sample: Annotated[int, typer.Option(metavar="N", help="shards that are sampled")] = 3,
    images: Annotated[int, typer.Option(metavar="N", help="of each sampled shard, at most")] = 1000,
) -> None:
    """What a run will take: time, memory, bytes. Tries a few shards here, about a minute.

    Needs no Ray and no root, and leaves nothing behind.

    Reads:
      the first images of a few of the shards
    Writes:
      nothing
    Settings:
      all
    Examples:
      ratecluster plan --shards my-shards
      ratecluster plan --shards my-shards --nodes 2 --cpus 16 --gpus 4 --encode-rate 2500
          --config ratecluster.toml
    """
    target = capacity.Target(nodes, cpus, gpus, encode_rate)
    sections = config.load(KINDS, config_file, sets or ())
    found = plan.run(sections, list_shards(shards), target, sample, images)
    console.answer(plan.text(found), plan.facts(found))


@app.command("verify")
def verify_command(root: Root, address: Address = None) -> None:
    """Prove that all of a run is there and agrees.

    Reads every manifest, part and labelled shard again, and names what is missing, damaged, left
    over or contradictory.

    Reads:
      everything below {root}, and the input shards where they can still be read
    Writes:
      nothing
    Exit codes:
      0  the run is sound
      1  it is not, or looking at it failed
      2  there is no run, or a mistake in the command
    Examples:
      ratecluster verify --root my-run
    """
    _, paths = begin(root, None, None, address)
    with cluster.sharing(None, storage.local_path(root)):
        found = verify.run(paths)
    lines = [*found.notes, *found.lines, *([] if found.count else [f"{root} is sound"])]
    said = {"violations": found.count, "lines": found.lines, "notes": found.notes}
    console.answer("\n".join(lines), {"root": paths.root, "sound": not found.count, **said})
    if found.count:
        raise RuntimeError(f"{root} is not sound: {found.count:,} violations")


commands.add(app)
