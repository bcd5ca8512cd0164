"""Checks the levels of a run: numbers, nesting, sizes and captions."""

from collections import Counter
from itertools import pairwise
from typing import Any

from pipeline.artifacts import schemas
from pipeline.ops.verify.run_check import RunCheck
from pipeline.ops.verify.violations import open_part, read_part, vector_length


def read_groups(check: RunCheck) -> list[dict[str, Any]]:
    """cluster_id and levels of each small group, from clusters/levels.parquet."""
    place = "clusters/levels.parquet"
    if (file := open_part(check.paths.top.file(place), place, check.found)) is None:
        return []
    schema = schemas.levels_schema(vector_length(file) or 1)
    table = read_part(file, schema, place, check.found)
    rows = [] if table is None else table.select(["cluster_id", "levels"]).to_pylist()
    if len({len(row["levels"] or ()) for row in rows}) > 1:
        check.found.add(place, "groups have different numbers of levels")
        return []
    return rows


def _default_level(groups: list[dict[str, Any]]) -> int | None:
    """The level that has the clusters themselves; None if there is none."""
    count = len(groups[0]["levels"]) if groups else 0
    same = (all(g["levels"][i] == g["cluster_id"] for g in groups) for i in range(count))
    return next((i for i, found in enumerate(same) if found), None)


def captions_of(check: RunCheck, groups: list[dict[str, Any]]) -> list[dict[int, str | None]]:
    """The caption of each cluster of each level."""
    if (default := _default_level(groups)) is None or "captions" not in check.made:
        return []
    found: list[dict[int, str | None]] = [{} for _ in groups[0]["levels"]]
    found[default] = dict(enumerate(check.made["captions"]["captions"]))
    again = RunCheck(check.paths)  # the stage reports its violations
    for row in again.rows("captions/levels.parquet", schemas.LEVEL_CAPTIONS):
        if 0 < row["level"] <= len(found) and row["level"] != default + 1:
            found[row["level"] - 1][row["cluster_id"]] = row["caption"]
    return found


def check_nested(check: RunCheck, groups: list[dict[str, Any]]) -> None:
    """Check that levels are numbered without gaps, and that each is a part of the one before."""
    made, found, place = check.made["clusters"], check.found, "clusters/levels.parquet"
    if not groups:
        return  # reported
    if _default_level(groups) is None:
        found.add(place, "has no level of the clusters themselves")
    levels = [[group["levels"][i] for group in groups] for i in range(len(groups[0]["levels"]))]
    if [sorted(set(level)) for level in levels] != [list(range(k)) for k in made["levels"]]:
        found.add(place, f"levels are not of {made['levels']} clusters, as in the manifest")
    for coarse, fine in pairwise(levels):
        if len(set(zip(coarse, fine, strict=True))) != len(set(fine)):
            found.add(place, "a cluster of a level is in several of the level before")
    sizes: Counter[int] = Counter()
    for group, size in zip(groups, made["groups"], strict=False):
        sizes[group["cluster_id"]] += size
    if [sizes[c] for c in range(len(check.sizes))] != check.sizes or len(groups) != len(
        made["groups"]
    ):
        found.add("clusters/manifest.json", "groups are not those of assignments/")


def check_table(check: RunCheck, again: RunCheck) -> None:
    """Check levels.parquet: parents, sizes and captions of the clusters of every level."""
    groups, sizes = read_groups(again), check.made["clusters"]["groups"]
    wanted: dict[tuple[int, int], list[Any]] = {}
    for level, captions in enumerate(captions_of(check, groups)):
        for group, size in zip(groups, sizes, strict=False):
            own = group["levels"]
            parent = own[level - 1] if level else None
            row = wanted.setdefault((level + 1, own[level]), [parent, 0, captions.get(own[level])])
            row[1] += size
    names = ("level", "cluster_id", "parent", "size", "cluster_caption")
    rows = check.rows("levels.parquet", schemas.LEVELS)
    if [tuple(row[n] for n in names) for row in rows] != [
        (*key, *wanted[key]) for key in sorted(wanted)
    ]:
        check.found.add("levels.parquet", "is not what groups and captions of the levels are")
