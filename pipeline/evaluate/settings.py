"""Settings of evaluate."""

from dataclasses import dataclass
from typing import Any

from pipeline.artifacts import layout, outputs
from pipeline.runtime import config
from pipeline.runtime.config import setting
from pipeline.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config:
    """What the clusters are compared with."""

    label: str = setting(
        "",
        "json field with the true class, or cls for the .cls files; '': `run` does not evaluate, "
        "`evaluate` reads label, else cls",
    )
    baseline: bool = setting(True, "also score k-means on the same embeddings")


FILE = "evaluation.json"
CLS = "cls"  # the files with classes, as a field
SHOWN_FIELDS = 20  # listed in a message


def find_label(cfg: Config, paths: layout.RunPaths) -> str:
    """The json field with the true class, or CLS; UserError if no embedded sample has it."""
    embedded = paths.embeddings.manifest()
    field = cfg.label or ("label" if "label" in embedded["columns"] else CLS)
    if field not in embedded["columns"] and not (field == CLS and embedded.get("classes")):
        raise _no_label(field, embedded)
    return field


def expected(
    cfg: Config, made: outputs.Manifests, paths: layout.RunPaths
) -> outputs.ExpectedOutputs:
    """evaluation.json of these clusters and captions."""
    captioned = made.get("captions", {}).get("fingerprint")
    made_of = config.fingerprint(cfg, made["clusters"]["fingerprint"], captioned)
    return outputs.ExpectedOutputs("evaluate", paths.top, made_of, cfg, {}, FILE)


def _no_label(field: str, embedded: dict[str, Any]) -> UserError:
    there = [repr(name) for name in embedded["columns"]]
    more = ", …" if len(there) > SHOWN_FIELDS else ""
    listed = ", ".join(there[:SHOWN_FIELDS]) + more if there else "no json fields at all"
    return UserError(
        f"no embedded sample has a class in its json field {field!r}: set evaluate.label to the "
        f"field that holds it; there are {listed}"
    )
