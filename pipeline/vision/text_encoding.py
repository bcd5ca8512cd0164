"""Encodes a vocabulary by the text encoder, on the Ray cluster.

V words, D dimensions.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
from ray.data import ActorPoolStrategy

from pipeline.runtime import cluster, progress
from pipeline.vision import clip, prompts

TEXTS_PER_CALL = 4096  # words in one call of a text encoder


class TextEncoder:
    """An actor that loads the model once; each call encodes some words."""

    def __init__(self, model: str, pretrained: str, templates: Sequence[str]) -> None:
        self.encoder = clip.load(model, pretrained)
        self.templates = templates

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Words → unit vectors (n, D)."""
        vectors = self.encoder.encode_words(row["words"], self.templates, clip.TEXTS_PER_BATCH)
        return {
            "index": row["index"],
            "vectors": vectors,
            "logit_scale": self.encoder.logit_scale,
        }


def encode(
    words: Sequence[str], templates: Sequence[str], model: str, pretrained: str
) -> tuple[np.ndarray, float]:
    """All words through a pool of text encoders: (V, D) float32 unit rows, and the logit scale.

    `templates` as in `clip.templates`, averaged.
    One process per GPU, or one.
    """
    starts = range(0, len(words), TEXTS_PER_CALL)
    items = [{"index": start, "words": words[start : start + TEXTS_PER_CALL]} for start in starts]
    cluster.join()
    gpus = int(ray.cluster_resources().get("GPU", 0))
    rows = ray.data.from_items(items, override_num_blocks=len(items)).map(
        TextEncoder,  # type: ignore[arg-type]
        fn_constructor_args=(model, pretrained, prompts.templates(model, templates)),
        num_cpus=1,
        num_gpus=1 if gpus else 0,
        ray_remote_args_fn=cluster.actor_limits,
        compute=ActorPoolStrategy(size=min(max(1, gpus), len(items))),
    )
    found: dict[int, dict[str, Any]] = {}
    waiting = {start: f"words {start} to {start + TEXTS_PER_CALL - 1}" for start in starts}
    progress.waiting_for(waiting.values())
    for row in rows.iter_rows():
        found[row["index"]] = row
        del waiting[row["index"]]
        progress.waiting_for(waiting.values())
    vectors = [np.asarray(found[start]["vectors"], np.float32) for start in starts]
    return np.concatenate(vectors), float(found[0]["logit_scale"])
