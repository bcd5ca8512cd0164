"""Settings of report."""

from dataclasses import dataclass

from pipeline.runtime.config import setting
from pipeline.runtime.errors import UserError

MOST_SIDE = 256  # pixels: a strip of all exemplars then fits into a WebP


@dataclass(frozen=True, kw_only=True)
class Config:
    """How much the page shows."""

    gallery: int = setting(12, "pictures of typical members per cluster, 24 at most; 0: none")
    edges: int = setting(6, "pictures of borderline and of odd members, each 12 at most; 0: none")
    max_clusters: int = setting(
        1000, "clusters with a gallery, largest first; the others are in the table"
    )
    thumbnail: int = setting(96, "pixels of a picture's longer side")

    def __post_init__(self) -> None:
        if self.gallery < 0 or self.edges < 0 or self.max_clusters < 0:
            raise UserError("report.gallery, report.edges, report.max_clusters: give 0 or more")
        if not 1 <= self.thumbnail <= MOST_SIDE:
            raise UserError(f"report.thumbnail = {self.thumbnail}: give 1 to {MOST_SIDE} pixels")

    @property
    def counts(self) -> dict[str, int]:
        """Pictures of each kind."""
        return {"typical": self.gallery, "borderline": self.edges, "odd": self.edges}
