"""One command line for every stage: parse, check, run, say in one line what went wrong.

Exit code 0: everything asked for was done. 2: the user's mistake. 1: a failure.
"""

import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline import (
    artifacts,
    capacity,
    caption,
    cluster,
    config,
    embed,
    evaluate,
    namer,
    pack,
    plan,
    redaction,
    report,
    select_k,
    status,
    train,
    verify,
    write,
)
from pipeline.errors import UserError
from pipeline.options import (
    KINDS,
    RUN,
    Address,
    CaptionsFrom,
    ConfigFile,
    Overrides,
    Overwrite,
    Root,
    Shards,
    begin,
    owning,
    settings_help,
    with_captions,
)
from pipeline.reasons import printable
from pipeline.store import storage
from pipeline.store.listing import list_shards
from pipeline.use import commands

log = logging.getLogger(__name__)
LARGEST = 10  # clusters in the summary
INTERRUPTED = 130  # what typer returns where it met a KeyboardInterrupt
SAID = re.compile(rf"^{UserError.__module__}\.{UserError.__name__}: (.+)$", re.MULTILINE)

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    help="Labels a web-scale image collection without labels.",
)


@app.command("shards", epilog=settings_help("shards"))
def shards_command(
    source: Annotated[str, typer.Option("--from", help="folder of images, cifar10 or cifar100")],
    out: Annotated[str, typer.Option(help="URL of the folder for the shards")],
    data_dir: Annotated[str | None, typer.Option(help="folder with CIFAR, or for it")] = None,
    config_file: ConfigFile = None,
    sets: Overrides = None,
    address: Address = None,
) -> None:
    """Pack images into webdataset shards."""
    sections, _ = begin(out, config_file, sets, address)
    storage.check_writable(out)
    folder = Path(source).resolve()
    with cluster.sharing(storage.local_path(out), folder if folder.is_dir() else None):
        pack.run(sections["shards"], source, out, data_dir)


@app.command("embed", epilog=settings_help("embed", "run"))
def embed_command(
    shards: Shards,
    root: Root,
    config_file: ConfigFile = None,
    sets: Overrides = None,
    address: Address = None,
    overwrite: Overwrite = False,
) -> None:
    """Shards to CLIP embeddings, one part per shard."""
    sections, paths = begin(root, config_file, sets, address)
    found = list_shards(shards)
    embed.check(sections["embed"])
    with owning(paths.root, sections["run"], found):
        embed.run(sections["embed"], found, paths, overwrite)


def _add_stage(name: str, stage: Any, help: str) -> None:
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
            stage.run(sections[section], paths)

    app.command(name, epilog=settings_help(section, "run"), help=help)(command)


_add_stage("train", train, "Embeddings to the network that makes clusters visible.")
_add_stage("select-k", select_k, "Choose the number of clusters; assign every sample.")


@app.command("caption", epilog=settings_help("caption", "run"))
def caption_command(
    root: Root,
    captions_from: CaptionsFrom = None,
    config_file: ConfigFile = None,
    sets: Overrides = None,
    address: Address = None,
) -> None:
    """Ranked captions for every cluster.

    Candidates are a vocabulary and n-grams of the samples' alt texts; members vote by CLIP, and
    what tells a cluster from its neighbours ranks first. With caption.namer a vision-language model
    behind an OpenAI-compatible server names each cluster once; what it is sent stands at
    caption.namer below. Interrupted, it goes on from the names it has.
    """
    sections, paths = begin(root, config_file, with_captions(sets, captions_from), address)
    namer.check(sections["caption"])
    with owning(paths.root, sections["run"]):
        caption.run(sections["caption"], paths)


_add_stage("write", write, "Labels, labelled shards and the table of clusters.")
_add_stage("report", report, "One self-contained page to look at.")
_add_stage("evaluate", evaluate, "Accuracy against a json field that holds the truth.")


@app.command("status", epilog=settings_help(*RUN))
def status_command(
    root: Root,
    shards: Annotated[str | None, typer.Option(help="of the run; tells new, changed, gone")] = None,
    config_file: ConfigFile = None,
    sets: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="the same as JSON")] = False,
) -> None:
    """How far each stage is, who is at work, what the same command again would do. Reads only.

    Without --config and --set, settings are those that each stage was made with.
    """
    sections, paths = begin(root, config_file, sets, None)
    found = list_shards(shards) if shards else None
    asked = status.Asked(sections, found, as_made=not (config_file or sets))
    owner = status.owner_of(paths.root)
    rows = status.with_heartbeat(status.collect(asked, paths), owner)
    typer.echo((status.as_json if as_json else status.text)(paths.root, owner, rows))


@app.command("plan", epilog=settings_help(*RUN))
def plan_command(
    shards: Shards,
    config_file: ConfigFile = None,
    sets: Overrides = None,
    nodes: Annotated[int, typer.Option(help="of the cluster")] = 1,
    cpus: Annotated[int, typer.Option(help="of each node")] = os.cpu_count() or 1,
    gpus: Annotated[int, typer.Option(help="of each node")] = 0,
    encode_rate: Annotated[
        float, typer.Option(help="images/s of one GPU; 0: measured on this machine")
    ] = 0.0,
    sample: Annotated[int, typer.Option(help="shards that are sampled")] = 3,
    images: Annotated[int, typer.Option(help="of each sampled shard, at most")] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="the same as JSON")] = False,
) -> None:
    """What a run will take: time, memory, bytes. Tries a few shards here; needs no Ray, no root."""
    target = capacity.Target(nodes, cpus, gpus, encode_rate)
    sections = config.load(KINDS, config_file, sets or ())
    found = plan.run(sections, list_shards(shards), target, sample, images)
    typer.echo((plan.as_json if as_json else plan.text)(found))


