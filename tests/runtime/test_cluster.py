"""Which options Ray gets for actors that die."""

import os
from pathlib import Path

import pytest
import ray
from ray.data import ActorPoolStrategy

from pipeline.runtime import cluster

pytestmark = pytest.mark.ray


class Poisoned:
    """Dies of every input, and leaves a mark of each."""

    def __call__(self, row: dict) -> dict:
        with Path(row["log"]).open("a") as log:
            log.write("x")
        os._exit(1)


def test_an_input_that_kills_its_actor_ends_the_stage(ray_session, tmp_path):
    log = tmp_path / "log"
    dataset = ray.data.from_items([{"log": str(log)}]).map(
        Poisoned,
        num_cpus=1,
        ray_remote_args_fn=cluster.actor_limits,
        compute=ActorPoolStrategy(size=1),
    )
    with pytest.raises(ray.exceptions.RayError):
        list(dataset.iter_rows())
    assert len(log.read_text()) == 1 + cluster.actor_limits()["max_restarts"]
