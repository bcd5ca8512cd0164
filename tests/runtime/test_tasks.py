"""Tasks: in order, bounded, the same chunks wherever they run; on a real Ray."""

import time

import numpy as np
import pytest
import ray

from pipeline.runtime import tasks


@pytest.mark.parametrize("number", [0, 1, 127, 128, 129, 1000, 41_456])
def test_chunks_hold_every_item_once_in_order(number):
    items = list(range(number))
    chunks = tasks.chunks(items, 128)
    assert [item for chunk in chunks for item in chunk] == items
    assert all(chunks) and len(chunks) <= 128
    assert tasks.chunks(items, 128) == chunks
    assert len({len(chunk) for chunk in chunks[:-1]}) <= 1


def slow_first(item: int) -> int:
    time.sleep(0.4 if item == 0 else 0)
    return item * item


def dot(item: int, matrix: np.ndarray, offset: int) -> float:
    return float(matrix[item].sum()) + offset


def fail_at(item: int, bad: int) -> int:
    if item == bad:
        raise KeyError(f"number {item}")
    return item


@ray.remote(num_cpus=0)
class Watch:
    """Counts tasks under way."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def enter(self) -> None:
        self.now += 1
        self.most = max(self.most, self.now)

    def leave(self) -> None:
        self.now -= 1

    def seen(self) -> int:
        return self.most


def watched(item: int, watch: object) -> int:
    ray.get(watch.enter.remote())
    time.sleep(0.02)
    ray.get(watch.leave.remote())
    return item


@pytest.mark.ray
def test_results_come_in_the_order_of_the_items(ray_session):
    assert list(tasks.results(slow_first, list(range(20)))) == [i * i for i in range(20)]


@pytest.mark.ray
def test_shared_values_reach_every_task(ray_session):
    matrix = np.arange(12.0).reshape(4, 3)
    found = list(tasks.results(dot, range(4), matrix, 100))
    assert found == [103.0, 112.0, 121.0, 130.0]


@pytest.fixture
def started(monkeypatch):
    """The items whose tasks were started, in order."""
    started = []
    remote = ray.remote

    class Counting:
        def __init__(self, function):
            self.task = remote(function)

        def options(self, **_):
            return self

        def remote(self, item, *shared):
            started.append(item)
            return self.task.remote(item, *shared)

    monkeypatch.setattr(ray, "remote", Counting)
    return started


@pytest.mark.ray
def test_no_more_results_wait_than_twice_the_cpus(ray_session, started):
    """One more is started for each one taken: what is not taken yet stays bounded."""
    limit = 2 * int(ray.cluster_resources()["CPU"])
    results = tasks.results(slow_first, list(range(5 * limit)))
    for taken in range(1, 4 * limit):
        next(results)
        assert len(started) == limit + taken - 1
    assert len(list(results)) == limit + 1


@pytest.mark.ray
def test_more_are_under_way_when_the_cluster_has_grown_and_fewer_when_it_has_shrunk(
    ray_session, started, monkeypatch
):
    has = {"CPU": 2}
    monkeypatch.setattr(tasks, "COUNT_EVERY_S", -1)
    monkeypatch.setattr(ray, "cluster_resources", lambda: has)
    results = tasks.results(slow_first, list(range(60)))
    ahead = []
    for taken, has["CPU"] in enumerate((2, 2, 8, 8, 1, 1)):
        next(results)
        ahead.append(len(started) - taken)
    assert ahead == [4, 4, 16, 16, 16, 15]
    assert len(list(results)) == 54


@pytest.mark.ray
def test_tasks_take_a_cpu_each(ray_session):
    watch = Watch.remote()
    assert list(tasks.results(watched, range(12), watch)) == list(range(12))
    assert 1 <= ray.get(watch.seen.remote()) <= int(ray.cluster_resources()["CPU"])


@pytest.mark.ray
def test_an_error_is_raised_after_the_results_before_it(ray_session):
    results = tasks.results(fail_at, range(30), 3)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="number 3"):
        next(results)


def test_nothing_to_do_needs_no_ray(monkeypatch):
    monkeypatch.setattr(tasks.cluster, "join", lambda: pytest.fail("joined Ray"))
    assert list(tasks.results(fail_at, [], 0)) == []
