"""Features of images by the project's own code, and the words beside them, for the benchmarks."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.published import Words
from pipeline.store import storage
from pipeline.store.listing import list_shards
from pipeline.store.shards import ShardReader
from pipeline.vision import clip, images, prompts, vocabulary
from pipeline.vision.text_encoding import TextEncoder

MODEL = "pico-clip"
EFFICIENTNET = "efficientnet"  # stored features of another encoder, without words
ENCODED = 256  # images at once


def encoded(shards: str, model: str) -> Iterator[tuple[np.ndarray, list[dict[str, Any]]]]:
    """Embeddings (b, D) float32 by a model and the json of their samples, as they are read."""
    encoder = clip.load(model, "", device="cpu", precision="fp32", threads=1)
    for shard in list_shards(shards):
        with storage.open_read(shard.url) as stream:
            samples = list(ShardReader(stream, None))
        for start in range(0, len(samples), ENCODED):
            some = samples[start : start + ENCODED]
            pictures = [images.decode(sample.image().data, 2**28) for sample in some]
            x = encoder.encode_images(np.stack([encoder.prepare(each) for each in pictures]))
            yield x, [json.loads(sample.json_text() or "") for sample in some]


@dataclass(frozen=True)
class Images:
    """Features of a set: float16 as the product stores them, unit rows of each encoder."""

    x: Tensor  # (N, D1 + D2 + …), encoders side by side
    dims: list[int]  # D1, D2, …
    facts: list[dict[str, Any]]

    def truth(self, name: str) -> np.ndarray:
        """Labels (N,) as numbers from 0."""
        return np.unique([row[name] for row in self.facts], return_inverse=True)[1].ravel()


@dataclass(frozen=True)
class Source:
    """Features by the project's own code; those of images are kept in `cache`."""

    data: Path
    cache: Path
    sets: list[str]
    seeds: int

    def images(self, name: str, models: Sequence[str] = (MODEL,)) -> Images:
        """The features of a set by each of the models; EFFICIENTNET is read from the data."""
        found = [self._features(name, model) for model in models]
        facts = json.loads((self.cache / f"{name}.json").read_text())
        dims = [x.shape[1] for x in found]
        return Images(torch.from_numpy(np.concatenate(found, axis=1)), dims, facts)

    def _features(self, name: str, model: str) -> np.ndarray:
        rows, facts = self.cache / f"{name}-{model}.npy", self.cache / f"{name}.json"
        if model == EFFICIENTNET and facts.exists():
            short = name.removesuffix("-test").removeprefix("noto-")
            path = self.data / "features" / f"{short}-{model}.npz"
            with np.load(path, allow_pickle=False) as stored:
                x = stored["x"].astype(np.float32)
            return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
        if not (rows.exists() and facts.exists()):
            wanted = MODEL if model == EFFICIENTNET else model
            found = list(encoded(str(self.data / name), wanted))
            x = np.concatenate([x for x, _ in found]).astype(np.float16)
            np.save(self.cache / f"{name}-{wanted}.npy", x)
            facts.write_text(json.dumps([fact for _, some in found for fact in some]))
            return self._features(name, model)
        stored_rows: np.ndarray = np.load(rows, allow_pickle=False)
        return stored_rows

    @cached_property
    def vocabulary(self) -> list[str]:
        """The product's words."""
        return vocabulary.load_or_default((), MODEL)

    @cached_property
    def words(self) -> Words:
        """Their vectors."""
        encoder = TextEncoder(MODEL, "", prompts.templates(MODEL))
        row = encoder({"index": 0, "words": self.vocabulary})
        return Words(torch.from_numpy(row["vectors"]), row["logit_scale"])

    def words_without(self, facts: list[dict[str, Any]]) -> Words:
        """Those that are no name of a class."""
        names = {
            str(row.get(name)) for row in facts for name in ("label", "superlabel", "sublabel")
        }
        names = {name.casefold().replace("-", " ") for name in names}
        keep = [word.casefold().replace("-", " ") not in names for word in self.vocabulary]
        print(f"  leak check: {keep.count(False)} of {len(keep)} words are class names, removed")
        return Words(self.words.table[torch.tensor(keep)], self.words.scale)
