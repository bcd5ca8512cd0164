"""Imports point down: a package imports only the packages that its line of FLOORS names."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BASE = {"runtime", "mcr2", "store", "artifacts", "vision"}
STAGES = {"embed", "train", "select_k", "caption", "write"}
FLOORS = {  # package or module of pipeline/ -> the packages it may import
    "runtime": set(),
    "mcr2": set(),
    "store": {"runtime"},
    "artifacts": {"runtime", "store"},
    "vision": {"runtime", "store", "artifacts"},
    **dict.fromkeys(STAGES, BASE),  # never each other
    "prepare": BASE | STAGES,
    "evaluate": BASE | STAGES,
    "report": BASE | STAGES | {"evaluate", "prepare"},
    "explore": BASE | STAGES | {"evaluate", "prepare"},
    "ops": BASE | STAGES | {"evaluate", "prepare", "report", "explore"},
    "cli": BASE | STAGES | {"evaluate", "prepare", "report", "explore", "ops"},
    "__main__": {"cli"},
}
RAY = {  # the only modules that import Ray
    "runtime/cluster.py",
    "runtime/tasks.py",
    "vision/text_encoding.py",
    "embed/stage.py",
    "train/stage.py",
}
TRUTH = {"pipeline.evaluate.metrics", "pipeline.evaluate.confusion"}  # compare with labels
LONGEST = 350  # lines of a module
MODULES = sorted((ROOT / "pipeline").rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT / "pipeline").as_posix()


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, everywhere: bool = True) -> set[str]:
    """Names that a module imports; without `everywhere` those that its own import needs."""
    names, todo = set(), [ast.parse(path.read_text())]
    while todo:
        for node in ast.iter_child_nodes(todo.pop()):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
            if everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                todo.append(node)
    return names


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_a_module_imports_only_from_the_floors_below(path):
    if path.parent == ROOT / "pipeline" and path.stem not in FLOORS:
        pytest.skip("the public API stands on top of all")
    package = path.relative_to(ROOT / "pipeline").parts[0].removesuffix(".py")
    names = imports(path)
    packages = {n.split(".")[1] for n in names if n.startswith("pipeline.")} - {package}
    assert packages <= FLOORS[package], f"{package} imports {packages - FLOORS[package]}"
    has_ray = any(n.split(".")[0] == "ray" for n in names)
    assert relative(path) in RAY or not has_ray, f"{relative(path)} imports ray"
    if not relative(path).startswith("evaluate/"):
        assert not {n for n in names if n in TRUTH or n.rpartition(".")[0] in TRUTH}


def test_imports_have_no_circles():
    known = {name_of(path) for path in MODULES}
    graph = {}
    for path in MODULES:
        needed = {n if n in known else n.rpartition(".")[0] for n in imports(path, False)}
        graph[name_of(path)] = needed & known - {name_of(path)}
    assert len(list(TopologicalSorter(graph).static_order())) == len(known)


def test_every_package_has_its_line_and_no_module_is_too_long():
    top = {p.name for p in (ROOT / "pipeline").iterdir() if (p / "__init__.py").is_file()}
    assert top == FLOORS.keys() - {"__main__"} and len(top) == 16
    long = {relative(p): n for p in MODULES if (n := p.read_text().count("\n")) > LONGEST}
    assert not long, long
