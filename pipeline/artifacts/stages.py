"""The one table of stages: their order, their settings, and the folders and files they leave.

`run`, `status`, `verify`, `write`, `report`, `assign` and the command line go by it. A new stage is
one entry here and one package with two modules:

settings   Config                          its section of the configuration
           expected(cfg, manifests, paths) the ExpectedOutputs; imports neither torch nor Ray
           check(sections)                 optional: UserError before any stage has run
stage      run(cfg, paths) -> dict         does what is missing; returns the manifest
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a run."""

    name: str  # also of its section in the configuration
    package: str
    folder: str  # below the root; holds its manifest.json, which is written last
    files: tuple[str, ...] = ()  # of the folder
    folders: tuple[str, ...] = ()  # of the folder, with files of which there may be none
    parts: Mapping[str, str] = field(default_factory=dict)  # folder -> suffix; a file per shard
    facts: tuple[str, ...] = ()  # keys that the manifest must have; none: verify does not read it
    unit: str = ""  # what a rerun resumes from: parts, steps
    version: tuple[str, ...] = ()  # in its fingerprint: grows when its tables get other columns
    asked_by: str = ""  # the setting without which `run` skips the stage

    @property
    def command(self) -> str:
        """The command that runs it."""
        return self.name.replace("_", "-")

    @property
    def settings(self) -> Any:
        """The module with its Config."""
        return import_module(f"{self.package}.settings")

    @property
    def stage(self) -> Any:
        """The module with its `run`; importing it may take seconds."""
        return import_module(f"{self.package}.stage")


STAGES = (
    Stage(
        name="embed",
        package="pipeline.embed",
        folder="embeddings",
        parts={"embeddings": ".parquet", "rejects": ".parquet"},
        facts=("config", "encoders", "samples", "embedded", "rejected", "columns", "shards"),
        unit="parts",
    ),
    Stage(
        name="train",
        package="pipeline.train",
        folder="network",
        files=("network.safetensors", "network.json", "history.parquet", "sample.parquet"),
        facts=("upstream", "config"),
        unit="steps",
    ),
    Stage(
        name="select_k",
        package="pipeline.select_k",
        folder="clusters",
        files=(
            *("curve.parquet", "tree.parquet", "levels.parquet"),
            *("prototypes.parquet", "exemplars.parquet"),
        ),
        parts={"assignments": ".parquet"},
        facts=("upstream", "config", "samples", "sizes", "levels", "groups"),
        version=("levels",),
    ),
    Stage(
        name="caption",
        package="pipeline.caption",
        folder="captions",
        files=("captions.parquet", "voted.parquet", "levels.parquet", "candidates.parquet"),
        facts=("upstream", "config", "captions"),
    ),
    Stage(
        name="write",
        package="pipeline.write",
        folder="labels",
        parts={"labels": ".parquet", "labeled": ".tar"},
        facts=("upstream", "config", "labels"),
        unit="parts",
    ),
    Stage(
        name="evaluate",
        package="pipeline.evaluate",
        folder="evaluation",  # not a folder: evaluation.json is its only file and its manifest
        asked_by="label",
    ),
    Stage(
        name="report",
        package="pipeline.report",
        folder="report",
        files=("index.html",),
        folders=("galleries",),
    ),
)


def named(name: str) -> Stage:
    """The stage of that name."""
    return next(stage for stage in STAGES if stage.name == name)


def chain() -> list[Stage]:
    """The stages whose manifest has the fingerprint of the stage before as `upstream`."""
    return [stage for stage in STAGES if stage.facts]


def chain_to(last: str) -> list[Stage]:
    """The stages of the chain up to and including the stage of that name."""
    return chain()[: chain().index(named(last)) + 1]
