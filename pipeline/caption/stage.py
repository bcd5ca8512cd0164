"""Stage 4, caption: a ranked list of words for every cluster.

reads   embeddings/, assignments/        all parts, twice
        clusters/prototypes.parquet      which clusters are neighbours
        clusters/exemplars.parquet       and the input shards: what a model that names them is shown
writes  captions/candidates.parquet      CANDIDATES  what evaluate ranks again without class names
        captions/voted.parquet           CAPTIONS    as votes and alt texts have it
        captions/captions.parquet        CAPTIONS    the same, after the names a model has given
        captions/manifest.json

Candidates are a vocabulary and the n-grams of the samples' own alt texts that set a cluster apart
(`alt_texts`). Every member's picture votes for some; what the members' own words say is added, and
what tells a cluster from its neighbours ranks first (`ranking`). A vision-language model may have
the last word (`naming`). Ground truth is never read: only the caption (.txt) is.
V candidates, D dimensions, k clusters. Core: `count_ngrams`, `votes` (no Ray). Shell: `run`.
"""

import json
import logging
import time
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import scipy.sparse as sp

from pipeline.artifacts import layout, outputs
from pipeline.caption import (
    alt_text_ngrams,
    candidates,
    ranking,
    tokenization,
    vlm_captions,
)
from pipeline.caption.settings import Config
from pipeline.runtime import config, console, tasks
from pipeline.runtime.progress import StageProgress
from pipeline.store import partial_sums, tables
from pipeline.store.partial_sums import ResumableSum
from pipeline.vision import text_encoding, vocabulary

log = logging.getLogger(__name__)
MOST_TASKS = 1024
CSR = ("data", "indices", "indptr")  # what a sparse matrix is made of
FILES = ("captions.parquet", "voted.parquet", "candidates.parquet")


def check(cfg: Config, model: str) -> list[str]:
    """The vocabulary; UserError if it is missing or empty."""
    return vocabulary.chosen(cfg.vocabulary, model)


def count_ngrams(stems: list[str], paths: layout.RunPaths, k: int) -> alt_text_ngrams.Counts:
    """N-grams of the members of each cluster, over some parts; the rare ones dropped."""
    counts: alt_text_ngrams.Counts = [Counter() for _ in range(k)]
    for stem in stems:
        rows, clusters = _joined(stem, paths, ["sample_id", "caption"])
        for number, text in zip(clusters.tolist(), rows["caption"].to_pylist(), strict=True):
            if text:
                counts[number].update(alt_text_ngrams.ngrams(text[:1000]) | {""})
        counts = [alt_text_ngrams.trimmed(counter) for counter in counts]
    return counts


def votes(
    stems: list[str], paths: layout.RunPaths, texts: np.ndarray, k: int, temperature: float
) -> sp.csr_matrix:
    """`ranking.votes` of the members in some parts, summed: (k, V)."""
    total = sp.csr_matrix((k, len(texts)))
    for stem in stems:
        rows, clusters = _joined(stem, paths, ["sample_id", "embedding"])
        x = tables.to_matrix(rows["embedding"])
        total = total + ranking.votes(x, clusters, texts, k, temperature)
    return total


def _joined(stem: str, paths: layout.RunPaths, wanted: list[str]) -> tuple[pa.Table, np.ndarray]:
    """Columns of a part of the embeddings, and the cluster of each of its rows."""
    rows = tables.read(paths.embeddings.file(f"{stem}.parquet"), wanted)
    assigned = tables.read(paths.assignments.file(f"{stem}.parquet"), ["sample_id", "cluster_id"])
    if not rows["sample_id"].equals(assigned["sample_id"]):
        raise RuntimeError(f"caption: {stem}: embeddings and assignments hold different samples")
    return rows, assigned["cluster_id"].to_numpy()


def wanted(cfg: Config, made: outputs.Manifests, paths: layout.RunPaths) -> outputs.ExpectedOutputs:
    """What captioning these clusters is to leave."""
    names = check(cfg, made["embeddings"]["config"]["model"])
    made_of = config.fingerprint(cfg, made["clusters"]["fingerprint"], names)
    files = {paths.captions: FILES}
    return outputs.ExpectedOutputs("caption", paths.captions, made_of, cfg, files)


def run(cfg: Config, paths: layout.RunPaths) -> dict[str, Any]:
    """Rank the candidates, have a model name the clusters if asked to; the manifest last.

    Where only the model's settings have changed, or it was interrupted, nothing is counted again.
    """
    made = outputs.upstream(paths, "clusters")
    embedded, clustered = made["embeddings"], made["clusters"]
    want = wanted(cfg, made, paths)
    if manifest := want.if_done():
        partial_sums.remove_all(paths.captions)
        return manifest
    names, started = check(cfg, embedded["config"]["model"]), time.monotonic()
    settings = {n: v for n, v in config.facts(cfg).items() if not n.startswith("namer")}
    voted_of = config.digest(settings, clustered["fingerprint"], names)
    paths.captions.remove({"manifest.json", "captions.parquet"})
    voted = _standing(paths, voted_of) or _voted(cfg, names, made, paths, want.made_of, voted_of)
    table = tables.read(paths.captions.file("voted.parquet"))
    k, named = len(clustered["sizes"]), dict[str, Any]()
    if cfg.namer:
        table, named = vlm_captions.named(cfg, table, embedded, paths, want.made_of)
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
    words = voted["candidates"]
    alone = f"{words:,} candidates ({words - len(names):,} from alt texts)"
    console.log_finished(log, "caption", time.monotonic() - started, f"{k:,} clusters", alone)
    return paths.captions.manifest()


