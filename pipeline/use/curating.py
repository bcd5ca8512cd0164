"""The commands that list samples to leave out, and the one for new shards."""

from typing import Annotated

import typer

from pipeline import artifacts
from pipeline.options import (
    Address,
    ConfigFile,
    Overrides,
    Overwrite,
    Root,
    Shards,
    begin,
    owning,
    settings_help,
)
from pipeline.store import storage
from pipeline.store.listing import list_shards
from pipeline.use import assign, balance, duplicates, outliers

UNEXPLAINED = 0.999  # quantile of the run's outlier_score


def add(app: typer.Typer) -> None:
    """Put them beside the stages' commands."""
    for command in (duplicates_command, outliers_command, balance_command):
        name = command.__name__.removesuffix("_command")
        app.command(name, epilog=settings_help("run"))(command)
    app.command("assign", epilog=settings_help("embed", "write", "run"))(assign_command)


def _say(what: str, found: dict[str, int], paths: artifacts.RunPaths, name: str) -> None:
    share = found["samples"] / max(found["of"], 1)
    listed = f"{paths.root}/curation/{name}"
    typer.echo(f"{found['samples']:,} of {found['of']:,} samples ({share:.2%}) {what}: {listed}")


def duplicates_command(
    root: Root,
    threshold: Annotated[
        float, typer.Option(help="cosine over which a pair are duplicates, 0.8 to 1")
    ] = 0.95,
    sets: Overrides = None,
    address: Address = None,
) -> None:
    """Near-duplicates within clusters (SemDeDup), and what each threshold would remove.

    Members of a cluster are put in an order, those farthest from its centre first; one is a
    duplicate if the cosine of its CLIP embedding to any that comes before is over the threshold.
    The cosines are computed once: with another threshold the command takes seconds. It removes
    nothing: curation/duplicates/ in the run's folder lists sample_id, reason, duplicate_of and
    similarity. To leave them out of the labelled shards:

    ratecluster write --root RUN --set write.exclude=RUN/curation/duplicates
    """
    cfg = duplicates.Config(threshold=threshold)
    sections, paths = begin(root, None, sets, address)
    with owning(paths.root, sections["run"]):
        text = duplicates.run(cfg, paths)
    typer.echo(text)


def outliers_command(
    root: Root,
    quantile: Annotated[
        float | None, typer.Option(help="share of all samples that are none [0.99]")
    ] = None,
    score: Annotated[
        float | None, typer.Option(help="outlier_score over which a sample is one, 0 to 2")
    ] = None,
    sets: Overrides = None,
    address: Address = None,
) -> None:
    """The samples that are farthest from every cluster.

    outlier_score is 1 − cosine to the nearest prototype. Those over --score, or over the exact
    --quantile of all samples, are listed in curation/outliers/ in the run's folder, for
    write.exclude.
    """
    share = 0.99 if quantile is None and score is None else quantile
    cfg = outliers.Config(quantile=share, score=score)
    sections, paths = begin(root, None, sets, address)
    with owning(paths.root, sections["run"]):
        found = outliers.run(cfg, paths)
    _say(f"have an outlier_score over {found['threshold']:.6g}", found, paths, "outliers")


def balance_command(
    root: Root,
    per_cluster: Annotated[int, typer.Option(help="samples that a cluster keeps, at most")],
    how: Annotated[
        str, typer.Option(help="which: random, confident, or coding-rate (most diverse)")
    ] = "random",
    seed: Annotated[int, typer.Option(help="of what is random")] = 0,
    sets: Overrides = None,
    address: Address = None,
) -> None:
    """At most so many samples of each cluster.

    coding-rate takes, one after the other, the member that adds most to the log-determinant of
    their features, out of a random 4 × PER_CLUSTER of them, 4,096 at least. In the run's folder
    curation/balance-kept/ lists what is kept and curation/balance/ all else, for write.exclude.
    """
    cfg = balance.Config(per_cluster=per_cluster, how=how, seed=seed)
    sections, paths = begin(root, None, sets, address)
    with owning(paths.root, sections["run"]):
        found = balance.run(cfg, paths)
    _say(f"are beyond {per_cluster:,} of their cluster", found, paths, "balance")


def assign_command(
    run: Annotated[str, typer.Option(help="URL of the finished run whose clusters are used")],
    shards: Shards,
    root: Root,
    quantile: Annotated[
        float,
        typer.Option(help="of the run's outlier_score; over it a sample is not explained"),
    ] = UNEXPLAINED,
    config_file: ConfigFile = None,
    sets: Overrides = None,
    address: Address = None,
    overwrite: Overwrite = False,
) -> None:
    """Label new shards with the clusters and captions of a finished run, without training.

    --root is a folder for the new shards alone, laid out as a run: write, verify, status and the
    commands for finished runs work there. The encoder is the run's. Samples that its clusters do
    not explain are listed in curation/unexplained/.
    """
    sections, paths = begin(root, config_file, sets, address)
    source = artifacts.RunPaths(storage.absolute(run))
    found = list_shards(shards)
    with owning(paths.root, sections["run"], found):
        listed = assign.run(sections, source, found, paths, quantile, overwrite)
    expected = (1 - quantile) * listed["of"]
    _say(
        f"are farther from every cluster than {100 * quantile:g}% of the run's (by chance "
        f"{expected:,.1f} would be)",
        *(listed, paths, "unexplained"),
    )
