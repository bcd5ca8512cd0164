"""How good the captions of a run are, next to the plain vote, with class names and without.

reads   captions/candidates.parquet, clusters/prototypes.parquet

A vocabulary that contains the class names is right if it finds just these. So a second ranking
removes all candidates that contain a class name (singular or plural, or among more words), and lets
the members vote again. Its captions are scored by their similarity to the most frequent class.
n labelled samples, D dimensions, k clusters. Core: `best_captions`, `judge`. Shell: `score`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from benchmarks import wordnet
from pipeline.artifacts import layout, outputs
from pipeline.caption import candidates, ranking, tokenization
from pipeline.caption.candidates import Candidates
from pipeline.evaluate import stage as evaluate
from pipeline.vision import clip
from pipeline.vision.prompts import templates as templates_of

MAX_VOTERS = 100_000  # labelled samples that vote, spread evenly over all
OURS, PLAIN = "ratecluster", "plain top-5 vote"

Named = list[str | None]  # of each cluster its caption


@dataclass(frozen=True)
class Voters:
    """Members of the clusters, and their true classes."""

    x: np.ndarray  # (n, D), unit rows
    clusters: np.ndarray  # (n,)
    truth: np.ndarray  # (n,) str

    def some(self) -> "Voters":
        """At most MAX_VOTERS of them, evenly spaced."""
        step = -(-len(self.x) // MAX_VOTERS)
        return Voters(self.x[::step], self.clusters[::step], self.truth[::step])


def without_class_names(names: list[str], classes: set[str]) -> np.ndarray:
    """Indices of the candidates that contain no class name."""
    keys = {tokenization.key(name) for name in classes} - {()}
    kept = [
        i for i, name in enumerate(names) if not tokenization.says_any(tokenization.key(name), keys)
    ]
    return np.array(kept, np.int64)


def best_captions(
    voters: Voters, found: Candidates, near: sp.csr_matrix, temperature: float
) -> dict[str, Named]:
    """The best candidate of each cluster, by our ranking and by the plain vote."""
    if not found.names:
        return {name: [None] * near.shape[0] for name in (OURS, PLAIN)}
    votes = ranking.votes(voters.x, voters.clusters, found.texts, near.shape[0], temperature)
    scores = {OURS: ranking.combine(votes, found.by_texts, near), PLAIN: votes.total}
    return {
        name: [None if i is None else found.names[i] for i in ranking.best(score)]
        for name, score in scores.items()
    }


def judge(
    captions: Named, majorities: Named, cosine: Callable[[str, str], float]
) -> dict[str, Any]:
    """Means over the clusters that have both a caption and a class; None where there are none."""
    pairs = [(c, m) for c, m in zip(captions, majorities, strict=True) if c and m]
    paths = [wordnet.path_similarity(*pair) for pair in pairs]
    known = [path for path in paths if path is not None]
    return {
        "clusters": len(pairs),
        "accuracy": _mean([float(tokenization.key(c) == tokenization.key(m)) for c, m in pairs]),
        "path_similarity": _mean(known),
        "path_known": len(known),
        "text_similarity": _mean([cosine(*pair) for pair in pairs]),
    }


def _mean(values: list[float]) -> float | None:
    return round(float(np.mean(values)), 6) if values else None


def score_run(paths: layout.RunPaths, field: str) -> dict[str, Any]:
    """All comparisons for a finished run whose true classes are in the json field `field`."""
    made = outputs.upstream(paths, "captions")
    stems = [shard["shard"]["stem"] for shard in made["embeddings"]["shards"]]
    samples = evaluate.read_all(stems, field, True, paths)
    voters = Voters(samples.embeddings, samples.clusters, samples.truth)
    rows = evaluate.majorities(samples, made["clusters"]["sizes"], {})
    majorities = [row["majority"] for row in rows]
    return score(voters, majorities, made["embeddings"], made["captions"], paths)


def score(
    voters: Voters,
    majorities: Named,
    embedded: dict[str, Any],
    captioned: dict[str, Any],
    paths: layout.RunPaths,
) -> dict[str, Any]:
    """All comparisons. `majorities`: the most frequent class of each cluster.

    `embedded` and `captioned` are the manifests of embed and caption.
    """
    k, temperature = len(captioned["captions"]), captioned["config"]["temperature"]
    found, near = candidates.read(paths, k), candidates.neighbourhood(paths)
    kept = without_class_names(found.names, set(voters.truth.tolist()))
    some = voters.some()
    given = best_captions(some, found, near, temperature)
    first = [name and name.split(ranking.AND)[0] for name in captioned["captions"]]
    shown = {OURS: first, PLAIN: given[PLAIN]}
    blind = best_captions(some, found.only(kept), near, temperature)
    cosine = _cosine(
        {
            text
            for named in (majorities, *shown.values(), *blind.values())
            for text in named
            if text
        },
        embedded["config"],
        captioned["config"]["templates"],
    )
    return {
        "voters": len(some.x),
        "candidates": len(found.names),
        "class_names": len(found.names) - len(kept),
        "rows": [
            {"name": name, "class_names": names, **judge(named[name], majorities, cosine)}
            for names, named in (("left in", shown), ("removed", blind))
            for name in (OURS, PLAIN)
        ],
        "clusters": [
            {"cluster_id": n, "majority": m, "caption": c, "plain": p}
            | {"caption_without": blind[OURS][n], "plain_without": blind[PLAIN][n]}
            for n, (m, c, p) in enumerate(zip(majorities, *shown.values(), strict=True))
        ],
    }


def _cosine(
    texts: set[str], encoder: dict[str, Any], templates: list[str]
) -> Callable[[str, str], float]:
    """Cosine of two of the texts by the run's own text encoder."""
    model, order = encoder["model"], sorted(texts)
    loaded = clip.load(model, encoder["pretrained"])
    prompts = templates_of(model, templates)
    vectors = loaded.encode_words(order, prompts, clip.TEXTS_PER_BATCH)
    of = dict(zip(order, vectors, strict=True))
    return lambda one, other: float(of[one] @ of[other])


def table(result: dict[str, Any]) -> str:
    """The scores of the captions, in percent."""
    lines = [f"captions of {result['rows'][0]['clusters']} clusters against their commonest class:"]
    width = max(len(row["name"]) for row in result["rows"])
    lines.append(f"{'':{width}}  class names   same  WordNet  text")
    for row in result["rows"]:
        values = [
            "    -" if row[key] is None else f"{100 * row[key]:5.1f}"
            for key in ("accuracy", "path_similarity", "text_similarity")
        ]
        start = f"{row['name']:{width}}  {row['class_names']:11}"
        lines.append(f"{start}  {values[0]}    {values[1]} {values[2]}")
    return "\n".join(lines)
