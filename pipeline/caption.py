"""Stage 4, caption: a ranked list of words for every cluster.

reads   embeddings/, assignments/        all parts, twice
writes  captions/captions.parquet        CAPTIONS
        captions/manifest.json

Candidates are a vocabulary and the n-grams of the samples' own alt texts that set a cluster apart
(class-based tf-idf). Every member's picture gives its votes: its TOP_VOTES largest softmax
probabilities over all candidates (CPP, Chu et al. 2024); what the members' own words say of a
candidate is added. Ground truth is never read: only the caption (.txt) is.
V candidates, D dimensions, k clusters. Core: `ngrams` … `ranked` (no Ray). Shell: `run`.
"""

import logging
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.data import ActorPoolStrategy

from pipeline import artifacts, cluster, config, tasks
from pipeline.config import setting
from pipeline.errors import UserError
from pipeline.progress import StageProgress
from pipeline.store import tables
from pipeline.vision import clip, vocabulary

log = logging.getLogger(__name__)
TOP_VOTES = 5  # candidates that a member votes for
RANKED = 10  # captions kept per cluster
BATCH_ROWS = 1024  # members whose votes are counted at once: memory is this × V
TEXTS_PER_CALL = 4096  # candidates that one call of a text encoder does
TEXTS_PER_BATCH = 256  # through the text encoder at once
NGRAM_WORDS = 3
KEPT_NGRAMS = 2000  # per cluster and task: bounds the memory of the counts
MIN_SHARE = 0.05  # of a cluster's alt texts must hold an n-gram that becomes a candidate
STOPWORDS = frozenset(
    """a an and are as at be by for from has have in into is it its of on or that the this to was
    with you your i we he she they not no""".split()  # noqa: SIM905 - a list of words reads as one
)
WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*", re.UNICODE)


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
    return vocabulary.load(cfg.vocabulary or vocabulary.default(model))


def ngrams(text: str) -> set[str]:
    """The n-grams of 1 to 3 words of an alt text that neither begin nor end in a stop word."""
    words = WORD.findall(text.lower())
    found = set()
    for start in range(len(words)):
        for stop in range(start + 1, min(start + NGRAM_WORDS, len(words)) + 1):
            if words[start] not in STOPWORDS and words[stop - 1] not in STOPWORDS:
                found.add(" ".join(words[start:stop]))
    return found


Counts = list[Counter[str]]  # of each cluster: alt texts that hold an n-gram; "" counts all texts


def count_ngrams(stems: list[str], paths: artifacts.RunPaths, k: int) -> Counts:
    """N-grams of the members of each cluster, over some parts; the rare ones dropped."""
    counts: Counts = [Counter() for _ in range(k)]
    for stem in stems:
        rows, clusters = _joined(stem, paths, ["sample_id", "caption"])
        for number, text in zip(clusters.tolist(), rows["caption"].to_pylist(), strict=True):
            if text:
                counts[number].update(ngrams(text[:1000]) | {""})
    return [trimmed(counter) for counter in counts]


def trimmed(counter: Counter[str]) -> Counter[str]:
    """The KEPT_NGRAMS commonest of one cluster, ties by name."""
    if len(counter) <= KEPT_NGRAMS:
        return counter
    return Counter(
        dict(sorted(counter.items(), key=lambda item: (-item[1], item[0]))[:KEPT_NGRAMS])
    )


def shares(counts: Counts) -> list[dict[str, float]]:
    """Of each cluster: the share of its alt texts that hold an n-gram, where it is no rarity."""
    return [
        {name: n / counter[""] for name, n in counter.items() if name and n >= 2}
        for counter in counts
    ]


def distinctive(counts: Counts, per_cluster: int) -> list[str]:
    """The n-grams of largest class-based tf-idf of each cluster, all clusters together, sorted.

    tf is the share of the cluster's texts that hold the n-gram (at least MIN_SHARE), idf is
    log(1 + clusters / sum of its shares) as in BERTopic's c-TF-IDF (Grootendorst 2022), with
    shares in place of counts so that large clusters do not rule.
    """
    found = shares(counts)
    spread = _spread(found)
    chosen: set[str] = set()
    for own in found:
        scores = {
            name: share * math.log(1 + len(counts) / spread[name])
            for name, share in own.items()
            if share >= MIN_SHARE
        }
        chosen.update(sorted(scores, key=lambda name: (-scores[name], name))[:per_cluster])
    return sorted(chosen)


def text_scores(counts: Counts, names: list[str]) -> np.ndarray:
    """How well each candidate sums up the alt texts of each cluster, (k, V), 0 to 1.

    The share of the cluster's texts that hold it, times its share of all clusters' such shares: 1
    where every text of this cluster holds it and none of another.
    """
    found = shares(counts)
    spread = _spread(found)
    scores = np.zeros((len(counts), len(names)))
    column_of = {name.lower(): column for column, name in enumerate(names)}
    for row, own in zip(scores, found, strict=True):
        for name, share in own.items():
            if share >= MIN_SHARE and name in column_of:
                row[column_of[name]] = share * share / spread[name]
    return scores


def _spread(found: list[dict[str, float]]) -> dict[str, float]:
    """The sum over clusters of the shares of each n-gram."""
    spread: dict[str, float] = {}
    for own in found:
        for name, share in own.items():
            spread[name] = spread.get(name, 0.0) + share
    return spread


