"""Which shards still need to be embedded, and which finished parts do not match the settings."""

import logging
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.artifacts import layout, outputs
from pipeline.embed.settings import Config
from pipeline.runtime import config
from pipeline.runtime.errors import UserError
from pipeline.store.listing import Shard

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Survey:
    """What lies in embeddings/, seen from the shards that are to be embedded. Changes nothing."""

    done: list[dict[str, Any]]  # facts of the parts that stand
    todo: list[Shard]
    changed: list[Shard]  # of those to do: embedded once, when they held something else
    foreign: list[Shard]  # of those: the part was made from a file of another place
    other: dict[str, dict[str, Any]]  # stem -> facts of the parts that other settings made
    unlisted: list[str]  # stems of parts whose shards are not among these


def survey(cfg: Config, shards: list[Shard], paths: layout.RunPaths) -> Survey:
    """Look at the footer of every part."""
    names = paths.embeddings.names()
    stems = [name.removesuffix(".parquet") for name in names if name.endswith(".parquet")]
    known = outputs.part_facts(paths.embeddings, stems)
    rejects = paths.rejects.names()
    other = {stem: f for stem, f in known.items() if f.get("stage") != config.fingerprint(cfg)}
    found = Survey([], [], [], [], other, sorted(known.keys() - {shard.stem for shard in shards}))
    for shard in shards:
        facts = known.get(shard.stem)
        if not facts or shard.stem in other or f"{shard.stem}.parquet" not in rejects:
            found.todo.append(shard)
        elif identity(facts["shard"]) == identity(asdict(shard)):
            found.done.append({**facts, "shard": asdict(shard)})  # it may have moved
        else:
            found.todo.append(shard)
            found.changed.append(shard)
            if facts["shard"]["url"] != shard.url:
                found.foreign.append(shard)
    return found


def plan(
    cfg: Config, shards: list[Shard], paths: layout.RunPaths, overwrite: bool = False
) -> tuple[list[dict[str, Any]], list[Shard]]:
    """(facts of the parts that stand, shards to do). A shard that changed since is to do.

    Raises UserError where parts of other settings lie, unless they may be overwritten.
    """
    found = survey(cfg, shards, paths)
    if overwrite:
        for folder in (paths.embeddings, paths.rejects):
            folder.remove({f"{stem}.parquet" for stem in found.other})
    elif reason := refusal(cfg, found, paths):
        raise UserError(reason)
    if found.changed:
        log.info("embed: %d shards have changed: embedded again", len(found.changed))
    if found.unlisted:
        log.warning(
            "embed: %d parts belong to shards that are not listed now, the first %s: they are "
            "kept, and later stages ignore them",
            *(len(found.unlisted), found.unlisted[0]),
        )
    return found.done, found.todo


def fingerprint(cfg: Config, shards: list[Shard]) -> str:
    """Of what embedding these shards is to leave."""
    return config.fingerprint(cfg, [identity(asdict(shard)) for shard in shards])


def finished(cfg: Config, shards: list[Shard], paths: layout.RunPaths) -> dict[str, Any] | None:
    """The manifest, if it is of these shards where they lie now and every part is there."""
    manifest = paths.embeddings.peek()
    if manifest is None or manifest["fingerprint"] != fingerprint(cfg, shards):
        return None
    moved = [s["shard"]["url"] for s in manifest["shards"]] != [shard.url for shard in shards]
    parts = {f"{shard.stem}.parquet" for shard in shards}
    whole = parts <= paths.embeddings.names() and parts <= paths.rejects.names()
    return manifest if whole and not moved else None


def identity(shard: dict[str, Any]) -> tuple[Any, ...]:
    """What tells one content of a shard from another; where it lies does not."""
    return shard["stem"], shard["size"], shard["version"]


def refusal(cfg: Config, found: Survey, paths: layout.RunPaths) -> str:
    """Why days of work may not be thrown away by what may be a mistyped command; "" if none is."""
    remedy = "restore those settings, choose another --root, or pass --overwrite"
    if found.other:
        before = next(iter(found.other.values())).get("config", {})
        what = config.differences("embed", before, cfg) or "those of another version"
        return (
            f"{paths.embeddings.url} holds {len(found.other)} parts that were made with other "
            f"settings ({what}): {remedy}"
        )
    if found.foreign:
        shard = found.foreign[0]
        return (
            f"{paths.embeddings.url} holds {len(found.foreign)} parts of other shards that have "
            f"the same names ({shard.url} is not the shard they were made from): {remedy}"
        )
    return ""
