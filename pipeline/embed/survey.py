"""Which shards still need to be embedded, and which finished parts do not match the settings."""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.artifacts import inputs, layout, outputs
from pipeline.embed.given.settings import Config as GivenConfig
from pipeline.embed.kept_columns import can_keep, identity
from pipeline.embed.settings import Config
from pipeline.runtime import config
from pipeline.runtime.errors import UserError
from pipeline.store.listing import Shard, version_now
from pipeline.store.storage import content, without_query

log = logging.getLogger(__name__)
AnyConfig = Config | GivenConfig
DIGESTS_AT_ONCE = 16  # files read at once


@dataclass(frozen=True)
class Survey:
    """The shards compared with the parts in embeddings/. Changes nothing."""

    done: list[dict[str, Any]]  # facts of the finished parts
    todo: list[Shard]
    extended: list[Shard]  # of `todo`: they have a part, and only columns of embed.also are missing
    changed: list[Shard]  # of `todo`: embedded before, but their content is different now
    namesakes: list[Shard]  # of `changed`: the part was made from a file at another place
    other: dict[str, dict[str, Any]]  # stem -> facts of the parts made with different settings
    removed: list[str]  # stems of parts whose shards are not among these


def settled(shards: list[Shard], paths: layout.RunPaths) -> list[Shard]:
    """The shards with the stems that their parts have, however many shards are named now.

    A file that was moved or touched keeps the version of its part where its content is the same.
    """
    known = _known(paths)
    listed = {shard.url for shard in shards}
    by_url = {facts["url"]: facts for facts in known}
    by_name = {(_name(f["url"]), f["size"]): f for f in known if f["url"] not in listed}

    def settle(shard: Shard) -> Shard:
        facts = by_url.get(shard.url) or by_name.get((_name(shard.url), shard.size))
        if facts is None:
            return shard
        if (shard.size, shard.version) == (facts["size"], version_now(facts)):
            kept = {name: facts.get(name, "") for name in ("version", "now", "content")}
            return replace(shard, stem=facts["stem"], **kept)
        same = shard.size == facts["size"] and facts.get("content")
        if same and content(shard.url, shard.size) == facts["content"]:
            now = shard.version
            old = {name: facts[name] for name in ("stem", "version", "content")}
            return replace(shard, **old, now="" if now == facts["version"] else now)
        return replace(shard, stem=facts["stem"]) if facts["url"] == shard.url else shard

    with ThreadPoolExecutor(DIGESTS_AT_ONCE) as pool:
        found = _apart(list(pool.map(settle, shards)), shards)
    before = {facts["stem"]: facts for facts in known}
    if again := [s for s in found if s.now and s.now != before[s.stem].get("now")]:
        log.info(
            "embed: %d shards were moved or touched; their sizes and first and last MiB are as "
            "before, so they are not embedded again; the first: %s",
            *(len(again), again[0].url),
        )
    return found


def _apart(found: list[Shard], listed: list[Shard]) -> list[Shard]:
    """`found`, where of several copies of one shard only the first has its stem.

    UserError where stems are still the same.
    """
    stems: set[str] = set()
    kept = []
    for shard, own in zip(found, listed, strict=True):
        kept.append(own if shard.stem in stems else shard)
        if kept[-1].stem in stems:
            raise UserError(
                f"{kept[-1].url}: the run has another shard {kept[-1].stem}; rename this one"
            )
        stems.add(kept[-1].stem)
    return kept


def _name(url: str) -> str:
    """The file name of a URL."""
    return without_query(url).rpartition("/")[2]


def _known(paths: layout.RunPaths) -> list[dict[str, Any]]:
    """The shards of the finished parts, by the manifest; without one, by the parts."""
    if manifest := paths.embeddings.peek():
        return [facts["shard"] for facts in manifest["shards"]]
    found = outputs.part_facts(paths.embeddings, paths.embeddings.stems()).values()
    return [facts["shard"] for facts in found if "shard" in facts]


