"""The commands that list samples to leave out, and the one for new shards; manual pages."""

from typing import Annotated

import typer

from pipeline.artifacts import layout
from pipeline.cli.help_pages import App
from pipeline.cli.options import (
    Address,
    ConfigFile,
    Overrides,
    Overwrite,
    Root,
    Shards,
    begin,
    owning,
)
from pipeline.explore import assign_new
from pipeline.explore.curate import balance, duplicates, outliers
from pipeline.runtime import console
from pipeline.store import storage
from pipeline.store.listing import list_shards

UNEXPLAINED = 0.999  # quantile of the run's outlier_score


def _say(what: str, found: dict[str, int], paths: layout.RunPaths, name: str) -> None:
    share = found["samples"] / max(found["of"], 1)
    listed = f"{paths.root}/curation/{name}"
    said = f"{found['samples']:,} of {found['of']:,} samples ({share:.2%}) {what}: {listed}"
    console.answer(said, {"root": paths.root, "list": listed, **found})


def duplicates_command(
    root: Root,
    threshold: Annotated[
        float,
        typer.Option(metavar="COSINE", help="cosine over which a pair are duplicates, 0.8 to 1"),
    ] = 0.95,
    config_file: ConfigFile = None,
    sets: Overrides = None,
    address: Address = None,
) -> None:
    """Near-duplicates within clusters (SemDeDup), and what each threshold would remove.

    Members of a cluster are put in an order, those farthest from its centre first; one is a
    duplicate if the cosine of its CLIP embedding to any that comes before is over the threshold.
    The cosines are computed once: with another threshold the command takes seconds. It removes
    nothing.

    Reads:
      {root}/embeddings/, {root}/assignments/   all parts
    Writes:
      {root}/curation/similarity/        the largest cosine to one before
      {root}/curation/duplicates/        sample_id, reason, duplicate_of, similarity
    Settings:
      run
    Examples:
      ratecluster duplicates --root my-run
      ratecluster duplicates --root my-run --threshold 0.9
    """
    cfg = duplicates.Config(threshold=threshold)
    sections, paths = begin(root, config_file, sets, address)
    with owning(paths.root, sections["run"]):
        found = duplicates.run(cfg, paths)
    console.answer(duplicates.text(found), {"root": paths.root, **found})


def outliers_command(
    root: Root,
    quantile: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="share of all samples that are none [0.99]"),
    ] = None,
    score: Annotated[
        float | None,
        typer.Option(metavar="SCORE", help="outlier_score over which a sample is one, 0 to 2"),
    ] = None,
    config_file: ConfigFile = None,
    sets: Overrides = None,
    address: Address = None,
) -> None:
    """The samples that are farthest from every cluster.

    outlier_score is 1 − cosine to the nearest prototype. Those over --score, or over the exact
    --quantile of all samples, are listed; nothing is removed.

    Reads:
      {root}/assignments/                all parts
    Writes:
      {root}/curation/outliers/          sample_id, outlier_score; for write.exclude
    Settings:
      run
    Examples:
      ratecluster outliers --root my-run --quantile 0.999
      ratecluster outliers --root my-run --score 0.4
    """
    share = 0.99 if quantile is None and score is None else quantile
    cfg = outliers.Config(quantile=share, score=score)
    sections, paths = begin(root, config_file, sets, address)
    with owning(paths.root, sections["run"]):
        found = outliers.run(cfg, paths)
    _say(f"have an outlier_score over {found['threshold']:.6g}", found, paths, "outliers")


def balance_command(
    root: Root,
    per_cluster: Annotated[
        int, typer.Option(metavar="N", help="samples that a cluster keeps, at most")
    ],
    how: Annotated[
        str,
        typer.Option(metavar="WAY", help="which: random, confident, or coding-rate (most diverse)"),
    ] = "random",
    seed: Annotated[int, typer.Option(help="of what is random")] = 0,
    config_file: ConfigFile = None,
    sets: Overrides = None,
    address: Address = None,
) -> None:
    """At most so many samples of each cluster.

    coding-rate takes, one after the other, the member that adds most to the log-determinant of
    their features, out of a random 4 × N of them, 4,096 at least. Nothing is removed.

    Reads:
      {root}/assignments/                all parts
      {root}/embeddings/                 all parts, for coding-rate
    Writes:
      {root}/curation/balance-kept/      sample_id, rank, gain_nats
      {root}/curation/balance/           all else, for write.exclude
    Settings:
      run
    Examples:
      ratecluster balance --root my-run --per-cluster 1000
      ratecluster balance --root my-run --per-cluster 100 --how coding-rate
    """
    cfg = balance.Config(per_cluster=per_cluster, how=how, seed=seed)
    sections, paths = begin(root, config_file, sets, address)
    with owning(paths.root, sections["run"]):
        found = balance.run(cfg, paths)
    _say(f"are beyond {per_cluster:,} of their cluster", found, paths, "balance")


def assign_command(
    run: Annotated[
        str, typer.Option(metavar="URL", help="the finished run whose clusters are used")
    ],
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
    not explain are listed.

    Reads:
      --run, a finished run; the shards
    Writes:
      {root}/embeddings/, assignments/   as a run's, of the new shards
      {root}/labels/, labeled/
      {root}/network/, clusters/, captions/   copies of the run's
      {root}/curation/unexplained/       sample_id, outlier_score
    Settings:
      embed, write, run
    Examples:
      ratecluster assign --run my-run --shards new-shards --root my-new
    """
    sections, paths = begin(root, config_file, sets, address)
    source = layout.RunPaths(storage.absolute(run))
    found = list_shards(shards)
    unexplained = outliers.Config(quantile=quantile)
    with owning(paths.root, sections["run"], found, reads=source.root):
        listed = assign_new.run(sections, source, found, paths, unexplained, overwrite)
    expected = (1 - quantile) * listed["of"]
    _say(
        f"are farther from every cluster than {100 * quantile:g}% of the run's (by chance "
        f"{expected:,.1f} would be)",
        *(listed, paths, "unexplained"),
    )


def add(app: App) -> None:
    """Put them beside the stages' commands."""
    app.command("duplicates")(duplicates_command)
    app.command("outliers")(outliers_command)
    app.command("balance")(balance_command)
    app.command("assign")(assign_command)
