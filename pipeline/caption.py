"""Stage 4, caption: a ranked list of words for every cluster.

reads   embeddings/, assignments/        all parts, twice
writes  captions/captions.parquet        CAPTIONS
        captions/manifest.json

Candidates are a vocabulary and the n-grams of the samples' own alt texts that set a cluster apart
(class-based tf-idf). Every member's picture gives its votes: its TOP_VOTES largest softmax
probabilities over all candidates (CPP, Chu et al. 2024); what the members' own words say of a
candidate is added. Ground truth is never read: only the caption (.txt) is.
V candidates, D dimensions, k clusters. Core: `alt_texts`, `votes`, `ranked` (no Ray). Shell: `run`.
"""

import json
import logging
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import scipy.sparse as sp
import torch

from pipeline import alt_texts, artifacts, config, console, folding, tasks, text_encoding
from pipeline.config import setting
from pipeline.errors import UserError
from pipeline.folding import RunningTotal
from pipeline.progress import StageProgress
from pipeline.store import tables
from pipeline.vision import vocabulary

log = logging.getLogger(__name__)
TOP_VOTES = 5  # candidates that a member votes for
MOST_TASKS = 1024
RANKED = 10  # captions kept per cluster
CSR = ("data", "indices", "indptr")  # what a sparse matrix is made of
BATCH_ROWS = 1024  # members whose votes are counted at once: memory is this × V


@dataclass(frozen=True, kw_only=True)
class Config:
    """Where candidate captions come from and how they are compared."""

    vocabulary: tuple[str, ...] = setting(
        (), "imagenet, wordnet, pico-clip or files of one name per line; none: fit to the model"
    )
    templates: tuple[str, ...] = setting(
        (), "prompts with {} for the candidate, averaged; none: fit to the model"
    )
    alt_texts: int = setting(20, "candidates per cluster from the samples' own captions; 0: none")
    temperature: float = setting(0.01, "of the softmax over candidates, in cosine units")
    actors: int = setting(0, "text encoder processes; 0: one per GPU, or one", operational=True)

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise UserError(f"caption.temperature = {self.temperature}: give a positive number")
        if self.alt_texts < 0 or self.actors < 0:
            raise UserError("caption.alt_texts and caption.actors: give 0 or more")
        for template in self.templates:
            if template.count("{}") != 1:
                raise UserError(f"caption.templates: {template!r} must hold {{}} exactly once")


def check(cfg: Config, model: str) -> list[str]:
    """The vocabulary; UserError if it is missing or empty."""
    return vocabulary.chosen(cfg.vocabulary, model)


def count_ngrams(stems: list[str], paths: artifacts.RunPaths, k: int) -> alt_texts.Counts:
    """N-grams of the members of each cluster, over some parts; the rare ones dropped."""
    counts: alt_texts.Counts = [Counter() for _ in range(k)]
    for stem in stems:
        rows, clusters = _joined(stem, paths, ["sample_id", "caption"])
        for number, text in zip(clusters.tolist(), rows["caption"].to_pylist(), strict=True):
            if text:
                counts[number].update(alt_texts.ngrams(text[:1000]) | {""})
        counts = [alt_texts.trimmed(counter) for counter in counts]
    return counts


def votes(
    stems: list[str], paths: artifacts.RunPaths, texts: np.ndarray, k: int, temperature: float
) -> sp.csr_matrix:
    """Summed votes (k, V) of the members of each cluster over some parts; texts (V, D) unit."""
    candidates = torch.from_numpy(texts)
    total = sp.csr_matrix((k, len(texts)))
    for stem in stems:
        rows, clusters = _joined(stem, paths, ["sample_id", "embedding"])
        x = torch.from_numpy(tables.to_matrix(rows["embedding"]).astype(np.float32))
        for start in range(0, len(x), BATCH_ROWS):
            batch = slice(start, start + BATCH_ROWS)
            shares = torch.softmax(x[batch] @ candidates.T / temperature, dim=1)
            top = shares.topk(min(TOP_VOTES, len(texts)), dim=1)
            own = np.repeat(clusters[batch], top.indices.shape[1])
            cells = (top.values.double().numpy().ravel(), (own, top.indices.numpy().ravel()))
            total = total + sp.csr_matrix(cells, shape=total.shape)
    return total


