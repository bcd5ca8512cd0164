"""The Python API: run the pipeline, read a finished run.

from pipeline import open_run
labels = open_run("my-run").labels().to_table(columns=["sample_id", "cluster_id"])
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from PIL import Image

from pipeline.artifacts import outputs
from pipeline.artifacts.layout import RunPaths
from pipeline.runtime import config
from pipeline.runtime.errors import UserError, user_message
from pipeline.store import compressed, storage, tables
from pipeline.store.listing import current, version_now
from pipeline.store.storage import Folder


class Run:
    """A finished run, on any store that fsspec opens. Reads only what is asked for."""

    def __init__(self, root: str) -> None:
        self.paths = RunPaths(storage.absolute(root))
        self.manifests = outputs.upstream(self.paths, "labels")

    @property
    def root(self) -> str:
        """URL, or absolute path, of the run's folder."""
        return self.paths.root

    def labels(self) -> ds.Dataset:
        """One row per input sample, failures included: `labels/`, lazily, in the order of shards.

        Columns as in docs/results.md: sample_id, shard, key, status, caption, cluster_id,
        cluster_caption, confidence (0 to 1), outlier_score (0 to 2), the samples' own json fields.
        """
        return self._dataset(self.paths.labels)

    def embeddings(self) -> ds.Dataset:
        """One row per readable sample: `embeddings/`, lazily, in the order of shards.

        `embedding` is a fixed-size list of D float16, a vector of unit length. With `embed.also`
        there are `embedding_2`, `embedding_3`, … of the further encoders, in the order of the list.
        """
        return self._dataset(self.paths.embeddings)

    def clusters(self) -> pa.Table:
        """One row per cluster, k in all: cluster_id, size (samples), cluster_caption, captions,
        caption_shares, bits_per_sample, nearest_clusters, typical_samples. Cluster 0 is the
        largest, except where `ratecluster assign` took the clusters from another run.
        """
        return tables.read(self.paths.clusters_table)

    def levels(self) -> pa.Table:
        """One row per cluster of every level, from coarse to fine: level (from 1), cluster_id
        (`cluster_l1`, `cluster_l2`, … of the labels), parent (the cluster of the level before that
        contains it), size (samples), cluster_caption, share (0 to 1).
        """
        return tables.read(self.paths.top.file("levels.parquet"))

    def members(self, cluster: int) -> pa.Table:
        """The labels of one cluster's samples, the best fitting first (least outlier_score).

        Raises UserError where the run has no such cluster.
        """
        k = len(self.manifests["clusters"]["sizes"])
        if not 0 <= cluster < k:
            raise UserError(f"cluster {cluster}: the run has clusters 0 to {k - 1}")
        found = self.labels().to_table(filter=pc.field("cluster_id") == cluster)
        return found.sort_by([("outlier_score", "ascending"), ("sample_id", "ascending")])

    def image(self, sample_id: str) -> Image.Image:
        """The picture of a sample, upright, mode RGB; reads only its bytes from the input shard.

        Raises UserError for an unknown id, a rejected sample, and a shard that is gone or was
        changed after it was embedded.
        """
        from pipeline.vision import images

        shard = self._shard(sample_id)
        columns = ["sample_id", "error_message", "tar_offset", "tar_size"]
        part = tables.read(self.paths.labels.file(f"{shard['stem']}.parquet"), columns)
        rows = part.filter(pc.equal(part["sample_id"], sample_id)).to_pylist()
        if not rows:
            raise UserError(f"sample {sample_id!r} is not in the run {self.root}")
        if rows[0]["tar_offset"] is None:
            why = rows[0]["error_message"] or "the run was made of embeddings alone"
            raise UserError(f"sample {sample_id!r} has no picture: {why}")
        try:
            changed = current(shard["url"]) != (shard["size"], version_now(shard))
        except FileNotFoundError:
            raise UserError(f"sample {sample_id!r}: its shard {shard['url']} is gone") from None
        if changed:
            raise UserError(
                f"sample {sample_id!r}: its shard {shard['url']} was changed after it was "
                "embedded; run `ratecluster run` again"
            )
        data = compressed.read_range(shard["url"], rows[0]["tar_offset"], rows[0]["tar_size"])
        return images.decode(data, self.manifests["embeddings"]["config"]["max_image_pixels"])

    def _shard(self, sample_id: str) -> dict[str, Any]:
        stem = sample_id.partition("/")[0]
        for facts in self.manifests["embeddings"]["shards"]:
            if facts["shard"]["stem"] == stem:
                return dict(facts["shard"])
        raise UserError(
            f"sample {sample_id!r}: the run has no shard {stem!r}; a sample_id is "
            "SHARD/KEY, such as 00000/000000012"
        )

    def _dataset(self, folder: Folder) -> ds.Dataset:
        fs, path = storage.locate(folder.url)
        shards = self.manifests["embeddings"]["shards"]
        urls = [f"{path}/{facts['shard']['stem']}.parquet" for facts in shards]
        return ds.dataset(urls, format="parquet", filesystem=fs)


def open_run(root: str | os.PathLike[str]) -> Run:
    """Open a finished run: `root` is a local path, s3://, gs:// or any other URL of fsspec.

    Raises UserError, naming the command to run, where a stage up to `write` has not finished or
    was made of other inputs than those that are there now.
    """
    return Run(os.fspath(root))


def run(
    shards: str | os.PathLike[str] | Sequence[str] | None,
    root: str | os.PathLike[str],
    overwrite: bool = False,
    embeddings: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    **settings: Mapping[str, Any],
) -> Run:
    """Run all stages, as `ratecluster run` does, and open the result. Finished work is skipped.

    `shards` is a folder, a glob, a brace pattern or a list file of webdataset tars, or a sequence
    of these; None with `embeddings` alone. Settings are one dict per stage:
    run("my-shards", "my-run", select_k={"k": 12}, embed={"batch_size": 32}).
    `embeddings` are files of given embeddings, as of --embeddings, or a dict of their `url` and the
    settings of that section: run(None, "my-run", embeddings={"url": "vectors", "columns": ["a"]}).
    Raises UserError for a mistake in the arguments, RuntimeError where a stage fails.
    """
    from pipeline.cli import options, stage_commands
    from pipeline.runtime import cluster

    _, paths = options.Common().begin(os.fspath(root))
    given = dict(embeddings) if isinstance(embeddings, Mapping) else {"url": embeddings}
    url = given.pop("url", None)
    sections = config.fill(options.KINDS, {**settings, "embeddings": given})
    try:
        with cluster.session():
            sections, listed = options.listed(
                sections,
                [os.fspath(shards)] if isinstance(shards, str | os.PathLike) else shards,
                os.fspath(url) if url else None,
                paths.root,
            )
            stage_commands.run_all(sections, paths, listed, overwrite)
    except Exception as error:
        if message := user_message(error):
            raise UserError(message) from error
        raise
    return open_run(root)
