"""Manifests: what a stage left, what it should leave, and what it was made from."""

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

    UserError, naming the command to run, where one is not there or was made from something that
    has been made again since.
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
                f"{paths.root}: what {name} was made from has been made again since; run "
                f"`ratecluster {command}` again first"
            )
        found[name], before = manifest, manifest["fingerprint"]
        if name == last:
            return found
    raise AssertionError(last)


@dataclass(frozen=True)
class ExpectedOutputs:
    """What a stage is to leave: `made_of` is its fingerprint, `files` are all of its files."""

    stage: str
    folder: Folder
    made_of: str
    cfg: Any
    files: Mapping[Folder, Collection[str]]
    manifest: str = MANIFEST

    def compare(self) -> tuple[dict[str, Any] | None, str]:
        """The manifest that is there, and why it is not the one wanted: "" where it is.

        Whatever made it; None, and no reason, where the stage has not finished.
        """
        manifest = self.folder.peek(self.manifest)
        if manifest is None:
            return None, ""
        if manifest["fingerprint"] == self.made_of:
            missing = [f.file(n) for f, names in self.files.items() for n in set(names) - f.names()]
            return manifest, f"{len(missing)} files are missing: {min(missing)}" if missing else ""
        made_with = manifest.get("config", {})
        told = made_with and self.cfg is not None  # what has no settings is made of its inputs
        differs = config.differences(self.stage, made_with, self.cfg) if told else ""
        return manifest, differs or "what it reads has changed"

    def if_done(self) -> dict[str, Any] | None:
        """The manifest of a stage that is done as wanted; else None, and why is logged."""
        manifest, reason = self.compare()
        if reason:
            log.info("%s: made again, %s", self.stage, reason)
        elif manifest:
            console.log_already_done(log, self.stage, self.folder.url)
        return None if reason else manifest

    def parts(self, folder: Folder) -> set[str]:
        """Stems of the parts in one of its folders that were made as wanted, with all their files.

        A part says what made it in its footer.
        """
        stems = {n.removesuffix(".parquet") for n in self.files[folder] if n.endswith(".parquet")}
        known = part_facts(folder, stems)
        done = {stem for stem, facts in known.items() if facts.get("made_of") == self.made_of}
        for other, names in self.files.items():
            done -= {name.rpartition(".")[0] for name in set(names) - other.names()}
        return done


def part_facts(folder: Folder, stems: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The facts in the footer of those of the parts that are there."""
    there = folder.names()
    found = [stem for stem in stems if f"{stem}.parquet" in there]
    with ThreadPoolExecutor(32) as pool:
        facts = pool.map(lambda stem: tables.facts(folder.file(f"{stem}.parquet")), found)
        return dict(zip(found, facts, strict=True))


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that results depend on, by name."""
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
