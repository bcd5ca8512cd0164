"""What a wheel must carry: code, assets, templates, job configs."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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
