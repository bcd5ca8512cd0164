"""Settings of write."""

from dataclasses import dataclass

from pipeline.artifacts import inputs, layout, outputs
from pipeline.runtime import config
from pipeline.runtime.config import setting
from pipeline.write import exclude_lists


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which files are written, and which samples are left out."""

    shards: bool = setting(
        True, "write labeled/*.tar too, where there are shards; false: only the labels Parquet"
    )
    exclude: tuple[str, ...] = setting(
        (),
        "lists of samples to leave out of labeled/: Parquet with sample_id, folders of it, .txt",
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "exclude", exclude_lists.urls_of(self.exclude))


def expected(
    cfg: Config,
    made: outputs.Manifests,
    paths: layout.RunPaths,
    lists: list[str] | None = None,
) -> outputs.ExpectedOutputs:
    """The labels of these captions; `lists`: the digests of the exclude lists, if known.

    UserError where an exclude list does not exist.
    """
    lists = digests(cfg) if lists is None else lists
    made_of = config.fingerprint(cfg, made["captions"]["fingerprint"], *lists)
    tars = cfg.shards and inputs.has_shards(made["embeddings"])
    stems = [s["shard"]["stem"] for s in made["embeddings"]["shards"]]
    files = {
        paths.labels: [f"{stem}.parquet" for stem in stems],
        paths.labeled: [f"{stem}.tar" for stem in stems if tars],
        paths.top: ["clusters.parquet", "levels.parquet", "run.json"],
    }
    return outputs.ExpectedOutputs("write", paths.labels, made_of, cfg, files)


def digests(cfg: Config) -> list[str]:
    """A digest of each exclude list, in the order of the setting."""
    return [exclude_lists.digest(url) for url in cfg.exclude]
