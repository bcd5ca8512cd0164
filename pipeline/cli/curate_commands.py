"""The commands that list samples to leave out, and the command that labels new shards."""

from typing import Annotated

from typer import Option

from pipeline.artifacts import layout
from pipeline.cli.options import Common, Overwrite, Root, Shards, lock_root
from pipeline.runtime import console
from pipeline.store import storage
from pipeline.store.listing import list_shards

UNEXPLAINED = 0.999  # quantile of the run's outlier_score


def _print_list(what: str, found: dict[str, int], paths: layout.RunPaths, name: str) -> None:
    share = found["samples"] / max(found["of"], 1)
    listed = f"{paths.root}/curation/{name}"
    text = f"{found['samples']:,} of {found['of']:,} samples ({share:.2%}) {what}: {listed}"
    console.print_result(text, {"root": paths.root, "list": listed, **found})


def duplicates_command(
    root: Root,
    threshold: Annotated[
        float,
        Option(metavar="COSINE", help="two samples with a higher cosine are duplicates, 0.8 to 1"),
    ] = 0.95,
    *,
    common: Common,
) -> None:
    """List near-duplicates within clusters (SemDeDup).

    The members of a cluster are sorted by distance from its centre, the farthest
    first. A member is a duplicate if the cosine of its CLIP embedding to an
    earlier member is above the threshold. The cosines are computed once, so
    another threshold takes only seconds; the output shows what others would
    list. No sample is removed.

    Reads:
      {root}/embeddings/, {root}/assignments/   all parts
    Writes:
      {root}/curation/similarity/        largest cosine to an earlier member
      {root}/curation/duplicates/        sample_id, reason, duplicate_of, similarity

    Examples:
      ratecluster duplicates --root my-run
      ratecluster duplicates --root my-run --threshold 0.9
    Settings: run
    """
    from pipeline.explore.curate import duplicates

    cfg = duplicates.Config(threshold=threshold)
    with common.locked(root) as (_, paths):
        found = duplicates.run(cfg, paths)
    console.print_result(duplicates.text(found), {"root": paths.root, **found})


def outliers_command(
    root: Root,
    quantile: Annotated[
        float | None,
        Option(
            metavar="SHARE", help="quantile of outlier_score; samples above it are listed [0.99]"
        ),
    ] = None,
    score: Annotated[
        float | None,
        Option(metavar="SCORE", help="list samples whose outlier_score is above this, 0 to 2"),
    ] = None,
    *,
    common: Common,
) -> None:
    """List the samples that are farthest from every cluster.

    outlier_score is 1 − cosine to the nearest prototype. The command lists the
    samples above --score, or above the exact --quantile of all samples. No
    sample is removed.

    Reads:
      {root}/assignments/                all parts
    Writes:
      {root}/curation/outliers/          sample_id, outlier_score; for write.exclude

    Examples:
      ratecluster outliers --root my-run --quantile 0.999
      ratecluster outliers --root my-run --score 0.4
    Settings: run
    """
    from pipeline.explore.curate import outliers

    share = 0.99 if quantile is None and score is None else quantile
    cfg = outliers.Config(quantile=share, score=score)
    with common.locked(root) as (_, paths):
        found = outliers.run(cfg, paths)
    what = f"have an outlier_score over {found['threshold']:.6g}"
    _print_list(what, found, paths, "outliers")


def balance_command(
    root: Root,
    per_cluster: Annotated[int, Option(metavar="N", help="most samples to keep of each cluster")],
    how: Annotated[
        str,
        Option(
            metavar="WAY", help="what to keep: random, confident, or coding-rate (most diverse)"
        ),
    ] = "random",
    seed: Annotated[int, Option(help="seed of the random choices")] = 0,
    *,
    common: Common,
) -> None:
    """Keep at most N samples of each cluster, and list the others.

    coding-rate chooses one member after another: always the one that adds most
    to the log-determinant of the chosen features. It chooses from 4 × N random
    members, at least 4,096. No sample is removed.

    Reads:
      {root}/assignments/                all parts
      {root}/embeddings/                 all parts, for coding-rate
    Writes:
      {root}/curation/balance-kept/      sample_id, rank, gain_nats
      {root}/curation/balance/           all other samples, for write.exclude

    Examples:
      ratecluster balance --root my-run --per-cluster 1000
      ratecluster balance --root my-run --per-cluster 100 --how coding-rate
    Settings: run
    """
    from pipeline.explore.curate import balance

    cfg = balance.Config(per_cluster=per_cluster, how=how, seed=seed)
    with common.locked(root) as (_, paths):
        found = balance.run(cfg, paths)
    _print_list(f"are beyond {per_cluster:,} of their cluster", found, paths, "balance")


def assign_command(
    run: Annotated[str, Option(metavar="URL", help="finished run whose clusters are assigned")],
    shards: Shards,
    root: Root,
    quantile: Annotated[
        float,
        Option(
            help="quantile of the run's outlier_score; samples above it are listed as unexplained"
        ),
    ] = UNEXPLAINED,
    *,
    common: Common,
    overwrite: Overwrite = False,
) -> None:
    """Label new shards with the clusters of a finished run.

    Nothing is trained, and the encoder is the one of the run. Use a new --root
    for the new shards. It gets the layout of a run, so write, verify, status and
    the commands for finished runs work there. Samples that do not fit the
    clusters are listed.

    Reads:
      --run, a finished run; the shards
    Writes:
      {root}/embeddings/, assignments/   as in a run, for the new shards
      {root}/labels/, labeled/
      {root}/network/, clusters/, captions/   copies from --run
      {root}/curation/unexplained/       sample_id, outlier_score

    Examples:
      ratecluster assign --run my-run --shards new-shards --root my-new
    Settings: embed, write, run
    """
    from pipeline.explore import assign_new
    from pipeline.explore.curate import outliers

    sections, paths = common.begin(root)
    source = layout.RunPaths(storage.absolute(run))
    found = list_shards(shards, paths.root)
    unexplained = outliers.Config(quantile=quantile)
    with lock_root(paths.root, sections["run"], found, reads=source.root):
        listed = assign_new.run(sections, source, found, paths, unexplained, overwrite)
    expected = (1 - quantile) * listed["of"]
    what = (
        f"are farther from every cluster than {100 * quantile:g}% of the run's samples "
        f"({expected:,.1f} are expected by chance)"
    )
    _print_list(what, listed, paths, "unexplained")
