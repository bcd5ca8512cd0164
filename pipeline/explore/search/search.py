"""Command search: find the samples of a finished run that are most similar to an image or a text.

reads   index/{space}/…; embeddings/{stem}.parquet, a few row groups; assignments/…, captions/…,
        network/… for the space z; all assignments to search one cluster

The index proposes candidates. They are ranked by the embeddings, so scores are exact.
N samples, D dimensions of an embedding, d of a compared vector.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts import inputs, layout, outputs, views
from pipeline.artifacts.layout import Space
from pipeline.explore.search.index import Rows, as_vectors, columns_of, open_index
from pipeline.mcr2.network import FeatureNetwork
from pipeline.runtime.errors import UserError
from pipeline.select_k.assign_parts import load_network
from pipeline.store import tables
from pipeline.store.storage import Folder
from pipeline.vision import clip, images
from pipeline.vision.thumbnails import Place

CANDIDATES = 10  # for each result, if the index is compressed
LEAST_CANDIDATES = 100
READERS = 16  # shards read at once
SHOWN = ["sample_id", "caption", "tar_offset", "tar_size", "shard"]


@dataclass(frozen=True)
class Hit:
    """A search result."""

    sample_id: str
    score: float  # cosine, −1 to 1
    cluster_id: int
    cluster_caption: str
    caption: str  # of the sample; "" if it has none
    place: Place | None  # of the bytes of its image; None in a run without shards


class Search:
    """A finished run, opened for queries in some spaces. Raises UserError if a file is missing."""

    def __init__(self, paths: layout.RunPaths, spaces: Sequence[Space]) -> None:
        self.paths, self.made = paths, outputs.upstream(paths, "captions")
        embedded = self.made["embeddings"]
        self.rows = Rows.of(embedded)
        self.urls = {s["shard"]["stem"]: s["shard"]["url"] for s in embedded["shards"]}
        self.max_pixels: int = embedded["config"]["max_image_pixels"]
        self.captions: list[str | None] = self.made["captions"]["captions"]
        self.sizes: list[int] = self.made["clusters"]["sizes"]
        self.indices = {space: open_index(paths, self.made, space) for space in spaces}

    @cached_property
    def encoder(self) -> clip.Encoder:
        """The model of the run's embeddings, in full precision.

        UserError for given embeddings without a model.
        """
        made_with = self.made["embeddings"]["config"]
        if not made_with["model"]:
            raise UserError(
                f"{self.paths.root}: its embeddings were given without a model that encodes texts "
                "and images: search with --sample, or run again with embeddings.model set"
            )
        return clip.load(made_with["model"], made_with["pretrained"], precision="fp32")

    @cached_property
    def _further(self) -> list[clip.Encoder]:
        """The models of embed.also, in full precision."""
        encoders = self.made["embeddings"]["encoders"][1:]
        if encoders and inputs.are_given(self.made["embeddings"]["config"]):
            raise UserError(
                f"{self.paths.root}: no encoder is known for the column {encoders[0]['model']!r} "
                "of its embeddings: search in --space clip, or with --sample"
            )
        return [clip.load(e["model"], e["pretrained"], precision="fp32") for e in encoders]

    @cached_property
    def _network(self) -> FeatureNetwork:
        return load_network(self.paths)

    def _vectors(self, x: np.ndarray, space: Space) -> np.ndarray:
        return as_vectors(x, self._network if space is Space.Z else None)

    def of_image(self, data: bytes, space: Space, max_pixels: int) -> np.ndarray:
        """The query (d,) for an image file; UserError if it cannot be decoded."""
        try:
            picture = images.decode(data, max_pixels)
        except images.BadImage as bad:
            raise UserError(f"the image cannot be used: {bad.reason}") from None
        encoders = [self.encoder, *(self._further if space is Space.Z else ())]
        found = [e.encode_images(e.prepare(picture)[None]) for e in encoders]
        return np.asarray(self._vectors(np.concatenate(found, axis=1), space)[0])

    def of_text(self, text: str) -> np.ndarray:
        """The query (D,) in space clip for a text, without a prompt.

        There is none in space z: the network knows only embeddings of images.
        """
        if not text.strip():
            raise UserError("the text is empty; describe an image")
        return np.asarray(self.encoder.encode_texts([text], 1)[0])

    def of_sample(self, sample_id: str, space: Space) -> np.ndarray:
        """The query (d,) of a sample of the run; UserError if it is not embedded there."""
        stem = sample_id.partition("/")[0]
        columns = columns_of(self._network if space is Space.Z else None)
        if stem in self.rows.stems:
            url = self.paths.embeddings.file(f"{stem}.parquet")
            place = pc.index(tables.read(url, ["sample_id"])["sample_id"], sample_id).as_py()
            if place >= 0:
                row = tables.read_rows(url, columns, range(place, place + 1))
                return np.asarray(self._vectors(views.side_by_side(row, columns)[0], space)[0])
        raise UserError(
            f"{self.paths.root} has no embedding of the sample {sample_id!r}; a sample_id is "
            "SHARD/KEY, as in labels/"
        )

    def nearest(
        self, query: np.ndarray, space: Space, top: int, cluster: int | None = None
    ) -> list[Hit]:
        """The `top` samples with the highest cosine, of the whole run or of one cluster."""
        members = None if cluster is None else self._members(cluster)
        ids, scores = self.rank(query, space, top, members)
        if not len(ids):
            return []
        rows = self._read(self.paths.embeddings, SHOWN, ids).to_pylist()
        clusters = self._read(self.paths.assignments, ["cluster_id"], ids)["cluster_id"]
        found = zip(rows, scores.tolist(), clusters.to_pylist(), strict=True)
        return [self._hit(*one) for one in found]

    def rank(
        self, query: np.ndarray, space: Space, top: int, members: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids and cosines, best first; `members` (N,) bool limits the search."""
        index = self.indices[space]
        most = top if index.flat else max(CANDIDATES * top, LEAST_CANDIDATES)
        ids = index.candidates(query, min(most, self.rows.total), members)
        if not len(ids):
            return ids, np.empty(0, np.float32)
        columns = columns_of(self._network if space is Space.Z else None)
        x, _ = views.side_by_side(self._read(self.paths.embeddings, columns, ids), columns)
        scores = self._vectors(x, space) @ query
        best = np.argsort(-scores, kind="stable")[:top]
        return ids[best], scores[best]

    def typical(self, cluster: int) -> list[Hit]:
        """The most typical members of a cluster; scores are cosines to the nearest prototype."""
        self._check(cluster)
        return self._exemplars(pc.field("cluster_id") == cluster)

    def most_typical(self, clusters: Sequence[int]) -> list[Hit]:
        """One member of each cluster that has members, in this order."""
        found = self._exemplars(pc.field("rank") == 0)
        by_cluster = {hit.cluster_id: hit for hit in found}
        return [by_cluster[cluster] for cluster in clusters if cluster in by_cluster]

    def _exemplars(self, which: pc.Expression) -> list[Hit]:
        table = tables.read(self.paths.clusters.file("exemplars.parquet"))
        table = table.filter((pc.field("kind") == "typical") & which)
        rows = table.sort_by("rank").to_pylist()
        return [self._hit(row, 1 - row["outlier_score"], row["cluster_id"]) for row in rows]

    def _check(self, cluster: int) -> None:
        if not 0 <= cluster < len(self.sizes):
            raise UserError(f"there is no cluster {cluster}; give 0 to {len(self.sizes) - 1}")

    def _members(self, cluster: int) -> np.ndarray:
        """(N,) bool: which samples are in the cluster."""
        self._check(cluster)
        found = np.zeros(self.rows.total, bool)

        def read(part: int) -> None:
            url = self.paths.assignments.file(f"{self.rows.stems[part]}.parquet")
            ids, column = self.rows.ids(part), tables.read(url, ["cluster_id"])["cluster_id"]
            found[ids.start : ids.stop] = column.to_numpy() == cluster

        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(read, range(len(self.rows.stems))))
        return found

    def _read(self, folder: Folder, wanted: list[str], ids: np.ndarray) -> pa.Table:
        """Columns of samples, in the order of `ids`; reads few row groups."""
        parts = self.rows.parts(ids)
        order = np.argsort(parts, kind="stable")
        held, firsts = np.unique(parts[order], return_index=True)

        def take(part: int, places: np.ndarray) -> pa.Table:
            url = folder.file(f"{self.rows.stems[part]}.parquet")
            return tables.read_rows(url, wanted, ids[places] - self.rows.ids(part).start)

        with ThreadPoolExecutor(READERS) as pool:
            pieces = pool.map(take, held.tolist(), np.split(order, firsts[1:]))
            return pa.concat_tables(pieces).take(np.argsort(order))

    def _hit(self, row: dict[str, Any], score: float, cluster: int) -> Hit:
        return Hit(
            sample_id=row["sample_id"],
            score=round(score, 6),
            cluster_id=cluster,
            cluster_caption=self.captions[cluster] or "",
            caption=row["caption"] or "",
            place=None
            if row["tar_offset"] is None
            else Place(self.urls[row["shard"]], row["tar_offset"], row["tar_size"]),
        )
