"""The house stands: a module imports only from its own floor's list of floors below."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SAYINGS = {"errors", "reasons", "redaction"}  # which every room may use
JUDGES = {"metrics", "confusion"}  # which compare with ground truth
ALONE = SAYINGS | JUDGES | {"interrupt", "wording", "dataset_card", "mcr2"}  # of ours nothing
WORDS = {"wording", "ranking", "alt_texts"}  # each imports those before it
GROUND = ALONE - JUDGES | WORDS | {"cluster", "config", "console", "store", "vision", "progress"}
CORE = SAYINGS | {"artifacts", "config", "console", "mcr2", "store", "vision"}
TASKS = {"tasks", "text_encoding"}  # of the first floor: what more rooms than one do on Ray
FIRST = {
    "artifacts",
    "candidates",
    "cifar",
    "decoding",
    "sampling",
    "checkpoints",
    "assigning",
    "folding",
    "namer",
    "naming",
    "passes",
    "exclusion",
    *TASKS,
}
UNLIKE = {"artifacts", "candidates", "exclusion", "folding", "namer", "naming", "passes"}  # below
STAGES = {"pack", "embed", "train", "select_k", "caption", "write"}
VIEWS = {"evaluate", "report"}  # the only rooms that may see ground truth
PLANS = {"capacity", "plan"}
FLOORS = {  # room -> the rooms it may import; a room not named here fails the test
    **{room: set() for room in ALONE},
    **dict.fromkeys(("config", "store", "vision"), SAYINGS),
    "redaction": {"errors"},
    "cluster": {"errors"},
    "console": {"reasons", "redaction"},
    "artifacts": {"config", "console", "errors", "store"},
    "progress": {"config", "console", "errors", "interrupt"},
    "tasks": {"cluster", "progress"},
    "text_encoding": {"cluster", "progress", "vision"},
    **dict.fromkeys(FIRST - UNLIKE - TASKS, CORE),
    **dict.fromkeys(STAGES, GROUND | FIRST),
    "page": CORE | {"pictures"},
    "pictures": CORE,
    "folding": {"store"},
    "ranking": {"wording"},
    "alt_texts": {"wording", "ranking"},
    "candidates": CORE | {"ranking"},
    "namer": SAYINGS | {"config", "wording"},
    "naming": CORE | {"folding", "namer", "pictures", "progress", "wording"},
    "wordnet": {"wording"},
    "caption_quality": CORE | {"candidates", "ranking", "wording", "wordnet"},  # sees the truth
    "passes": CORE | {"assigning", "folding", "progress", "tasks"},
    "exclusion": CORE | {"tasks"},
    "findings": SAYINGS | {"store"},
    "tar_contract": {"artifacts", "store"},
    "row_contract": {"artifacts", "findings", "store"},
    "verify": CORE | {"findings", "progress", "row_contract", "tar_contract", "tasks"},
    "evaluate": GROUND - {"cluster"} | {"artifacts", "caption_quality"} | JUDGES,
    "report": GROUND - {"cluster"} | {"artifacts", "page"},
    "status": GROUND | FIRST | STAGES | VIEWS,
    "rehearsing": CORE | FIRST | STAGES,
    "trial": CORE | FIRST | STAGES | {"rehearsing"},
    "capacity": SAYINGS | {"config", "store", "trial"} | FIRST | STAGES,
    "plan": SAYINGS | {"capacity", "config", "store", "trial"},
    "init": CORE | {"embed", "pack"},
    "manual": {"cluster", "config", "console"},
    "options": GROUND | FIRST | {"manual"},
    "use": GROUND - {"cluster"} | FIRST | {"manual", "options", "pictures", "embed", "write"},
    "river": GROUND | FIRST | STAGES | VIEWS | {"manual", "options"},
    "commands": GROUND
    | FIRST
    | STAGES
    | {"river", "init", "status", "verify", "capacity", "plan", "manual", "options", "use"},
    "cli": SAYINGS | {"commands", "console", "manual", "options"},  # the door
    "__main__": {"cli", "use"},
}
RAY = {"cluster", "embed", "train", *TASKS}  # the only rooms with a door to Ray
MODULES = [p for p in (ROOT / "pipeline").rglob("*.py") if p.name != "__init__.py"]


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_from_floors_below(path):
    room = path.relative_to(ROOT / "pipeline").parts[0].removesuffix(".py")
    names = imports(path)
    rooms = {n.split(".")[1] for n in names if n.startswith("pipeline.")} - {room}
    assert rooms <= FLOORS[room], f"{room} may not import {rooms - FLOORS[room]}"
    assert room in RAY or not any(n.split(".")[0] == "ray" for n in names), f"{room} imports ray"


def test_only_the_commands_of_use_know_the_options():
    """Since options know the settings of use."""
    users = {
        p.name
        for p in MODULES
        if p.parent.name == "use" and any("options" in n for n in imports(p))
    }
    assert users == {"searching.py", "curating.py", "exporting.py"}


def test_ground_truth_stays_upstairs():
    """No algorithm can score itself: only evaluate may import the judges."""
    for judge in JUDGES:
        assert {room for room, below in FLOORS.items() if judge in below} == {"evaluate"}