@app.command("verify")
def verify_command(root: Root, address: Address = None) -> None:
    """Prove that all of a run is there and agrees: every manifest, part and labelled shard."""
    _, paths = begin(root, None, None, address)
    with cluster.sharing(None, storage.local_path(root)):
        found = verify.run(paths)
    for line in (*found.notes, *found.lines):
        typer.echo(line)
    if found.count:
        raise RuntimeError(f"{root} is not sound: {found.count:,} violations")
    typer.echo(f"{root} is sound")


@app.command("run", epilog=settings_help(*RUN))
def run_command(
    shards: Shards,
    root: Root,
    config_file: ConfigFile = None,
    sets: Overrides = None,
    address: Address = None,
    overwrite: Overwrite = False,
    captions_from: CaptionsFrom = None,
) -> None:
    """Every stage in order: embed, train, select-k, caption, write, report.

    Evaluates too if evaluate.label names a json field. What is done already is not done again.
    """
    sections, paths = begin(root, config_file, with_captions(sets, captions_from), address)
    found = list_shards(shards)
    embed.check(sections["embed"])
    train.check(sections["train"], sections["embed"].model)  # before days of embedding
    caption.check(sections["caption"], sections["embed"].model)
    namer.check(sections["caption"])
    with owning(paths.root, sections["run"], found):
        embed.run(sections["embed"], found, paths, overwrite)
        if sections["evaluate"].label:
            evaluate.check(sections["evaluate"], paths)
        for stage in (train, select_k, caption, write):
            stage.run(sections[stage.__name__.rpartition(".")[2]], paths)
        if sections["evaluate"].label:
            evaluate.run(sections["evaluate"], paths)
        page = report.run(sections["report"], paths)
    typer.echo(summary(paths))
    typer.echo(f"report: {page}")


commands.add(app)


def summary(paths: artifacts.RunPaths) -> str:
    """What a finished run found, in a few lines."""
    embedded, clusters = paths.embeddings.manifest(), paths.clusters.manifest()
    captions = paths.captions.manifest()["captions"]
    lines = [
        f"{embedded['samples']:,} samples in {len(embedded['shards']):,} shards: "
        f"{embedded['embedded']:,} labelled, {embedded['rejected']:,} rejected"
        + (f", {embedded['damaged']:,} shards damaged" if embedded["damaged"] else ""),
        f"{clusters['k']} clusters (fewest bits at {clusters['k_best']}, band "
        f"{clusters['k_low']} to {clusters['k_high']}); the largest:",
    ]
    for number, size in list(enumerate(clusters["sizes"]))[:LARGEST]:
        lines.append(f"{number:>5} {size:>12,}  {printable(str(captions[number]))}")
    return "\n".join(lines)


class PlainFormatter(redaction.Formatter):
    """A message is one line, and nothing that data brought into it steers the terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802
        return "\n".join(map(printable, super().formatException(ei).split("\n")))


def invoke(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PlainFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for noisy in ("ray", "open_clip", "root", "httpx", "botocore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("pipeline").setLevel(logging.INFO)
    logging.getLogger().setLevel(logging.WARNING)
    for kind in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=kind)
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        with cluster.session():
            code = app(arguments, prog_name="ratecluster", standalone_mode=False)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
    except (KeyboardInterrupt, typer.Abort):
        return _say("interrupted; run the same command again to go on", 1)
    except Exception as error:  # the last door: whatever it is becomes one line and a code
        return _failed(error)
    return 0


def _failed(error: Exception) -> int:
    """Say in one line what went wrong; 2 if the user can mend it."""
    if usage := getattr(error, "format_message", None):  # click's, of which typer has its own copy
        return _say(f"{usage().rstrip('.')}; see ratecluster --help", 2)
    cause = underlying(error)
    if type(cause) is UserError:
        return _say(str(cause), 2)
    if said := SAID.findall(f"{error}\n{cause}"):  # of what an actor raised Ray keeps the text
        return _say(said[-1], 2)
    if not _said_by_us(cause):
        log.error("ratecluster failed", exc_info=error)
    reason = (str(cause).strip() or "no reason given").splitlines()[-1]
    return _say(f"failed: {type(cause).__name__}: {reason}", 1)


def _said_by_us(error: BaseException) -> bool:
    """Whether it is a stage's own word, which needs no traceback."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    ours = trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith(
        "pipeline."
    )
    return type(error) is RuntimeError and ours


def underlying(error: BaseException) -> BaseException:
    """What was raised in a task or a worker, out of what Ray wrapped around it."""
    failures = getattr(error, "worker_failures", None)  # of Ray Train, by rank
    inner = next(iter(failures.values())) if failures else getattr(error, "cause", None)
    return underlying(inner) if isinstance(inner, BaseException) and inner is not error else error


def _say(message: str, code: int) -> int:
    plain = printable(redaction.redacted(" ".join(message.split())))
    typer.echo(f"ratecluster: {plain}", err=True)
    return code


def main() -> None:
    """The console script."""
    sys.exit(invoke())
