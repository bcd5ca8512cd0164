"""The commands before, during and after a run. The docstring of a command is its help page.

A command imports what it uses when it runs, so that `--help` and `status` start fast.
"""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Option

from pipeline.cli import curate_commands as curate
from pipeline.cli import search_commands as search
from pipeline.cli import stage_commands
from pipeline.cli.help_pages import App
from pipeline.cli.options import (
    KINDS,
    Address,
    Common,
    ConfigFile,
    Overrides,
    Root,
    Shards,
    listed,
)
from pipeline.runtime import cluster, config, console
from pipeline.runtime.errors import UserError
from pipeline.store import storage
from pipeline.store.listing import list_shards

ABOUT = """Labels a web-scale image collection without labels.

The input is webdataset shards. Every image gets a cluster, a caption and a
confidence. The stages are embed, train, select-k, caption, write and report;
`run` runs them all. Each stage writes its files below --root. A rerun only
does the work that is missing there.

Environment:
  RAY_ADDRESS     the Ray cluster to join if --address is not given
  RAY_AUTH_MODE   `token` for a cluster that was started with a token
  NO_COLOR        if set: plain lines without colors or progress bars
  TERM            `dumb`: the same as NO_COLOR

Examples:
  ratecluster init --shards my-shards
  ratecluster run --shards my-shards --root my-run --config ratecluster.toml
  ratecluster status --root my-run
  ratecluster embed --help
  ratecluster --install-completion
"""


def init_command(
    shards: Shards,
    out: Annotated[str, Option(metavar="FILE", help="file to write")] = "ratecluster.toml",
) -> None:
    """Write a configuration that fits your shards and this machine.

    Reads one shard. Comments say what it contains and why each setting was
    chosen. An existing file is never overwritten.

    Reads:
      the list of shards, and the first shard
    Writes:
      --out, a TOML file for --config

    Examples:
      ratecluster init --shards my-shards
      ratecluster init --shards 's3://laion/{00000..41454}.tar' --out laion.toml
    """
    from pipeline.prepare import init_config

    found = init_config.run(shards, out)
    console.print_result(
        init_config.summary(found, shards, out), {"config": out, **init_config.facts(found)}
    )


def shards_command(
    source: Annotated[str, Option("--from", metavar="FOLDER", help="folder of images")],
    out: Annotated[str, Option(metavar="URL", help="folder for the shards")],
    *,
    common: Common,
) -> None:
    """Pack images into webdataset shards.

    The name of a class folder becomes the json field `label`. You do not need
    this command if you have shards.

    Reads:
      FOLDER/class/.../*.jpg       or png, webp, gif, bmp, tiff; and a .txt file
                                   of the same name
    Writes:
      {out}/00000.tar ...          the unchanged bytes of the images, .txt, .json
      {out}/00000.parquet ...      the same facts as a table
      {out}/00000_stats.json ...   counts; written last

    Examples:
      ratecluster shards --from my-photos --out my-shards
    Settings: shards
    """
    from pipeline.prepare import pack

    sections, _ = common.begin(out)
    storage.check_writable(out)
    folder = Path(source).resolve()
    with cluster.require_shared(storage.local_path(out), folder if folder.is_dir() else None):
        counts = pack.run(sections["shards"], source, out)
    console.print_result("", {"out": out, **counts})


def status_command(
    root: Root,
    shards: Annotated[
        list[str] | None,
        Option(metavar="SHARDS", help="shards of the run; shows which are new, changed or gone"),
    ] = None,
    embeddings: Annotated[
        str | None, Option(metavar="URL", help="the same for given embeddings")
    ] = None,
    config_file: ConfigFile = None,
    sets: Overrides = None,
) -> None:
    """Show how far each stage is and what a rerun would do.

    Also shows which process works on the run. Without --config and --set, each
    stage is compared with the settings that it was made with. You can call it
    during a run; it starts no Ray.

    Reads:
      {root}: manifests, names of the parts, the lock
    Writes:
      nothing

    Examples:
      ratecluster status --root my-run
      ratecluster status --root my-run --shards my-shards --json
    Settings: all
    """
    from pipeline.ops import status

    sections, paths = Common(config_file, sets).begin(root)
    found = None
    if shards or embeddings:
        sections, found = listed(sections, shards, embeddings, paths.root)
    elif not paths.top.names():
        raise UserError(f"{paths.root}: no run is there; give the --root of one, or --shards")
    query = status.StatusQuery(sections, found, as_made=not (config_file or sets))
    owner = status.owner_of(paths.root)
    rows = status.with_heartbeat(status.collect(query, paths), owner)
    facts = {"root": paths.root, "lock": owner, "stages": [asdict(row) for row in rows]}
    console.print_result(status.text(paths.root, owner, rows), facts)


def plan_command(
    shards: Shards,
    config_file: ConfigFile = None,
    sets: Overrides = None,
    nodes: Annotated[int, Option(metavar="N", help="nodes of the cluster")] = 1,
    cpus: Annotated[int, Option(metavar="N", help="CPUs of a node")] = os.cpu_count() or 1,
    gpus: Annotated[int, Option(metavar="N", help="GPUs of a node")] = 0,
    encode_rate: Annotated[
        float,
        Option(metavar="RATE", help="images/s of one GPU; 0: measured on this machine"),
    ] = 0.0,
    sample: Annotated[int, Option(metavar="N", help="number of shards to sample")] = 3,
    images: Annotated[int, Option(metavar="N", help="most images per sampled shard")] = 1000,
) -> None:
    """Estimate the time, memory and storage that a run will take.

    Embeds a few images on this machine, which takes about a minute. Needs no
    Ray and no root, and leaves no files.

    Reads:
      the first images of a few of the shards
    Writes:
      nothing

    Examples:
      ratecluster plan --shards my-shards
      ratecluster plan --shards my-shards --nodes 2 --cpus 16 --gpus 4
          --encode-rate 2500 --config ratecluster.toml
    Settings: all
    """
    from pipeline.ops.plan import stage as plan

    target = plan.Target(nodes, cpus, gpus, encode_rate)
    sections = config.load(KINDS, config_file, sets or ())
    found = plan.run(sections, list_shards(shards), target, sample, images)
    console.print_result(plan.text(found), found)


def verify_command(root: Root, address: Address = None) -> None:
    """Check a run for missing, damaged or inconsistent files.

    Reads every manifest, part and labelled shard again. Reports each problem in
    one line.

    Reads:
      all files below {root}; the input shards if they can still be read
    Writes:
      nothing

    Exit codes:
      0  no problem found
      1  problems found, or the check failed
      2  no run at --root, or a mistake in the command

    Examples:
      ratecluster verify --root my-run
    """
    from pipeline.ops.verify import stage as verify

    _, paths = Common(address=address).begin(root)
    with cluster.require_shared(None, storage.local_path(root)):
        found = verify.run(paths)
    lines = [*found.notes, *found.lines, *([] if found.count else [f"{root} is sound"])]
    facts = {"violations": found.count, "lines": found.lines, "notes": found.notes}
    console.print_result("\n".join(lines), {"root": paths.root, "sound": not found.count, **facts})
    if found.count:
        raise RuntimeError(f"{root} is not sound: {found.count:,} violations")


def add(app: App) -> None:
    """Add all commands, in the order of the help page."""
    app.add(init_command, shards_command, *stage_commands.commands())
    app.add(status_command, plan_command, verify_command)
    app.add(search.index_command, search.search_command, search.serve_command)
    app.add(curate.duplicates_command, curate.outliers_command, curate.balance_command)
    app.add(curate.assign_command, search.export_command)