def survey(cfg: AnyConfig, shards: list[Shard], paths: layout.RunPaths) -> Survey:
    """Read the footer of every part."""
    known = outputs.part_facts(paths.embeddings, paths.embeddings.stems())
    rejects = paths.rejects.names()
    old = {stem: f for stem, f in known.items() if f.get("stage") != config.fingerprint(cfg)}
    other = {stem: f for stem, f in old.items() if not can_keep(f, cfg)}
    removed = sorted(known.keys() - {shard.stem for shard in shards})
    found = Survey([], [], [], [], [], other, removed)
    for shard in shards:
        facts = known.get(shard.stem)
        if not facts or shard.stem in other or f"{shard.stem}.parquet" not in rejects:
            found.todo.append(shard)
        elif identity(facts["shard"]) != identity(asdict(shard)):
            found.todo.append(shard)
            found.changed.append(shard)
            if facts["shard"]["url"] != shard.url:
                found.namesakes.append(shard)
        elif shard.stem in old:
            found.todo.append(shard)
            found.extended.append(shard)
        else:
            found.done.append({**facts, "shard": asdict(shard)})  # its URL may be new
    return found


def plan(
    cfg: AnyConfig, shards: list[Shard], paths: layout.RunPaths, overwrite: bool = False
) -> tuple[list[dict[str, Any]], list[Shard]]:
    """(facts of the finished parts, shards to embed). A changed shard is embedded again.

    Raises UserError where parts were made with different settings, unless `overwrite`.
    """
    found = survey(cfg, shards, paths)
    if overwrite:
        for folder in (paths.embeddings, paths.rejects):
            folder.remove({f"{stem}.parquet" for stem in found.other})
    elif reason := refusal(cfg, found, paths):
        raise UserError(reason)
    if found.changed:
        log.info(
            "embed: %d shards changed since they were embedded: embedding them again",
            len(found.changed),
        )
    if found.extended:
        log.info(
            "embed: %d parts keep their columns; encoders that were added to embed.also add theirs",
            len(found.extended),
        )
    if found.removed:
        log.warning(
            "embed: %d parts belong to %s, the first %s: they stay on disk and later stages ignore "
            "them",
            len(found.removed),
            "files that are not in --embeddings"
            if isinstance(cfg, GivenConfig)
            else "shards that are not in --shards",
            found.removed[0],
        )
    return found.done, found.todo


def fingerprint(cfg: AnyConfig, shards: list[Shard]) -> str:
    """The fingerprint of embeddings/ for these shards and settings."""
    return config.fingerprint(cfg, [identity(asdict(shard)) for shard in shards])


def if_done(cfg: AnyConfig, shards: list[Shard], paths: layout.RunPaths) -> dict[str, Any] | None:
    """The manifest, if it lists these shards at these URLs and every part is there."""
    manifest = paths.embeddings.peek()
    if manifest is None or manifest["fingerprint"] != fingerprint(cfg, shards):
        return None
    there = [(s["shard"]["url"], version_now(s["shard"])) for s in manifest["shards"]]
    moved = there != [(shard.url, version_now(asdict(shard))) for shard in shards]
    parts = {f"{shard.stem}.parquet" for shard in shards}
    whole = parts <= paths.embeddings.names() and parts <= paths.rejects.names()
    return manifest if whole and not moved else None


def refusal(cfg: AnyConfig, found: Survey, paths: layout.RunPaths) -> str:
    """Why these parts must not be replaced without --overwrite; "" if they may."""
    remedy = "restore that, choose another --root, or pass --overwrite to make them again"
    if found.other:
        before = next(iter(found.other.values())).get("config", {})
        what = config.differences(cfg.section, before, cfg) or "those of another version"
        if inputs.are_given(before) != inputs.are_given(config.facts(cfg)):
            what = "by encoders" if isinstance(cfg, GivenConfig) else "with --embeddings"
        return (
            f"{paths.embeddings.url} holds {len(found.other)} parts made with different settings "
            f"({what}): {remedy}"
        )
    if found.namesakes:
        shard = found.namesakes[0]
        return (
            f"{paths.embeddings.url} holds {len(found.namesakes)} parts of other shards with the "
            f"same names; {shard.url} is not the {shard.stem} they were made from: {remedy}"
        )
    return ""
