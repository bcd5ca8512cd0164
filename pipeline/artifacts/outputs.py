"""Manifests: the outputs that a stage has left, and those that it is expected to leave."""

import logging
import platform
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from pipeline.artifacts import stages
from pipeline.artifacts.layout import RunPaths
from pipeline.runtime import config, console
from pipeline.runtime.errors import UserError
from pipeline.store import tables
from pipeline.store.storage import MANIFEST, Folder

log = logging.getLogger(__name__)
LIBRARIES = ("ratecluster", "ray", "torch", "open_clip_torch", "pyarrow", "numpy")
Manifests = dict[str, dict[str, Any]]  # folder name -> manifest


def upstream(paths: "RunPaths", last: str) -> Manifests:
    """The manifests of the folders up to `last`, each made from the one before.

    UserError with the command to run, if a stage has not finished or its input was replaced since.
    """
    found: Manifests = {}
    before = ""
    for stage in stages.chain():
        name, command = stage.folder, stage.command
        manifest = paths.folder(name).peek()
        if manifest is None:
            raise UserError(
                f"{paths.root}: {command} has not finished there; run `ratecluster {command}` first"
            )
        if found and manifest["upstream"] != before:
            raise UserError(
                f"{paths.root}: the input of {name} has changed since; run `ratecluster {command}` "
                "again first"
            )
        found[name], before = manifest, manifest["fingerprint"]
        if name == last:
            return found
    raise AssertionError(last)


@dataclass(frozen=True)
class ExpectedOutputs:
    """The outputs that a stage should leave: all `files`, with the fingerprint `made_of`."""

    stage: str
    folder: Folder
    made_of: str
    cfg: Any
    files: Mapping[Folder, Collection[str]]
    manifest: str = MANIFEST

    def compare(self) -> tuple[dict[str, Any] | None, str]:
        """The manifest on disk, and the reason why it is not the expected one, "" if it is.

        (None, "") if the stage has not finished.
        """
        manifest = self.folder.peek(self.manifest)
        if manifest is None:
            return None, ""
        if manifest["fingerprint"] == self.made_of:
            missing = [f.file(n) for f, names in self.files.items() for n in set(names) - f.names()]
            return manifest, f"{len(missing)} files are missing: {min(missing)}" if missing else ""
        made_with = manifest.get("config", {})
        known = made_with and self.cfg is not None  # some outputs depend on no settings
        differs = config.differences(self.stage, made_with, self.cfg) if known else ""
        return manifest, differs or "its input has changed"

    def if_done(self) -> dict[str, Any] | None:
        """The manifest if the stage is done as expected; else None, and the reason is logged."""
        manifest, reason = self.compare()
        if reason:
            log.info("%s: runs again: %s", self.stage, reason)
        elif manifest:
            console.log_already_done(log, self.stage, self.folder.url)
        return None if reason else manifest

    def parts(self, folder: Folder) -> set[str]:
        """Stems of the finished parts in one of its folders: all files are there.

        The fingerprint of a part is in its footer.
        """
        stems = {n.removesuffix(".parquet") for n in self.files[folder] if n.endswith(".parquet")}
        known = part_facts(folder, stems)
        done = {stem for stem, facts in known.items() if facts.get("made_of") == self.made_of}
        for other, names in self.files.items():
            done -= {name.rpartition(".")[0] for name in set(names) - other.names()}
        return done


def part_facts(folder: Folder, stems: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The facts in the footers of the parts, by stem; missing parts are left out."""
    there = folder.names()
    found = [stem for stem in stems if f"{stem}.parquet" in there]
    with ThreadPoolExecutor(32) as pool:
        facts = pool.map(lambda stem: tables.facts(folder.file(f"{stem}.parquet")), found)
        return dict(zip(found, facts, strict=True))


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that results depend on, by name."""
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
