"""Images of each cluster's members: inside the page while it is small, else in separate files.

reads   clusters/exemplars.parquet, the input shards (bytes of the images shown)
writes  report/galleries/{cluster_id}.webp   the images of one cluster, one below the other
"""

from collections import defaultdict
from typing import Any

from pipeline.artifacts import inputs, layout
from pipeline.report.run_data import Facts, RunData
from pipeline.report.settings import Config
from pipeline.runtime.errors import UserError
from pipeline.store import storage, tables
from pipeline.vision import thumbnails

PAGE_BYTES = 14_500_000  # the largest page, with texts of usual length
FIXED_BYTES = 1_800_000  # ECharts and other fixed parts
CLUSTER_BYTES = 11_500  # texts of a cluster with a gallery
AT_ONCE = 64  # clusters whose images are held in memory
TEXT_BYTES = 80  # the longest caption and name of a member


def add(
    rows: list[Facts], run: RunData, cfg: Config, paths: layout.RunPaths
) -> tuple[int, list[str]]:
    """Add `galleries` to the first rows; returns the number of missing images, and the strips.

    Members of a run without shards have texts alone.
    As long as the page has less than PAGE_BYTES, images are data: URIs in the page. Those of the
    other clusters go to strips, which browsers load when needed.
    """
    shown = rows[: cfg.max_clusters]
    _add_members(shown, cfg, paths)
    if not inputs.has_shards(run.embedded):
        for member in (m for row in shown for m in row["members"]):
            member |= {"picture": None, "tile": None}
        paths.folder("report/galleries").clear()
        return 0, []
    urls = {s["shard"]["stem"]: s["shard"]["url"] for s in run.embedded["shards"]}
    reader = thumbnails.Reader(run.embedded["config"]["max_image_pixels"], cfg.thumbnail)
    left, strips = PAGE_BYTES - FIXED_BYTES - CLUSTER_BYTES * len(shown), []
    folder = paths.folder("report/galleries")
    folder.clear()
    for start in range(0, len(shown), AT_ONCE):
        some = shown[start : start + AT_ONCE]
        places = [
            thumbnails.Place(urls[m["shard"]], m["tar_offset"], m["tar_size"])
            for row in some
            for m in row["members"]
        ]
        images = iter(reader.images(places))
        for row in some:
            own = [next(images) for _ in row["members"]]
            left -= sum(len(image) * 4 // 3 for image in own if image)  # in base64
            name = f"{row['id']}.webp" if left < 0 and any(own) else None
            if name:
                strip = thumbnails.strip(own, sum(cfg.counts.values()), cfg.thumbnail)
                storage.write_bytes(folder.file(name), strip)
                strips.append(name)
            for tile, (member, image) in enumerate(zip(row["members"], own, strict=True)):
                uri = image and (
                    f"galleries/{name}" if name else thumbnails.data_uri("image/webp", image)
                )
                member |= {"picture": uri, "tile": tile if name else None}
    return reader.warn_missing(), strips


def _add_members(shown: list[Facts], cfg: Config, paths: layout.RunPaths) -> None:
    """Add `members` to each row, and `galleries` by kind. No member is shown twice."""
    table = tables.read(paths.clusters.file("exemplars.parquet"))
    if "kind" not in table.column_names:
        raise UserError(
            f"{paths.root}: clusters/ is of an earlier version: delete clusters/manifest.json and "
            "run `ratecluster run` again"
        )
    table = table.sort_by([("cluster_id", "ascending"), ("rank", "ascending")])
    ranked: dict[tuple[int, str], list[Facts]] = defaultdict(list)
    for member in table.to_pylist():
        ranked[member["cluster_id"], member["kind"]].append(member)
    for row in shown:
        seen: set[str] = set()
        row["galleries"], row["members"] = [], []
        for kind, count in cfg.counts.items():
            own = [m for m in ranked[row["id"], kind] if m["sample_id"] not in seen][:count]
            seen |= {m["sample_id"] for m in own}
            for member in own:
                member["text"] = cut(member["caption"] or member["key"], TEXT_BYTES)
                member["name"] = cut(member["sample_id"], TEXT_BYTES)
            row["members"] += own
            if own:
                row["galleries"].append({"kind": kind, "members": own})


def cut(text: Any, size: int) -> str:
    """The text, shortened to `size` bytes with an ellipsis."""
    data = str(text).encode("utf-8", "replace")
    if len(data) <= size:
        return data.decode()
    return data[: size - 3].decode("utf-8", "ignore").rstrip() + "…"
