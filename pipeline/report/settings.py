"""Settings of report."""

from dataclasses import dataclass

from pipeline.artifacts import layout, outputs
from pipeline.runtime import config
from pipeline.runtime.config import setting
from pipeline.runtime.errors import UserError

EDGES = 6  # images of borderline and of odd members per cluster, each
MOST_SIDE = 256  # pixels; so a strip of all exemplars fits into a WebP


@dataclass(frozen=True, kw_only=True)
class Config:
    """What the page shows."""

    gallery: int = setting(12, "images of typical members per cluster, 24 at most; 0: no images")
    max_clusters: int = setting(1000, "clusters with a gallery, largest first; the table lists all")
    thumbnail: int = setting(96, "longer side of an image, in pixels")

    def __post_init__(self) -> None:
        if self.gallery < 0 or self.max_clusters < 0:
            raise UserError("report.gallery, report.max_clusters: give 0 or more")
        if not 1 <= self.thumbnail <= MOST_SIDE:
            raise UserError(f"report.thumbnail = {self.thumbnail}: give 1 to {MOST_SIDE} pixels")

    @property
    def counts(self) -> dict[str, int]:
        """Images per cluster of each kind."""
        edges = EDGES if self.gallery else 0
        return {"typical": self.gallery, "borderline": edges, "odd": edges}


def expected(
    cfg: Config, made: outputs.Manifests, paths: layout.RunPaths
) -> outputs.ExpectedOutputs:
    """The page of a run with these manifests."""
    shown = ("clusters", "captions", "labels", "evaluation")
    made_of = config.fingerprint(cfg, [made.get(name, {}).get("fingerprint") for name in shown])
    strips = (paths.report.peek() or {}).get("strips", [])  # images that the page loads later
    files = {paths.report: ["index.html"], paths.folder("report/galleries"): strips}
    return outputs.ExpectedOutputs("report", paths.report, made_of, cfg, files)
