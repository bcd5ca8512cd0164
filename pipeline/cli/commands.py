"""The commands before, beside and after the stages'. What each says is its manual page."""

import os
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli import curate_commands, export_commands, search_commands, stage_commands
from pipeline.cli.help_pages import App
from pipeline.cli.options import KINDS, Address, ConfigFile, Overrides, Root, Shards, begin
from pipeline.ops import status
from pipeline.ops.plan import estimate
from pipeline.ops.plan import stage as plan
from pipeline.ops.verify import stage as verify
from pipeline.prepare import init_config, pack
from pipeline.runtime import cluster, config, console
from pipeline.store import storage
from pipeline.store.listing import list_shards

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
    found = init_config.run(shards, out)
    console.answer(
        init_config.summary(found, shards, out), {"config": out, **init_config.facts(found)}
    )


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
      FOLDER/class/.../*.jpg       and png, webp, gif, bmp, tiff; .txt beside it
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
    with. Starts no Ray, and may be query while the run goes on.

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
    query = status.StatusQuery(sections, found, as_made=not (config_file or sets))
    owner = status.owner_of(paths.root)
    rows = status.with_heartbeat(status.collect(query, paths), owner)
    shown = status.text(paths.root, owner, rows)
    console.answer(shown, status.facts(paths.root, owner, rows))


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
      ratecluster plan --shards my-shards --nodes 2 --cpus 16 --gpus 4
          --encode-rate 2500 --config ratecluster.toml
    """
    target = estimate.Target(nodes, cpus, gpus, encode_rate)
    sections = config.load(KINDS, config_file, sets or ())
    found = plan.run(sections, list_shards(shards), target, sample, images)
    console.answer(plan.text(found), plan.facts(found))


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


def add(app: App) -> None:
    """Put all commands in, in the order of their help."""
    app.command("init")(init_command)
    app.command("shards")(shards_command)
    stage_commands.add(app)
    app.command("status")(status_command)
    app.command("plan")(plan_command)
    app.command("verify")(verify_command)
    search_commands.add(app)
    curate_commands.add(app)
    export_commands.add(app)
