"""mkdocs hook: builds the reference pages from the code when the documentation is built.

commands    the help page of every command
files       folders, tables and columns, with their comments in `artifacts/schemas.py`
settings    every section and key with unit and default
"""

import ast
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from pipeline.artifacts import layout, schemas
from pipeline.cli import main as cli
from pipeline.cli import options
from pipeline.runtime import config
from pipeline.runtime.reject_reasons import Reason

ROOT = Path(__file__).parents[1]
WRITTEN = "\n<!-- made by tools/docs_hook.py -->\n"
TABLES = {  # file -> its schema, and what that is called in artifacts/schemas.py
    "labels/{stem}.parquet": (schemas.labels_schema({}, schemas.MOST_LEVELS), "LABEL"),
    "clusters.parquet": (schemas.CLUSTERS, "CLUSTERS"),
    "levels.parquet": (schemas.LEVELS, "LEVELS"),
    "embeddings/{stem}.parquet": (schemas.embeddings_schema(512), "embeddings_schema"),
    "rejects/{stem}.parquet": (schemas.REJECTS, "REJECTS"),
    "assignments/{stem}.parquet": (schemas.ASSIGNMENTS, "ASSIGNMENTS"),
    "captions/captions.parquet": (schemas.CAPTIONS, "CAPTIONS"),
    "captions/voted.parquet": (schemas.CAPTIONS, "CAPTIONS"),
    "captions/levels.parquet": (schemas.LEVEL_CAPTIONS, "LEVEL_CAPTIONS"),
    "captions/candidates.parquet": (schemas.candidates_schema(512), "candidates_schema"),
    "exclude/{stem}.parquet": (schemas.EXCLUDED, "EXCLUDED"),
    "clusters/curve.parquet": (schemas.CURVE, "CURVE"),
    "clusters/tree.parquet": (schemas.TREE, "TREE"),
    "clusters/levels.parquet": (schemas.levels_schema(128), "levels_schema"),
    "clusters/prototypes.parquet": (schemas.prototypes_schema(128), "prototypes_schema"),
    "clusters/exemplars.parquet": (schemas.EXEMPLARS, "EXEMPLARS"),
    "network/history.parquet": (schemas.HISTORY, "HISTORY"),
    "network/sample.parquet": (schemas.sample_schema(512, 128), "sample_schema"),
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for name, make in PAGES.items():
        files.append(File.generated(config, name, content=make()))
    return files


def commands() -> str:
    """The help page of every command."""
    group: Any = typer.main.get_command(cli.app)
    context = group.make_context("ratecluster", ["status"], resilient_parsing=True)
    context.max_content_width = 80
    parts = ["# Commands", WRITTEN, _block(group.get_help(context))]
    for name, command in group.commands.items():
        own = command.make_context(name, [], parent=context, resilient_parsing=True)
        parts += [f"## ratecluster {name}", _block(command.get_help(own))]
    return "\n\n".join(parts)


def _block(text: str) -> str:
    return f"```text\n{text}\n```"


def settings() -> str:
    """A table for every section."""
    parts = ["# Settings", WRITTEN]
    parts.append(
        "Settings come from a TOML file (`--config`), with one table per section. "
        "`--set section.key=value` overrides the file. "
        "`ratecluster init` writes such a file for your shards."
    )
    for section, kind in options.KINDS.items():
        rows = config.describe({section: kind})
        lines = [f"| `{name}` | {_cell(help)} | `{default}` |" for name, default, help in rows]
        parts += [
            f"## {section}",
            "\n".join(["| setting | meaning | default |", "|---|---|---|", *lines]),
        ]
    return "\n\n".join(parts)


def files() -> str:
    """Every folder of a run, every table's columns, every reason."""
    parts = ["# Files and columns", WRITTEN, "## Folders of a run", _folders()]
    parts.append(
        "`{stem}` is the name of the input shard without its suffix. A folder is finished when it "
        "has a `manifest.json`. It is written last and records the inputs and settings of the "
        "stage. Each Parquet file has facts of its own in its footer."
    )
    meanings = _comments(
        (ROOT / "pipeline" / "artifacts" / "schemas.py").read_text(encoding="utf-8")
    )
    for place, (schema, name) in TABLES.items():
        every = {
            column: meaning
            for own in reversed(meanings.values())
            for column, meaning in own.items()
        }
        comments = every | meanings[name]
        rows = [f"| `{f.name}` | `{_type(f.type)}` | {_cell(comments[f.name])} |" for f in schema]
        parts += [f"## {place}", "\n".join(["| column | type | meaning |", "|---|---|---|", *rows])]
        if place.startswith("embeddings/"):
            parts.append(
                "With `embed.also`, `embedding_2`, `embedding_3`, … follow: the vectors of the "
                "further encoders, or of the further columns of `embeddings.columns`, "
                "L2-normalised. The manifest and the footer say in `encoders` "
                "which model made which column."
            )
        if place.startswith("labels/"):
            parts.append(
                "After these come all columns of the samples' json. Each keeps its name, or is "
                "called `input_…` where that name is taken. Its type is the same in all files."
            )
    parts += ["## Reasons for rejecting a sample", _reasons()]
    return "\n\n".join(parts)


def _folders() -> str:
    kinds = (property, layout._Below)
    named = [n for n in vars(layout.RunPaths).items() if isinstance(n[1], kinds)]
    paths = layout.RunPaths("my-run")
    rows = []
    for name, value in named:
        place = getattr(paths, name)
        place = place if isinstance(place, str) else f"{place.url}/"
        rows.append(f"| `{place}` | {_cell((value.__doc__ or '').strip())} |")
    return "\n".join(["| folder or file | stage or contents |", "|---|---|", *rows])


def _reasons() -> str:
    source = (ROOT / "pipeline" / "runtime" / "reject_reasons.py").read_text(encoding="utf-8")
    comments = dict(re.findall(r'^    \w+ = "(\w+)"(?:  # (.+))?$', source, re.MULTILINE))
    rows = [f"| `{reason.value}` | {_cell(comments[reason.value])} |" for reason in Reason]
    return "\n".join(["| code | the sample |", "|---|---|", *rows])


def _comments(source: str) -> dict[str, dict[str, str]]:
    """For every schema of a module, or function that makes one: column -> the comment beside it."""
    lines, found = source.splitlines(), {}
    for top in ast.parse(source).body:
        name = top.name if isinstance(top, ast.FunctionDef) else ast.unparse(top).split(" = ")[0]
        pairs = [n for n in ast.walk(top) if isinstance(n, ast.Tuple) and len(n.elts) == 2]
        comments = {
            str(pair.elts[0].value): lines[pair.lineno - 1].partition("  # ")[2]
            for pair in pairs
            if isinstance(pair.elts[0], ast.Constant)
        }
        found[name] = {column: comment for column, comment in comments.items() if comment}
    return found


def _type(kind: pa.DataType) -> str:
    return str(kind).replace("halffloat", "float16").replace("fixed_size_list", "list")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("{", "&#123;")


PAGES = {
    "reference/commands.md": commands,
    "reference/files.md": files,
    "reference/settings.md": settings,
}
