"""A run that is being checked: its manifests and tables, and the violations found so far."""

from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.artifacts import layout
from pipeline.artifacts.outputs import Manifests
from pipeline.ops.verify.violations import Violations, open_part, read_part
from pipeline.store import storage


@dataclass
class RunCheck:
    """A run, what its manifests and parts say, and its violations."""

    paths: layout.RunPaths
    found: Violations = field(default_factory=Violations)
    made: Manifests = field(default_factory=dict)  # manifests up to the first gap
    sizes: list[int] = field(default_factory=list)  # samples of each cluster in assignments/
    dim: int = 1  # of texts, and of images by embed.model

    def manifest(self, name: str) -> dict[str, Any] | None:
        """The manifest of a folder; None if there is none, or if it is damaged."""
        try:
            return self.paths.folder(name).peek()
        except storage.DamagedError as error:
            self.found.add(f"{name}/manifest.json", str(error))
            return None

    def rows(self, name: str, schema: pa.Schema) -> list[dict[str, Any]]:
        """The rows of a table; none, and a violation, if it has another schema."""
        file = open_part(self.paths.top.file(name), name, self.found)
        table = read_part(file, schema, name, self.found)
        return [] if table is None else table.to_pylist()
