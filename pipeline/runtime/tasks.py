"""Ray tasks over the parts of a run: a bounded number at a time, results in order."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from pipeline.runtime import cluster, progress

T = TypeVar("T")
RETRIES = 3  # of a task whose process or node died
COUNT_EVERY_S = 10.0  # how often the CPUs are counted: clusters grow and shrink


def chunks(items: Sequence[T], most: int) -> list[Sequence[T]]:
    """The items in consecutive groups, one for each of at most `most` tasks.

    The size depends only on the number of items, not on the cluster. So floating-point sums over
    the groups are the same on every cluster.
    """
    size = max(1, -(-len(items) // most))
    return [items[start : start + size] for start in range(0, len(items), size)]


def results(function: Callable[..., T], items: Sequence[Any], *shared: Any) -> Iterator[T]:
    """`function(item, *shared)` for every item, each as a task with one CPU; results in order.

    `shared` values go into the object store once. At most two tasks per CPU are running or waiting
    to be read, so that results do not fill the store. A failed task raises its error.
    """
    if not items:
        return
    import ray  # takes a second, and a stage with nothing to do never gets here

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
        if time.monotonic() - counted > COUNT_EVERY_S:
            limit, counted = _limit(), time.monotonic()
        while len(running) >= limit:
            yield first()
    while running:
        yield first()


def _limit() -> int:
    """Tasks that may run at once, for the CPUs that the cluster has now."""
    import ray

    return 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))


def named(item: Any) -> str:
    """The name of an item for a message: a shard's stem, or the first and last of a group."""
    if isinstance(item, Sequence) and not isinstance(item, str):
        ends = dict.fromkeys(named(one) for one in (item[0], item[-1]))
        return " to ".join(ends)
    if isinstance(item, dict):
        return str(item.get("shard", item)["stem"])
    return str(item)
