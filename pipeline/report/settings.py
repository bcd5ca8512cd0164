"""Settings of report."""

from dataclasses import dataclass

from pipeline.artifacts import layout, outputs
from pipeline.runtime import config
from pipeline.runtime.config import setting
from pipeline.runtime.errors import UserError

EDGES = 6  # pictures of borderline and of odd members per cluster, each
MOST_SIDE = 256  # pixels: a strip of all exemplars then fits into a WebP


@dataclass(frozen=True, kw_only=True)
class Config:
    """How much the page shows."""

    gallery: int = setting(
        12, "pictures of typical members per cluster, 24 at most; 0: no pictures"
    )
    max_clusters: int = setting(
        1000, "clusters with a gallery, largest first; the others are in the table"
    )
    thumbnail: int = setting(96, "pixels of a picture's longer side")

    def __post_init__(self) -> None:
        if self.gallery < 0 or self.max_clusters < 0:
            raise UserError("report.gallery, report.max_clusters: give 0 or more")
        if not 1 <= self.thumbnail <= MOST_SIDE:
            raise UserError(f"report.thumbnail = {self.thumbnail}: give 1 to {MOST_SIDE} pixels")

    @property
    def counts(self) -> dict[str, int]:
        """Pictures of each kind."""
        edges = EDGES if self.gallery else 0
        return {"typical": self.gallery, "borderline": edges, "odd": edges}


def expected(
    cfg: Config, made: outputs.Manifests, paths: layout.RunPaths
) -> outputs.ExpectedOutputs:
    """The page about what these manifests describe."""
    shown = ("clusters", "captions", "labels", "evaluation")
    made_of = config.fingerprint(cfg, [made.get(name, {}).get("fingerprint") for name in shown])
    return outputs.ExpectedOutputs(
        "report", paths.report, made_of, cfg, {paths.report: ["index.html"]}
    )
