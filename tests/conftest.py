"""One Ray for all tests; two tiny shards of real images; one finished run of them."""

import io
import json
import logging
import signal
from pathlib import Path

import pytest
import ray
from PIL import Image

from pipeline.cli import main as cli
from pipeline.store.shard_writer import ShardWriter
from pipeline.store.shards import ShardReader

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "pipeline" / "vision" / "assets"
BUNDLED = ROOT / "examples" / "noto-emoji"
TINY = 60  # samples of each tiny shard
WORDS = ROOT / "tests" / "words.txt"  # a hundred names: the whole vocabulary takes 10 s to encode
FEW_WORDS = [
    part for stage in ("train", "caption") for part in ("--set", f"{stage}.vocabulary={WORDS}")
]


@pytest.fixture(autouse=True)
def nobody_stays_hushed():
    """`--quiet` is of one command; a process of tests runs many."""
    yield
    logging.getLogger("pipeline").setLevel(logging.INFO)


@pytest.fixture(scope="session")
def ray_session():
    """A local Ray with logical CPUs to spare, shared by the whole session."""
    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=200_000_000,
        include_dashboard=False,
        log_to_driver=False,
    )
    yield
    ray.shutdown()


@pytest.fixture
def pythons_ctrl_c():
    """Ctrl-C as Python has it: Ray Train leaves a handler of its own behind."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory) -> Path:
    """Two shards of TINY bundled images each; the second has three unreadable samples more."""
    folder = tmp_path_factory.mktemp("shards")
    for index, name in enumerate(("00000", "00001")):
        with (BUNDLED / f"{name}.tar").open("rb") as stream:
            samples = [s for s, _ in zip(ShardReader(stream, None), range(TINY), strict=False)]
        with (folder / f"{name}.tar").open("wb") as file, ShardWriter(file) as writer:
            for sample in samples:
                for member in sample.members:
                    writer.add(member.name, member.data)
            if index:
                add_unreadable(writer)
    return folder


def add_unreadable(writer: ShardWriter) -> None:
    """A truncated picture, a text that calls itself a picture, and a sample without one."""
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    writer.add("bad-cut.png", buffer.getvalue()[:600])
    writer.add("bad-cut.json", json.dumps({"label": "nothing", "extra": [1, 2]}).encode())
    writer.add("bad-text.jpg", b"<script>alert(1)</script>")
    writer.add("bad-text.txt", b"not a picture")
    writer.add("bad-none.txt", b"no picture at all")


@pytest.fixture(scope="session")
def finished_run(tiny_shards, tmp_path_factory, ray_session) -> Path:
    """The root of a run of all stages over the tiny shards, made by the command line."""
    root = tmp_path_factory.mktemp("run")
    assert cli.invoke(run_arguments(tiny_shards, root)) == 0
    return root


def run_arguments(shards: Path, root: Path) -> list[str]:
    """A quick `ratecluster run`."""
    settings = ("embed.batch_size=16", "train.steps=12", "train.batch_size=64", "select_k.k=4")
    sets = [part for s in (*settings, "evaluate.label=label") for part in ("--set", s)]
    return ["run", "--shards", str(shards), "--root", str(root), *sets, *FEW_WORDS]