def combined(total: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Votes (k, V) as shares of each cluster's, plus `text_scores`: pictures and words agree."""
    return total / np.maximum(total.sum(axis=1, keepdims=True), 1e-12) + texts


def ranked(total: np.ndarray, names: list[str], own: set[str]) -> pa.Table:
    """CAPTIONS: the RANKED best candidates of each cluster by score; `own` are from alt texts."""
    rows = []
    for number, counted in enumerate(total):
        order = np.argsort(-counted, kind="stable")[:RANKED]
        for rank, index in enumerate(int(i) for i in order if counted[i] > 0):
            rows.append(
                {
                    "cluster_id": number,
                    "rank": rank,
                    "caption": names[index],
                    "share": float(counted[index] / counted.sum()),
                    "source": "alt text" if names[index] in own else "vocabulary",
                }
            )
    return pa.Table.from_pylist(rows, schema=artifacts.CAPTIONS)


def _joined(stem: str, paths: artifacts.RunPaths, wanted: list[str]) -> tuple[pa.Table, np.ndarray]:
    """Columns of a part of the embeddings, and the cluster of each of its rows."""
    rows = tables.read(paths.embeddings.file(f"{stem}.parquet"), wanted)
    assigned = tables.read(paths.assignments.file(f"{stem}.parquet"), ["sample_id", "cluster_id"])
    if not rows["sample_id"].equals(assigned["sample_id"]):
        raise RuntimeError(f"caption: {stem}: embeddings and assignments hold different samples")
    return rows, assigned["cluster_id"].to_numpy()


def wanted(cfg: Config, made: artifacts.Made, paths: artifacts.RunPaths) -> artifacts.Wanted:
    """What captioning these clusters is to leave."""
    names = check(cfg, made["embeddings"]["config"]["model"])
    made_of = config.fingerprint(cfg, made["clusters"]["fingerprint"], names)
    files = {paths.captions: ["captions.parquet"]}
    return artifacts.Wanted("caption", paths.captions, made_of, cfg, files)


def run(cfg: Config, paths: artifacts.RunPaths) -> dict[str, Any]:
    """Gather candidates, count votes, commit the ranking, then the manifest."""
    made = artifacts.upstream(paths, "clusters")
    embedded, clustered = made["embeddings"], made["clusters"]
    model = embedded["config"]["model"]
    want = wanted(cfg, made, paths)
    if manifest := want.finished():
        folding.finished(paths.captions)
        return manifest
    names, made_of = check(cfg, model), want.made_of
    paths.captions.remove({"manifest.json", "captions.parquet"})
    k = len(clustered["sizes"])
    chunks = tasks.chunks([s["shard"]["stem"] for s in embedded["shards"]], MOST_TASKS)
    passes = 2 if cfg.alt_texts else 1
    with StageProgress("caption", passes * sum(map(len, chunks)), "parts") as progress:
        counts: alt_texts.Counts = [Counter() for _ in range(k)]
        if cfg.alt_texts:
            counts = _all_counts(chunks, paths, k, made_of, progress)
        own = alt_texts.distinctive(counts, cfg.alt_texts)
        known = {name.casefold() for name in names}
        candidates = names + [name for name in own if name not in known]
        texts, _ = text_encoding.encode(
            candidates, cfg.templates, model, embedded["config"]["pretrained"], cfg.actors
        )
        given = (paths, texts, k, cfg.temperature)
        total = _all_votes(chunks, given, config.digest({}, made_of, candidates), progress)
    table = ranked(
        combined(total.toarray(), alt_texts.text_scores(counts, candidates)),
        candidates,
        set(own) - known,
    )
    tables.write(paths.captions.file("captions.parquet"), table)
    best = {row["cluster_id"]: row["caption"] for row in table.to_pylist() if row["rank"] == 0}
    paths.captions.finish(
        made_of,
        upstream=clustered["fingerprint"],
        config=config.facts(cfg),
        candidates=len(candidates),
        from_alt_texts=len(candidates) - len(names),
        captions=[best.get(number) for number in range(k)],
        seconds=round(progress.seconds, 2),
    )
    folding.finished(paths.captions)
    alone = f"{len(candidates):,} candidates ({len(candidates) - len(names):,} from alt texts)"
    console.finished(log, "caption", progress.seconds, f"{k:,} clusters", alone)
    return paths.captions.manifest()


def _all_counts(
    chunks: list[Any],
    paths: artifacts.RunPaths,
    k: int,
    made_of: str,
    progress: StageProgress,
) -> alt_texts.Counts:
    """`count_ngrams` over all parts."""
    running = RunningTotal(paths.captions, "counts", made_of, len(chunks))
    counts: alt_texts.Counts = [Counter() for _ in range(k)]
    if running.done:
        counts = [Counter(found) for found in json.loads(running.restored["counts"].tobytes())]
    progress.advance(sum(map(len, chunks[: running.done])))
    left = running.left(chunks)
    for chunk, more in zip(left, tasks.results(count_ngrams, left, paths, k), strict=True):
        for counter, extra in zip(counts, more, strict=True):
            counter.update(extra)
        counts = [alt_texts.trimmed(counter) for counter in counts]
        running.advance(lambda counts=counts: {"counts": _as_array(counts)})  # type: ignore[misc]
        progress.advance(len(chunk))
    return counts


def _as_array(counts: alt_texts.Counts) -> np.ndarray:
    return np.frombuffer(json.dumps(counts).encode(), np.uint8)


def _all_votes(
    chunks: list[Any],
    given: tuple[artifacts.RunPaths, np.ndarray, int, float],
    made_of: str,
    progress: StageProgress,
) -> sp.csr_matrix:
    """`votes` over all parts; `given` are what it takes beside them."""
    paths, texts, k, _ = given
    running = RunningTotal(paths.captions, "votes", made_of, len(chunks))
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