def _standing(paths: layout.RunPaths, voted_of: str) -> dict[str, Any] | None:
    """The facts of a ranking that stands as it would be made; None where there is none."""
    found = outputs.part_facts(paths.captions, ["candidates", "voted"])
    same = [facts for facts in found.values() if facts.get("made_of") == voted_of]
    return same[0] if len(same) == 2 else None


def _voted(
    cfg: Config,
    names: list[str],
    made: outputs.Manifests,
    paths: layout.RunPaths,
    made_of: str,
    voted_of: str,
) -> dict[str, Any]:
    """Commit the candidates and their ranking by votes and alt texts; returns its facts."""
    k, encoder = len(made["clusters"]["sizes"]), made["embeddings"]["config"]
    chunks = tasks.chunks([s["shard"]["stem"] for s in made["embeddings"]["shards"]], MOST_TASKS)
    near, passes = candidates.neighbourhood(paths), 2 if cfg.alt_texts else 1
    with StageProgress("caption", passes * sum(map(len, chunks)), "parts") as progress:
        counts: alt_text_ngrams.Counts = [Counter() for _ in range(k)]
        if cfg.alt_texts:
            counts = _all_counts(chunks, paths, k, made_of, progress)
        said = alt_text_ngrams.separation(counts, near)
        known = {name.casefold() for name in names}
        own = [name for name in said.distinctive(cfg.alt_texts) if name not in known]
        words = names + own
        texts, _ = text_encoding.encode(
            words, cfg.templates, encoder["model"], encoder["pretrained"], cfg.actors
        )
        given = (paths, texts, k, cfg.temperature)
        total = _all_votes(chunks, given, config.digest({}, made_of, words), progress)
    by_texts = said.of(words)
    scores = ranking.combined(total, by_texts, near)
    places = ranking.ranked(scores, [tokenization.key(word) for word in words], texts)
    rows = candidates.rows(words, len(names), texts, by_texts)
    facts = {"made_of": voted_of, "candidates": len(words)}
    tables.write(paths.captions.file("candidates.parquet"), rows, **facts)
    tables.write(
        paths.captions.file("voted.parquet"), candidates.ranking_of(scores, places, rows), **facts
    )
    return facts


def _all_counts(
    chunks: list[Any],
    paths: layout.RunPaths,
    k: int,
    made_of: str,
    progress: StageProgress,
) -> alt_text_ngrams.Counts:
    """`count_ngrams` over all parts."""
    running = ResumableSum(paths.captions, "counts", made_of, len(chunks))
    counts: alt_text_ngrams.Counts = [Counter() for _ in range(k)]
    if running.done:
        counts = [Counter(found) for found in json.loads(running.restored["counts"].tobytes())]
    progress.advance(sum(map(len, chunks[: running.done])))
    left = running.left(chunks)
    for chunk, more in zip(left, tasks.results(count_ngrams, left, paths, k), strict=True):
        for counter, extra in zip(counts, more, strict=True):
            counter.update(extra)
        counts = [alt_text_ngrams.trimmed(counter) for counter in counts]
        running.advance(lambda counts=counts: {"counts": _as_array(counts)})  # type: ignore[misc]
        progress.advance(len(chunk))
    return counts


def _as_array(counts: alt_text_ngrams.Counts) -> np.ndarray:
    return np.frombuffer(json.dumps(counts).encode(), np.uint8)


def _all_votes(
    chunks: list[Any],
    given: tuple[layout.RunPaths, np.ndarray, int, float],
    made_of: str,
    progress: StageProgress,
) -> sp.csr_matrix:
    """`votes` over all parts; `given` are what it takes beside them."""
    paths, texts, k, _ = given
    running = ResumableSum(paths.captions, "votes", made_of, len(chunks))
    total = sp.csr_matrix((k, len(texts)))
    if running.done:
        cells = tuple(running.restored[name] for name in CSR)
        total = sp.csr_matrix(cells, shape=total.shape)
    progress.advance(sum(map(len, chunks[: running.done])))
    left = running.left(chunks)
    for chunk, more in zip(left, tasks.results(votes, left, *given), strict=True):
        total = total + more
        running.advance(lambda total=total: {name: getattr(total, name) for name in CSR})  # type: ignore[misc]
        progress.advance(len(chunk))
    return total
