"""Settings of select_k."""

import logging
import math
from dataclasses import dataclass, replace

from pipeline.artifacts import layout, outputs, stages
from pipeline.runtime import config
from pipeline.runtime.config import setting
from pipeline.runtime.errors import UserError

log = logging.getLogger(__name__)
DRIVER_TIMES = 4  # copies of the statistics in the driver: the sum, a summand, the tree's; measured


@dataclass(frozen=True, kw_only=True)
class Config:
    """How k is chosen and samples are assigned. 0 means a fitted value if the help says "fit"."""

    k: int = setting(
        0, "clusters; 0: chosen by coding length, modularity, stability and silhouette"
    )
    k_min: int = setting(2, "smallest number of clusters to choose from")
    k_max: int = setting(
        0, "largest number of clusters to choose from; 0: 2√N for N samples, up to 1000"
    )
    leaves: int = setting(0, "small groups that clusters are merged from; 0: 2 × k_max")
    eps_sq: float = setting(0.1, "ε², squared distortion allowed per unit-norm feature")
    statistics_bytes: int = setting(
        2**30, "most memory of the leaves' statistics, in bytes: dimensions² × 8 per leaf"
    )
    seed: int = setting(0, "seed of the cuts and the resamples")

    def __post_init__(self) -> None:
        for name in ("k", "k_max", "leaves"):
            if getattr(self, name) < 0:
                raise UserError(f"select_k.{name} = {getattr(self, name)}: give 0 (fit) or more")
        for name in ("k_min", "eps_sq", "statistics_bytes"):
            if getattr(self, name) <= 0:
                raise UserError(f"select_k.{name} = {getattr(self, name)}: give a positive number")
        if self.k_max and self.k_max < self.k_min:
            raise UserError(f"select_k.k_max = {self.k_max} is below select_k.k_min = {self.k_min}")


def fit_settings(cfg: Config, samples: int, landmarks: int, dim: int) -> Config:
    """The settings for N samples and m landmarks of `dim` dimensions.

    UserError if explicit values would take more memory than `cfg.statistics_bytes`.
    """
    if cfg.k > landmarks:
        raise UserError(
            f"select_k.k = {cfg.k} is more than the {landmarks} samples it is chosen from: give a "
            "smaller k, or raise train.landmarks if there are more samples"
        )
    k_max = min(cfg.k_max or min(1000, math.ceil(2 * math.sqrt(samples))), landmarks)
    k_min = min(cfg.k_min, k_max)
    most = cfg.statistics_bytes // (8 * dim**2)
    free = min(2 * k_max, landmarks // 4)
    leaves = min(max(cfg.leaves or min(free, most), cfg.k, k_min), landmarks)
    if leaves > most:
        need = 8 * leaves * dim**2
        raise UserError(
            f"select_k: the statistics of {leaves:,} leaves of {dim:,} dimensions take "
            f"{need / 2**30:.1f} GiB in every task and {DRIVER_TIMES} times that in the driver: "
            f"lower select_k.leaves (k, k_min) or train.feature_dim, or set "
            f"select_k.statistics_bytes = {need} if there is enough memory"
        )
    if not cfg.leaves and leaves < free:
        log.warning(
            "select_k: %d leaves instead of %d, and k at most as many: with %d dimensions, more "
            "would exceed select_k.statistics_bytes = %d",
            *(leaves, free, dim, cfg.statistics_bytes),
        )
    return replace(cfg, k_max=k_max, k_min=k_min, leaves=leaves)


def expected(
    cfg: Config, made: outputs.Manifests, paths: layout.RunPaths
) -> outputs.ExpectedOutputs:
    """The outputs of clustering with this network."""
    stage = stages.named("select_k")
    made_of = config.fingerprint(cfg, made["network"]["fingerprint"], *stage.version)
    parts = [f"{s['shard']['stem']}.parquet" for s in made["embeddings"]["shards"]]
    files = {paths.clusters: stage.files, paths.assignments: parts}
    return outputs.ExpectedOutputs("select_k", paths.clusters, made_of, cfg, files)
