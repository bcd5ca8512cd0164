"""Many Ray tasks over the parts of a run: bounded in number, results in the order of the parts."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray

from pipeline.runtime import cluster, progress

T = TypeVar("T")
RETRIES = 3  # of a task whose process or node died
COUNTED_S = 10.0  # for which a number of CPUs holds: clusters grow and shrink


def chunks(items: Sequence[T], most: int) -> list[Sequence[T]]:
    """The items in runs, one for each of at most `most` tasks.

    Their size depends on the number of items alone and not on the cluster: sums of floating-point
    numbers within and over the runs are then the same wherever they are made.
    """
    size = max(1, -(-len(items) // most))
    return [items[start : start + size] for start in range(0, len(items), size)]


def results(function: Callable[..., T], items: Sequence[Any], *shared: Any) -> Iterator[T]:
    """`function(item, *shared)` for every item, each a task of one CPU; results in order.

    `shared` values go into the object store once. At most twice as many tasks as CPUs are under
    way, so that results which wait do not fill the store; more where the cluster has grown. A
    failed task raises its error.
    """
    if not items:
        return
    cluster.join()
    task = ray.remote(function).options(num_cpus=1, max_retries=RETRIES)
    common = [ray.put(value) for value in shared]
    limit, counted = _limit(), time.monotonic()
    running: deque[Any] = deque()
    names: deque[str] = deque()

    def first() -> T:
        progress.waiting_for(names)
        found: T = ray.get(running.popleft())
        names.popleft()
        return found

    for item in items:
        running.append(task.remote(item, *common))
        names.append(named(item))
        if time.monotonic() - counted > COUNTED_S:
            limit, counted = _limit(), time.monotonic()
        while len(running) >= limit:
            yield first()
    while running:
        yield first()


def _limit() -> int:
    """Of tasks under way, for the CPUs that the cluster has now."""
    return 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))


def named(item: Any) -> str:
    """A task's item for a message: a text, or a shard by its stem; the first and last of a run."""
    if isinstance(item, Sequence) and not isinstance(item, str):
        ends = dict.fromkeys(named(one) for one in (item[0], item[-1]))
        return " to ".join(ends)
    if isinstance(item, dict):
        return str(item.get("shard", item)["stem"])
    return str(item)
