"""The Ray that a command uses: an existing cluster, or a local one that ends with the command."""

import logging
import os
import secrets
import socket
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.runtime.errors import UserError

OBJECT_STORE_BYTES = 1_000_000_000  # of a local Ray
SPARE_CPUS = 2  # logical, beyond the cores: Ray hangs silently where actors take every CPU
NAMED = 3  # nodes in a message
ANSWER_S = 5.0  # for a cluster to take a connection
MOST_TEMPORARY = 40  # characters of a temporary folder: Ray adds 65, and a socket's path has 107
SHORT_TEMPORARY = "/tmp"
RAYS_NOISE = "Set ray log level from environment"

_shared: list[tuple[Path, bool]] = []  # local paths that every node must see; written to or not


def join() -> None:
    """Join the Ray at RAY_ADDRESS, or start a local one, unless this process has one already.

    Only stages with work to do call it, so a command with nothing to do starts no Ray. `ray.init()`
    alone would follow the stale address of a dead cluster.
    """
    import ray
    from ray.data import DataContext

    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS") or "local"
        own = _local() if address == "local" else {}
        _check_answers(address)
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            with _without(RAYS_NOISE), _elsewhere():
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
        except ConnectionError as error:
            raise UserError(_no_answer(address, str(error))) from None
        _check_shared()
    warnings.filterwarnings("ignore", message="`ray_remote_args_fn`")  # "ray" in pyproject.toml
    for noisy in ("ray", "ray.data"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def _local() -> dict[str, Any]:
    """Arguments of a local Ray; sets what it reads from the environment."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its harmless errors alarm
    if not _has_writable_home():  # where Ray would make a token
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    found: dict[str, Any] = {
        "num_cpus": (os.cpu_count() or 1) + SPARE_CPUS,
        "object_store_memory": OBJECT_STORE_BYTES,
        "include_dashboard": False,
    }
    own = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if len(own) > MOST_TEMPORARY:  # the paths of its sockets would be too long
        found["_temp_dir"] = f"{SHORT_TEMPORARY}/ray-{os.getuid()}"
    return found


def _has_writable_home() -> bool:
    """Whether Ray's folder in the home can be made and written."""
    try:
        folder = Path.home() / ".ray"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # read-only; no home
        return False
    return os.access(folder, os.W_OK)


def _check_answers(address: str) -> None:
    """UserError where nothing listens at HOST:PORT; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_S).close()
    except OSError as error:
        raise UserError(_no_answer(address, str(error))) from None


def _no_answer(address: str, why: str) -> str:
    return (
        f"RAY_ADDRESS = {address}: no Ray answers there ({' '.join(why.split())[:200]}); start "
        "that cluster, give another --address, or unset RAY_ADDRESS for a local Ray"
    )


@contextmanager
def _elsewhere() -> Iterator[None]:
    """Leave the working folder, which Ray adds to the modules of its workers.

    A `pipeline/` or a `PIL.py` there would take the place of ours. Where the folder is among the
    modules of this process too, as for `python -m`, it stays.
    """
    here = Path.cwd()
    if any(Path(place or ".").resolve() == here for place in sys.path):
        yield
        return
    os.chdir(Path(os.__file__).parent)  # of Python's own modules, where workers look anyway
    try:
        yield
    finally:
        os.chdir(here)


@contextmanager
def _without(noise: str) -> Iterator[None]:
    """Keep lines that hold `noise` from standard error; Ray's C++ writes there by itself."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as kept, os.fdopen(os.dup(2), "wb") as before:
        os.dup2(kept.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(before.fileno(), 2)
            kept.seek(0)
            before.write(b"".join(line for line in kept if noise.encode() not in line))


def actor_limits() -> dict[str, int]:
    """Limits for ray.data's `ray_remote_args_fn`: an input that kills its actor ends the stage.

    Calls have no limit. Until Ray notices that a node has died, it sends calls there, and they
    fail at once: three attempts would be used up in no time.
    """
    return {"max_restarts": 3, "max_task_retries": -1}


@contextmanager
def session() -> Iterator[None]:
    """Leave Ray at the end if the block joined it."""
    before = _is_joined()
    try:
        yield
    finally:
        if not before and _is_joined():
            sys.modules["ray"].shutdown()


def _is_joined() -> bool:
    ray: Any = sys.modules.get("ray")  # a command that never used Ray does not import it here
    return ray is not None and ray.is_initialized()


@contextmanager
def require_shared(written: Path | None, *read: Path | None) -> Iterator[None]:
    """Inside the block, joining a cluster fails if its nodes do not see these local paths."""
    places = [(place, place is written) for place in (written, *read) if place]
    _shared.extend(places)
    try:
        yield
    finally:
        del _shared[len(_shared) - len(places) :]


def _check_shared() -> None:
    """UserError if a node with another address does not see the same files."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    others = _other_nodes() if _shared else {}
    if not others:
        return
    with ExitStack() as stack:
        marks = {str(p): stack.enter_context(_mark(p)) if own else p for p, own in _shared}
        check = ray.remote(num_cpus=0)(_missing)
        asked = {}
        for address, node in others.items():
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            asked[address] = check.options(scheduling_strategy=there).remote(marks)
        blind: dict[str, list[str]] = {}
        for address, answer in asked.items():
            with suppress(ray.exceptions.RayError):  # the node has died meanwhile
                if missing := ray.get(answer):
                    blind[address] = missing
    if blind:
        names = sorted(blind)
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        raise UserError(
            f"{next(iter(blind.values()))[0]} is on a local disk that other nodes of the cluster "
            f"do not see: {', '.join(names[:NAMED])}{more}. Put shards and root into an object "
            "store (s3://…), or on a disk that is mounted at the same path on every node"
        )


def _other_nodes() -> dict[str, str]:
    """Address -> node id, of one node that takes tasks per address other than this node's."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    alive = [node for node in ray.nodes() if node["Alive"]]
    own = {node["NodeManagerAddress"] for node in alive if node["NodeID"] == here}
    takes = {n["NodeManagerAddress"]: n["NodeID"] for n in alive if n["Resources"].get("CPU")}
    return {address: node for address, node in takes.items() if address not in own}


@contextmanager
def _mark(folder: Path) -> Iterator[Path]:
    """A new file in the folder: another node may have another folder of the same name."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".ratecluster-probe-") as file:
        yield Path(file.name)


def _missing(marks: dict[str, Path]) -> list[str]:
    """A task: the places whose marks this node does not see."""
    return [place for place, mark in marks.items() if not mark.exists()]
