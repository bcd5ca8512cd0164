"""Who takes part: the command of each, the Python it runs in, and where its embeddings end up."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.peers.materials import Model
from pipeline.store.listing import list_shards

HERE = Path(__file__).parent
Found = tuple[list[str], np.ndarray]  # keys, and the embeddings (n, dim) in their order


@dataclass(frozen=True)
class Task:
    """What is to be embedded, by which model, and how."""

    shards: Path
    suffix: str  # of the images
    model: Model
    threads: int  # of the model, and as many decode
    batch_size: int


@dataclass(frozen=True)
class Contender:
    """A way to embed the images of shards."""

    name: str
    venv: str | None  # None: this Python
    command: Callable[[Task, Path], list[str]]  # what follows the Python's name
    read: Callable[[Path], Iterator[Found]]  # the embeddings that the command left

    def python(self, venvs: Path) -> str:
        """Its interpreter; a virtual environment that is not there is made."""
        if self.venv is None:
            return sys.executable
        python = venvs / self.venv / "bin" / "python"
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", venvs / self.venv], check=True)
            wanted = HERE / f"{self.venv}.txt"
            subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", wanted], check=True)
        return str(python)


def ours(name: str, **settings: Any) -> Contender:
    """The project's own stage, by its command line. It uses all cores, whatever `task.threads`."""

    def command(task: Task, out: Path) -> list[str]:
        chosen = {
            "model": task.model.name,
            "pretrained": task.model.weights,
            "batch_size": task.batch_size,
            **settings,
        }
        sets = [word for key, value in chosen.items() for word in ("--set", f"embed.{key}={value}")]
        return ["-m", "jobs.embed", "--shards", str(task.shards), "--root", str(out), *sets]

    def read(out: Path) -> Iterator[Found]:
        for path in sorted((out / "embeddings").glob("*.parquet")):
            yield from _table(path)

    return Contender(name, None, command, read)


def _script(venv: str) -> Callable[[Task, Path], list[str]]:
    """The command of a script beside this one."""

    def command(task: Task, out: Path) -> list[str]:
        model = (task.model.name, task.model.weights, task.model.config or "")
        run = (task.suffix, task.batch_size, task.threads, out)
        return [str(word) for word in (HERE / f"{venv}.py", *model, *run, *_paths(task))]

    return command


def _clip_retrieval(task: Task, out: Path) -> list[str]:
    paths = _paths(task)
    options = {
        "input_dataset": paths[0] if len(paths) == 1 else "{" + ",".join(paths) + "}",
        "input_format": "webdataset",
        "output_folder": out,
        "clip_model": f"open_clip:{task.model.name}/{task.model.weights}",
        "batch_size": task.batch_size,
        "num_prepro_workers": task.threads,
        "wds_image_key": task.suffix,
        "enable_text": False,
        "use_jit": False,
    }
    words = [f"--{key}={value}" for key, value in options.items()]
    return [
        str(HERE / "clip_retrieval_inference.py"),
        str(task.model.config or ""),
        "inference",
        *words,
    ]


def _paths(task: Task) -> list[str]:
    return [str(Path(shard.url).absolute()) for shard in list_shards(str(task.shards))]


def _table(path: Path) -> Iterator[Found]:
    table = pq.read_table(path, columns=["key", "embedding"])
    if len(table):
        yield table["key"].to_pylist(), np.stack(table["embedding"].to_numpy())


def _npz(out: Path) -> Iterator[Found]:
    with np.load(f"{out}.npz", allow_pickle=False) as found:
        yield found["keys"].tolist(), found["rows"]


def _parquet(out: Path) -> Iterator[Found]:
    for path in sorted(out.glob("*.parquet")):
        yield from _table(path)


def _npy(out: Path) -> Iterator[Found]:
    for path in sorted((out / "metadata").glob("*.parquet")):
        keys = pq.read_table(path)["image_path"].to_pylist()
        part = path.stem.replace("metadata", "img_emb")
        yield keys, np.load(out / "img_emb" / f"{part}.npy", allow_pickle=False)


PEERS = [
    Contender("clip-retrieval", "clip_retrieval", _clip_retrieval, _npy),
    Contender("DataLoader loop", "torch_loop", _script("torch_loop"), _npz),
    Contender("Ray Data", "ray_data", _script("ray_data"), _parquet),
]
