"""What a wheel must carry: code, assets, templates, job configs."""

import re
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_wheel_has_every_asset(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir"]
    subprocess.run([*command, str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("ratecluster-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        str(path.relative_to(ROOT))
        for path in (*(ROOT / "pipeline").rglob("*"), *(ROOT / "jobs").rglob("*.toml"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert len(wanted) > 20
    assert wanted <= names, wanted - names
    assert not any(name.startswith(("tests", "benchmarks", "tools")) for name in names)


def test_every_dependency_is_imported():
    """Of those that a plain installation brings. `make` adds the extra cpu."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [re.split(r"[\[><=;]", line)[0] for line in project["dependencies"]]
    names: dict[str, set[str]] = {}
    for name, packages in packages_distributions().items():
        for package in packages:
            names.setdefault(re.sub(r"[-_.]+", "-", package).lower(), set()).add(name)
    imported = set()
    for folder in ("pipeline", "jobs", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            imported |= set(re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(), re.M))
    unused = [
        package
        for package in required
        if not names.get(re.sub(r"[-_.]+", "-", package).lower(), {package}) & imported
    ]
    assert len(required) > 15 and not unused, unused
