"""Stages that are interrupted between two results of their tasks."""

from pipeline.runtime import tasks
from pipeline.store import partial_sums


class Interrupted(Exception):  # noqa: N818
    """Stands for the death of the driver."""


def after(monkeypatch, results: int) -> list[int]:
    """From now on a stage dies after so many results of tasks; what it has done is committed.

    Returns a list that grows by one with every result.
    """
    counted: list[int] = []
    real = tasks.results

    def dying(*args):
        for result in real(*args):
            if len(counted) >= results:
                raise Interrupted
            counted.append(1)
            yield result

    monkeypatch.setattr(tasks, "results", dying)
    monkeypatch.setattr(partial_sums, "EVERY_S", 0.0)
    monkeypatch.setattr(partial_sums, "WORK", 0)
    return counted
