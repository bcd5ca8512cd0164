"""Stage 4, caption: a ranked list of captions for every cluster.

reads   embeddings/, assignments/        all parts, twice
        clusters/prototypes.parquet      which clusters are neighbours
        clusters/exemplars.parquet       and the input shards: images for the vision-language model
writes  captions/candidates.parquet      CANDIDATES  all candidate captions
        captions/voted.parquet           CAPTIONS    ranked by votes and alt texts
        captions/captions.parquet        CAPTIONS    the same, with the model's names first
        captions/levels.parquet          LEVEL_CAPTIONS  names of the clusters of the other levels
        captions/manifest.json

Candidates come from a vocabulary and from n-grams of the samples' alt texts (`alt_text_ngrams`).
Every member's image votes for some of them. `ranking` adds the evidence of the members' own texts
and prefers what separates a cluster from its neighbours. In the end a vision-language model may
name the clusters (`vlm_captions`). Ground truth is never read. Given embeddings without a model
have neither vocabulary nor votes: n-grams, or else numbers, name their clusters.
Votes and n-grams are counted by the clusters of the finest level; those of the others are their
sums. V candidates, k clusters, f of the finest level, g small groups.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import scipy.sparse as sp

from pipeline.artifacts import inputs, layout, levels, outputs, schemas
from pipeline.artifacts.joins import read_joined
from pipeline.caption import (
    alt_text_ngrams,
    candidates,
    ranking,
    tokenization,
    vlm_captions,
)
from pipeline.caption.settings import Config, expected, read_vocabulary
from pipeline.runtime import config, console, tasks
from pipeline.runtime.progress import StageProgress
from pipeline.store import partial_sums, tables
from pipeline.store.partial_sums import ResumableSum
from pipeline.vision import text_encoding

log = logging.getLogger(__name__)
MOST_TASKS = 1024
VOTES = ("total", "fits")
CSR = ("data", "indices", "indptr")  # the arrays of a sparse matrix


def count_ngrams(
    stems: list[str], paths: layout.RunPaths, finest: np.ndarray
) -> alt_text_ngrams.Counts:
    """N-grams in the captions of each cluster's members, over some parts; rare ones are dropped.

    Clusters are those of the finest level; finest (g,) has the cluster of each small group.
    """
    counts: alt_text_ngrams.Counts = [Counter() for _ in range(finest.max() + 1)]
    for stem in stems:
        rows = read_joined(stem, paths, ["caption"], ["group"])
        for group, text in zip(*(rows[n].to_pylist() for n in ("group", "caption")), strict=True):
            if text:
                counts[finest[group]].update(alt_text_ngrams.ngrams(text[:1000]) | {""})
        counts = [alt_text_ngrams.trim(counter) for counter in counts]
    return counts


def votes(
    stems: list[str],
    paths: layout.RunPaths,
    texts: np.ndarray,
    finest: np.ndarray,
    temperature: float,
) -> ranking.Votes:
    """`ranking.votes` of the members in some parts, summed; `finest` as in `count_ngrams`."""
    k = finest.max() + 1
    total = ranking.Votes.none(k, len(texts))
    for stem in stems:
        rows = read_joined(stem, paths, ["embedding"], ["group"])
        x, clusters = tables.to_matrix(rows["embedding"]), finest[rows["group"].to_numpy()]
        total += ranking.votes(x, clusters, texts, k, temperature)
    return total


def run(cfg: Config, paths: layout.RunPaths) -> dict[str, Any]:
    """Rank the candidates, let a model name the clusters if one is set; write the manifest last.

    The ranking is reused if only the model's settings changed, or if the naming was interrupted.
    """
    made = outputs.upstream(paths, "clusters")
    embedded, clustered = made["embeddings"], made["clusters"]
    want = expected(cfg, made, paths)
    if manifest := want.if_done():
        partial_sums.remove_all(paths.captions)
        return manifest
    if cfg.namer:
        inputs.require_shards(embedded, "caption.namer")
    names, started = read_vocabulary(cfg, embedded["config"]["model"]), time.monotonic()
    settings = {n: v for n, v in config.facts(cfg).items() if not n.startswith("namer")}
    voted_of = config.digest(settings, clustered["fingerprint"], names)
    paths.captions.remove({"manifest.json", "captions.parquet"})
    voted = _earlier_ranking(paths, voted_of) or _rank(
        cfg, names, made, paths, want.made_of, voted_of
    )
    table = tables.read(paths.captions.file("voted.parquet"))
    k, named = len(clustered["sizes"]), dict[str, Any]()
    if cfg.namer:
        table, named = vlm_captions.name_clusters(cfg, table, embedded, paths, want.made_of)
    tables.write(paths.captions.file("captions.parquet"), table)
    best = {row["cluster_id"]: row["caption"] for row in table.to_pylist() if row["rank"] == 0}
    paths.captions.finish(
        want.made_of,
        upstream=clustered["fingerprint"],
        config=config.facts(cfg),
        candidates=voted["candidates"],
        from_alt_texts=voted["candidates"] - len(names),
        captions=[best.get(number) for number in range(k)],
        seconds=round(time.monotonic() - started, 2),
        **named,
    )
    partial_sums.remove_all(paths.captions)
    total = voted["candidates"]
    counted = f"{total:,} candidates ({total - len(names):,} from alt texts)"
    console.log_finished(log, "caption", time.monotonic() - started, f"{k:,} clusters", counted)
    return paths.captions.manifest()


def _earlier_ranking(paths: layout.RunPaths, voted_of: str) -> dict[str, Any] | None:
    """The facts of an earlier ranking of the same inputs; None if there is none."""
    found = outputs.part_facts(paths.captions, ["candidates", "voted", "levels"])
    same = [facts for facts in found.values() if facts.get("made_of") == voted_of]
    return same[0] if len(same) == 3 else None


def _rank(
    cfg: Config,
    names: list[str],
    made: outputs.Manifests,
    paths: layout.RunPaths,
    made_of: str,
    voted_of: str,
) -> dict[str, Any]:
    """Commit the candidates and their ranking by votes and alt texts; returns its facts."""
    encoder, found = made["embeddings"]["config"], levels.read(paths)
    chunks = tasks.chunks([s["shard"]["stem"] for s in made["embeddings"]["shards"]], MOST_TASKS)
    near, passes = candidates.neighbourhood(paths), bool(cfg.alt_texts) + bool(encoder["model"])
    default = found.within(-1, found.default)
    with StageProgress("caption", passes * sum(map(len, chunks)), "parts") as progress:
        counts: alt_text_ngrams.Counts = [Counter() for _ in default]
        if cfg.alt_texts:
            counts = _all_counts(chunks, paths, found.finest, made_of, progress)
        own = alt_text_ngrams.separation(alt_text_ngrams.merged(counts, default), near)
        words = names + _new_names(own.distinctive(cfg.alt_texts), names)
        total = None
        if not encoder["model"]:  # given embeddings of an unknown encoder: the samples' own texts
            texts = np.zeros((len(words), made["embeddings"]["encoders"][0]["dim"]), np.float32)
        else:
            texts, _ = text_encoding.encode(
                words, cfg.templates, encoder["model"], encoder["pretrained"]
            )
            given = (paths, texts, found.finest, cfg.temperature)
            total = _all_votes(chunks, given, config.digest({}, made_of, words), progress)
    evidence = _Evidence(words, [tokenization.key(word) for word in words], texts, counts, total)
    ranked = evidence.rank(default, near)
    rows = candidates.rows(words, len(names), texts, ranked.by_texts)
    facts = {"made_of": voted_of, "candidates": len(words)}
    tables.write(paths.captions.file("candidates.parquet"), rows, **facts)
    voted = candidates.ranking_of(ranked.sure, ranked.places, ranked.names, rows)
    if total is None:
        voted = candidates.numbered(voted, len(ranked.names))
    tables.write(paths.captions.file("voted.parquet"), voted, **facts)
    others = _name_levels(found, evidence, ranked.names, rows)
    tables.write(paths.captions.file("levels.parquet"), others, **facts)
    return facts


@dataclass(frozen=True)
class _Ranked:
    """The candidates of the clusters of one level."""

    by_texts: sp.csr_matrix  # (k, V)
    sure: sp.csr_matrix  # (k, V) shares
    places: list[list[int]]  # of each cluster, best first
    names: list[list[int]]


@dataclass(frozen=True)
class _Evidence:
    """What speaks for the candidates, by the clusters of the finest level."""

    words: list[str]
    keys: list[tokenization.Key]
    texts: np.ndarray  # (V, D)
    counts: alt_text_ngrams.Counts
    total: ranking.Votes | None  # None without a model

    def rank(
        self, clusters: np.ndarray, near: sp.csr_matrix, others: Sequence[Set[ranking.Name]] = ()
    ) -> _Ranked:
        """The candidates of unions: cluster i of the finest level is in clusters[i]."""
        counts = alt_text_ngrams.merged(self.counts, clusters)
        by_texts = alt_text_ngrams.separation(counts, near).of(self.words)
        if self.total is None:
            fit = alt_text_ngrams.fitting(counts, self.words)
            scores = ranking.by_texts_alone(by_texts, fit)
        else:
            united = self.total.merged(clusters)
            fit, scores = ranking.fitting(united), ranking.combine(united, by_texts, near)
        places = ranking.rank(scores, self.keys, self.texts)
        names = ranking.name(scores, fit, places, self.keys, others)
        return _Ranked(by_texts, ranking.shares(fit), places, names)


def _name_levels(
    found: levels.Levels, evidence: _Evidence, names: list[list[int]], rows: pa.Table
) -> pa.Table:
    """LEVEL_CAPTIONS. `names` are those of the clusters, `rows` are CANDIDATES."""
    named, captions = {found.default: names}, list[dict[str, Any]]()
    for level in found.others:
        near = candidates.near(found.vectors, found.clusters[:, level])
        relatives = _relatives(found, level, named, evidence.keys)
        ranked = evidence.rank(found.within(-1, level), near, relatives)
        named[level] = ranked.names
        captions += candidates.level_rows(level, ranked.sure, ranked.names, rows)
    captions.sort(key=lambda row: (row["level"], row["cluster_id"]))
    return pa.Table.from_pylist(captions, schema=schemas.LEVEL_CAPTIONS)


def _relatives(
    found: levels.Levels,
    level: int,
    named: dict[int, list[list[int]]],
    keys: list[tokenization.Key],
) -> list[set[ranking.Name]]:
    """The names that each cluster of a level must not have: of its parts, or of its whole.

    A cluster that is the whole of its parent may have the same name.
    """
    other = level + 1 if level < found.default else level - 1
    fine, coarse = max(level, other), min(level, other)
    parents = found.within(fine, coarse)
    alone = np.bincount(parents)[parents] == 1
    relatives: list[set[ranking.Name]] = [set() for _ in range(found.clusters[:, level].max() + 1)]
    for child, parent in enumerate(parents.tolist()):
        one, words = (child, parent) if level == fine else (parent, child)
        if not alone[child]:
            relatives[one].add(frozenset(keys[i] for i in named[other][words]))
    return relatives


def _new_names(ngrams: list[str], vocabulary: list[str]) -> list[str]:
    """The n-grams that the vocabulary lacks, without those that end with a mere modifier."""
    known = {name.casefold() for name in vocabulary}
    modifiers = tokenization.only_modify(vocabulary)
    return [n for n in ngrams if n not in known and tokenization.key(n)[-1] not in modifiers]


def _all_counts(
    chunks: list[Any],
    paths: layout.RunPaths,
    finest: np.ndarray,
    made_of: str,
    progress: StageProgress,
) -> alt_text_ngrams.Counts:
    """`count_ngrams` over all parts."""
    running = ResumableSum(paths.captions, "ngrams", made_of, len(chunks))
    counts: alt_text_ngrams.Counts = [Counter() for _ in range(finest.max() + 1)]
    if running.done:
        counts = [Counter(found) for found in json.loads(running.restored["counts"].tobytes())]
    progress.advance(sum(map(len, chunks[: running.done])))
    left = running.left(chunks)
    for chunk, more in zip(left, tasks.results(count_ngrams, left, paths, finest), strict=True):
        for counter, extra in zip(counts, more, strict=True):
            counter.update(extra)
        counts = [alt_text_ngrams.trim(counter) for counter in counts]
        running.advance(lambda counts=counts: {"counts": _as_array(counts)})  # type: ignore[misc]
        progress.advance(len(chunk))
    return counts


def _as_array(counts: alt_text_ngrams.Counts) -> np.ndarray:
    return np.frombuffer(json.dumps(counts).encode(), np.uint8)


def _all_votes(
    chunks: list[Any],
    given: tuple[layout.RunPaths, np.ndarray, np.ndarray, float],
    made_of: str,
    progress: StageProgress,
) -> ranking.Votes:
    """`votes` over all parts; `given` are its other arguments."""
    paths, texts, finest, _ = given
    running = ResumableSum(paths.captions, "votes", made_of, len(chunks))
    total = ranking.Votes.none(finest.max() + 1, len(texts))
    if running.done:
        total = _from_arrays(running.restored, total.total.shape)
    progress.advance(sum(map(len, chunks[: running.done])))
    left = running.left(chunks)
    for chunk, more in zip(left, tasks.results(votes, left, *given), strict=True):
        total += more
        running.advance(lambda total=total: _arrays(total))  # type: ignore[misc]
        progress.advance(len(chunk))
    return total


def _arrays(found: ranking.Votes) -> dict[str, np.ndarray]:
    return {f"{of}_{part}": getattr(getattr(found, of), part) for of in VOTES for part in CSR}


def _from_arrays(arrays: dict[str, np.ndarray], shape: tuple[int, int]) -> ranking.Votes:
    made = (tuple(arrays[f"{of}_{part}"] for part in CSR) for of in VOTES)
    return ranking.Votes(*(sp.csr_matrix(cells, shape=shape) for cells in made))
