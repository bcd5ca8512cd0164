"""The Ray that a command works on: the one it is given, or its own for as long as it runs."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.data import DataContext

OBJECT_STORE_BYTES = 1_000_000_000  # of a Ray of our own
SPARE_CPUS = 2  # logical, beyond the cores: Ray hangs silently where actors take every CPU


def join() -> None:
    """Join Ray unless this process has: at RAY_ADDRESS, else a local one that ends with it.

    Called where Ray is needed and not before, so that a command with nothing to do starts none.
    Not `ray.init()` alone, which follows the stale address of a dead cluster.
    """
    if not ray.is_initialized():
        _init(os.environ.get("RAY_ADDRESS") or "local")
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

    For ray.data's `ray_remote_args_fn`.
    """
    return {"max_restarts": 3, "max_task_retries": 3}


@contextmanager
def session() -> Iterator[None]:
    """Leave at the end what was joined inside; a Ray that this process had before stays."""
    before = ray.is_initialized()
    try:
        yield
    finally:
        if ray.is_initialized() and not before:
            ray.shutdown()