def votes(
    stems: list[str], paths: artifacts.RunPaths, texts: np.ndarray, k: int, temperature: float
) -> np.ndarray:
    """Summed votes (k, V) of the members of each cluster over some parts; texts (V, D) unit."""
    candidates = torch.from_numpy(texts)
    total = torch.zeros(k, len(texts), dtype=torch.float64)
    for stem in stems:
        rows, clusters = _joined(stem, paths, ["sample_id", "embedding"])
        x = torch.from_numpy(tables.to_matrix(rows["embedding"]).astype(np.float32))
        for start in range(0, len(x), BATCH_ROWS):
            batch = slice(start, start + BATCH_ROWS)
            shares = torch.softmax(x[batch] @ candidates.T / temperature, dim=1)
            top = shares.topk(min(TOP_VOTES, len(texts)), dim=1)
            own = torch.from_numpy(clusters[batch].astype(np.int64))[:, None]
            where = (own * len(texts) + top.indices).ravel()
            total.view(-1).index_add_(0, where, top.values.double().ravel())
    return total.numpy()


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


class TextEncoder:
    """An actor: the model is loaded once; each call encodes a run of candidates."""

    def __init__(self, model: str, pretrained: str, templates: tuple[str, ...]) -> None:
        self.encoder = clip.load(model, pretrained)
        self.templates = templates

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Names to unit vectors (n, D): the mean over the templates, normalised again."""
        prompts = [t.replace("{}", name) for name in row["names"] for t in self.templates]
        encoded = self.encoder.encode_texts(prompts, TEXTS_PER_BATCH)
        mean = encoded.reshape(len(row["names"]), len(self.templates), -1).mean(axis=1)
        unit = mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)
        return {"index": row["index"], "vectors": unit.astype(np.float32)}


def encode(names: list[str], cfg: Config, model: str, pretrained: str) -> np.ndarray:
    """All candidates through a pool of text encoders: (V, D) float32 unit rows."""
    items = [
        {"index": start, "names": names[start : start + TEXTS_PER_CALL]}
        for start in range(0, len(names), TEXTS_PER_CALL)
    ]
    cluster.join()
    gpus = int(ray.cluster_resources().get("GPU", 0))
    templates = cfg.templates or clip.templates(model)
    rows = ray.data.from_items(items, override_num_blocks=len(items)).map(
        TextEncoder,  # type: ignore[arg-type]
        fn_constructor_args=(model, pretrained, templates),
        num_cpus=1,
        num_gpus=1 if gpus else 0,
        ray_remote_args_fn=cluster.actor_limits,
        compute=ActorPoolStrategy(size=min(cfg.actors or max(1, gpus), len(items))),
    )
    found = {row["index"]: row["vectors"] for row in rows.iter_rows()}
    return np.concatenate([np.asarray(found[item["index"]], np.float32) for item in items])


def run(cfg: Config, paths: artifacts.RunPaths) -> dict[str, Any]:
    """Gather candidates, count votes, commit the ranking, then the manifest."""
    embedded, clustered = paths.embeddings.manifest(), paths.clusters.manifest()
    model = embedded["config"]["model"]
    names = check(cfg, model)
    made_of = config.fingerprint(cfg, clustered["fingerprint"], names)
    if manifest := artifacts.finished("caption", paths.captions, made_of, cfg):
        return manifest
    paths.captions.clear()
    k = len(clustered["sizes"])
    chunks = tasks.chunks([s["shard"]["stem"] for s in embedded["shards"]])
    passes = 2 if cfg.alt_texts else 1
    with StageProgress("caption", passes * sum(map(len, chunks)), "parts") as progress:
        counts = _all_counts(chunks, paths, k, cfg, progress)
        own = distinctive(counts, cfg.alt_texts)
        known = {name.casefold() for name in names}
        candidates = names + [name for name in own if name not in known]
        texts = encode(candidates, cfg, model, embedded["config"]["pretrained"])
        total = np.zeros((k, len(candidates)))
        counted = tasks.results(votes, chunks, paths, texts, k, cfg.temperature)
        for chunk, more in zip(chunks, counted, strict=True):
            total += more
            progress.advance(len(chunk))
    table = ranked(combined(total, text_scores(counts, candidates)), candidates, set(own) - known)
    tables.write(paths.captions.file("captions.parquet"), table)
    best = {row["cluster_id"]: row["caption"] for row in table.to_pylist() if row["rank"] == 0}
    paths.captions.finish(
        made_of,
        config=config.facts(cfg),
        candidates=len(candidates),
        from_alt_texts=len(candidates) - len(names),
        captions=[best.get(number) for number in range(k)],
        seconds=round(progress.seconds, 2),
    )
    log.info(
        "caption: %d clusters, %d candidates (%d from alt texts), %.1f s",
        *(k, len(candidates), len(candidates) - len(names), progress.seconds),
    )
    return paths.captions.manifest()


def _all_counts(
    chunks: list[Any],
    paths: artifacts.RunPaths,
    k: int,
    cfg: Config,
    progress: StageProgress,
) -> Counts:
    """`count_ngrams` over all parts; empty where alt texts are not to be candidates."""
    counts: Counts = [Counter() for _ in range(k)]
    if cfg.alt_texts:
        found = tasks.results(count_ngrams, chunks, paths, k)
        for chunk, more in zip(chunks, found, strict=True):
            for counter, extra in zip(counts, more, strict=True):
                counter.update(extra)
            counts = [trimmed(counter) for counter in counts]
            progress.advance(len(chunk))
    return counts
