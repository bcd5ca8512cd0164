"""The Ray that a command works on: the one it is given, or its own for as long as it runs."""

import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.data import DataContext
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.runtime.errors import UserError

OBJECT_STORE_BYTES = 1_000_000_000  # of a Ray of our own
SPARE_CPUS = 2  # logical, beyond the cores: Ray hangs silently where actors take every CPU
NAMED = 3  # nodes in a message

_shared: list[tuple[Path, bool]] = []  # what `sharing` asks for, and whether it is written to


def join() -> None:
    """Join Ray unless this process has: at RAY_ADDRESS, else a local one that ends with it.

    Called where Ray is needed and not before, so that a command with nothing to do starts none.
    Not `ray.init()` alone, which follows the stale address of a dead cluster.
    """
    if not ray.is_initialized():
        _init(os.environ.get("RAY_ADDRESS") or "local")
        _check_shared(_shared)
    warnings.filterwarnings("ignore", message="`ray_remote_args_fn`")  # "ray" in pyproject.toml
    for noisy in ("ray", "ray.data"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def _init(address: str) -> None:
    own: dict[str, Any] = {}
    if address == "local":
        own = {
            "num_cpus": (os.cpu_count() or 1) + SPARE_CPUS,
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": False,
        }
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its harmless errors alarm
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)


def actor_limits() -> dict[str, int]:
    """How often a dead actor comes back: without a limit a poisonous input would kill it for ever.

    Calls have none: one to a node that died is tried, and refused, until Ray has noticed, and three
    of them take no time. For ray.data's `ray_remote_args_fn`.
    """
    return {"max_restarts": 3, "max_task_retries": -1}


@contextmanager
def session() -> Iterator[None]:
    """Leave at the end what was joined inside; a Ray that this process had before stays."""
    before = ray.is_initialized()
    try:
        yield
    finally:
        if ray.is_initialized() and not before:
            ray.shutdown()


@contextmanager
def sharing(written: Path | None, *read: Path | None) -> Iterator[None]:
    """Inside, a cluster is only joined if its nodes see this local folder and what is read."""
    places = [(place, place is written) for place in (written, *read) if place]
    _shared.extend(places)
    try:
        yield
    finally:
        del _shared[len(_shared) - len(places) :]


def _check_shared(places: Sequence[tuple[Path, bool]]) -> None:
    """UserError where nodes with other addresses do not see what this one does."""
    others = _other_nodes() if places else {}
    if not others:
        return
    with ExitStack() as stack:
        marks = {str(p): stack.enter_context(_mark(p)) if own else p for p, own in places}
        look = ray.remote(num_cpus=0)(_missing)
        asked = {
            address: look.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
            ).remote(marks)
            for address, node in others.items()
        }
        blind = {address: missing for address, ref in asked.items() if (missing := _answer(ref))}
    if blind:
        names = sorted(blind)
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        raise UserError(
            f"{next(iter(blind.values()))[0]} lies on a disk of this machine that other nodes of "
            f"the cluster do not see: {', '.join(names[:NAMED])}{more}. Put shards and root into "
            "an object store (s3://…), or on a disk mounted at the same path on every node"
        )


def _other_nodes() -> dict[str, str]:
    """A node that takes tasks for every address but this node's: node ids by address."""
    here = ray.get_runtime_context().get_node_id()
    alive = [node for node in ray.nodes() if node["Alive"]]
    own = {node["NodeManagerAddress"] for node in alive if node["NodeID"] == here}
    takes = {n["NodeManagerAddress"]: n["NodeID"] for n in alive if n["Resources"].get("CPU")}
    return {address: node for address, node in takes.items() if address not in own}


@contextmanager
def _mark(folder: Path) -> Iterator[Path]:
    """A new file in it: on another node may lie another folder of the same name."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".ratecluster-probe-") as file:
        yield Path(file.name)


def _missing(marks: dict[str, Path]) -> list[str]:
    """A task: those of the places whose marks this node does not see."""
    return [place for place, mark in marks.items() if not mark.exists()]


def _answer(missing: Any) -> list[str]:
    """What a node does not see; nothing where the node has gone meanwhile."""
    try:
        found: list[str] = ray.get(missing)
    except ray.exceptions.RayError:
        return []
    return found
