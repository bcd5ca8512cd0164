"""Let a vision-language model name each cluster from images of its typical members.

reads   clusters/exemplars.parquet      EXEMPLARS; the images are read from the input shards
writes  captions/unfinished-names.*     the names so far; removed when the stage has finished
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts import layout, schemas
from pipeline.caption import tokenization, vlm_client
from pipeline.runtime import progress, redaction
from pipeline.store import tables
from pipeline.store.partial_sums import PartialResult
from pipeline.vision import thumbnails

log = logging.getLogger(__name__)
SIDE = 336  # pixels of an image's longer side: the input size of many vision encoders
ALT_TEXTS = 10  # of members in a request
ALT_CHARACTERS = 200  # of each
COMMIT_S = 5.0  # between commits of the names so far
GIVE_UP = 16  # clusters in a row without a name: the server is down or not suitable
LISTED = 20  # clusters named in a message


class VlmPrompt:
    """Images and texts of each cluster for the model."""

    def __init__(
        self,
        cfg: vlm_client.Config,
        voted: pa.Table,
        embedded: dict[str, Any],
        paths: layout.RunPaths,
    ) -> None:
        self.cfg, self.urls = cfg, {s["shard"]["stem"]: s["shard"] for s in embedded["shards"]}
        self.max_pixels = embedded["config"]["max_image_pixels"]
        self.candidates: dict[int, list[str]] = {}
        for row in voted.to_pylist():
            self.candidates.setdefault(row["cluster_id"], []).append(row["caption"])
        found = tables.read(paths.clusters.file("exemplars.parquet"))
        if "kind" in found.column_names:
            found = found.filter(pc.equal(found["kind"], "typical"))
        self.members: dict[int, list[dict[str, Any]]] = {}
        for row in found.sort_by([("cluster_id", "ascending"), ("rank", "ascending")]).to_pylist():
            self.members.setdefault(row["cluster_id"], []).append(row)

    def of(self, cluster: int) -> tuple[list[str], list[str], list[str]]:
        """Images as data: URIs, candidates, alt texts; UnnamedError if no image can be read."""
        members = self.members[cluster]
        places = [
            thumbnails.Place(self.urls[m["shard"]]["url"], m["tar_offset"], m["tar_size"])
            for m in members[: self.cfg.namer_pictures]
        ]
        found = thumbnails.thumbnails(places, self.max_pixels, SIDE, "JPEG")
        if not (images := [uri for uri in found if uri]):
            raise vlm_client.UnnamedError("none of its pictures can be read")
        texts = dict.fromkeys(m["caption"][:ALT_CHARACTERS] for m in members if m["caption"])
        return images, self.candidates.get(cluster, []), list(texts)[:ALT_TEXTS]


class _Names:
    """The names so far, saved every few seconds, so that an interrupted stage resumes from them."""

    def __init__(self, paths: layout.RunPaths, made_of: str) -> None:
        self.file = PartialResult(paths.captions, "names", made_of)
        before = self.file.load() or {"names": _bytes({})}
        found = json.loads(before["names"].tobytes())
        self.of: dict[int, str] = {int(number): name for number, name in found.items()}
        self.saved = time.monotonic()

    def save(self, after_s: float = 0.0) -> None:
        """Save the names if at least `after_s` seconds have passed since the last time."""
        if time.monotonic() - self.saved >= after_s:
            self.file.save({"names": _bytes(dict(self.of))})
            self.saved = time.monotonic()


def _bytes(names: dict[int, str]) -> np.ndarray:
    return np.frombuffer(json.dumps(names).encode(), np.uint8)


def name_clusters(
    cfg: vlm_client.Config,
    voted: pa.Table,
    embedded: dict[str, Any],
    paths: layout.RunPaths,
    made_of: str,
) -> tuple[pa.Table, dict[str, Any]]:
    """CAPTIONS with the model's names first, and facts for the manifest: `named`, `unnamed`.

    `embedded` is the manifest of embed. RuntimeError if no cluster gets a name, or if GIVE_UP
    clusters in a row get none.
    """
    names, failed = _Names(paths, made_of), dict[int, str]()
    ask, shown = vlm_client.Namer(cfg), VlmPrompt(cfg, voted, embedded, paths)

    def name(number: int) -> bool:
        try:
            names.of[number] = ask(*shown.of(number))
        except vlm_client.UnnamedError as error:
            failed[number] = str(error)
        return number in names.of

    todo = [number for number in shown.members if number not in names.of]
    try:
        row = _longest_row(name, todo, names, cfg.namer_parallel)
    finally:
        names.save()
    if row == GIVE_UP or (failed and not names.of):
        raise RuntimeError(
            f"caption: {redaction.redacted(cfg.namer)} named none of {row} clusters "
            f"({failed[max(failed)]}): correct caption.namer, or start its server; run again"
        )
    best = {r["cluster_id"]: r["caption"] for r in voted.to_pylist() if r["rank"] == 0}
    log.info("caption: %d clusters named by %s", len(names.of), cfg.namer_model)
    if failed:
        first = min(failed)
        log.warning(
            "caption: %d clusters keep their voted captions: %s; %d is %r, since: %s",
            *(len(failed), _listed(failed), first, best.get(first), failed[first]),
        )
    return with_names(voted, names.of), {"named": len(names.of), "unnamed": sorted(failed)}


def _longest_row(name: Callable[[int], bool], todo: list[int], names: _Names, parallel: int) -> int:
    """Name clusters, `parallel` at a time; returns the longest run of clusters without a name.

    Stops when that run reaches GIVE_UP.
    """
    row, longest, pool = 0, 0, ThreadPoolExecutor(parallel)
    with progress.StageProgress("caption", len(todo), "names") as done:
        try:
            for number, future in [(number, pool.submit(name, number)) for number in todo]:
                progress.waiting_for([f"the name of cluster {number}"])
                row = 0 if future.result() else row + 1
                longest = max(longest, row)
                if longest == GIVE_UP:
                    break
                names.save(after_s=COMMIT_S)
                done.advance()
        finally:
            pool.shutdown(cancel_futures=True)
    return longest


def _listed(clusters: Iterable[int]) -> str:
    numbers = [str(number) for number in sorted(clusters)]
    return ", ".join(numbers[:LISTED]) + (", …" if len(numbers) > LISTED else "")


def with_names(voted: pa.Table, names: dict[int, str]) -> pa.Table:
    """CAPTIONS: each name, then the ranked captions of its cluster that differ from the name."""
    rows: list[dict[str, Any]] = [
        {"cluster_id": n, "rank": -1, "caption": name, "share": 0.0, "source": "model"}
        for n, name in names.items()
    ]
    keys = {number: tokenization.key(name) for number, name in names.items()}
    rows += [
        row
        for row in voted.to_pylist()
        if tokenization.key(row["caption"]) != keys.get(row["cluster_id"])
    ]
    rows.sort(key=lambda row: (row["cluster_id"], row["rank"]))
    ranks: Counter[int] = Counter()
    for row in rows:
        row["rank"] = ranks[row["cluster_id"]]
        ranks[row["cluster_id"]] += 1
    return pa.Table.from_pylist(rows, schema=schemas.CAPTIONS)
