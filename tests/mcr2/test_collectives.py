"""W workers with n/W samples each give the gradients of one worker with all n."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline import train
from pipeline.mcr2.collectives import Collectives

SAMPLES, INPUT_DIM = 24, 10
CFG = {
    "hidden_dim": 12,
    "feature_dim": 6,
    "batch_size": SAMPLES,
    "epochs": 3.0,
    "warm_up_steps": 1,
    "learning_rate": 0.05,
    "momentum": 0.9,
    "weight_decay": 1e-3,
    "cluster_weight_decay": 1e-2,
    "eps_sq": 0.2,
    "eta": 0.15,
    "gamma": 0.8,
    "regularizer": 0.05,
    "sinkhorn_half_steps": 5,
    "seed": 3,
}
WARM_UP, CLUSTER = 0, 1  # steps of either phase


def gradients(cfg, step, dtype, workers):
    """Of the whole objective at one step, by parameter; the loss; the running statistics."""
    x = torch.randn(SAMPLES, INPUT_DIM, generator=torch.Generator().manual_seed(0), dtype=dtype)
    network = train.new_network(cfg, INPUT_DIM).to(dtype).train()
    network.gather_with(workers.gather)
    rows = train.batch_rows(cfg, SAMPLES, step, workers.rank, workers.size)
    terms = train._terms(cfg, network, x[rows], step, workers)
    terms.loss.backward()
    norm = workers.average_gradients(network)
    found = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
    found |= {f"buffer {n}": b for n, b in network.named_buffers()}
    numbers = [terms.loss, terms.compression, terms.expansion]
    found["terms"] = torch.stack([workers.mean(number) for number in numbers])
    found["norm"] = torch.tensor(norm, dtype=torch.float64)
    return found


def join(rank, size, store):
    torch.set_num_threads(1)
    url = f"file://{store}"
    dist.init_process_group("gloo", init_method=url, rank=rank, world_size=size)
    return Collectives.join(rank, size)


def gradient_worker(rank, size, store, cases, out):
    workers = join(rank, size, store)
    found = [gradients(train.Config(**c), step, dtype, workers) for c, step, dtype in cases]
    torch.save(found, f"{out}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def collective_worker(rank, size, store, out):
    workers = join(rank, size, store)
    x = torch.arange(4.0).view(2, 2).add(10 * rank).requires_grad_()
    gathered = workers.gather(x)
    ((rank + 1) * gathered * gathered).sum().backward()
    mean = workers.mean(torch.tensor(float(rank)))
    torch.save((gathered.detach(), x.grad, mean), f"{out}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def spawn(function, size, folder, *arguments, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    mp.spawn(function, (size, str(folder / "store"), *arguments, str(folder)), nprocs=size)
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


@pytest.mark.parametrize("size", [2, 4])
def test_gradients_of_many_workers_are_those_of_one(size, tmp_path, monkeypatch):
    cases = [
        (CFG | {"columns": columns}, step, dtype)
        for dtype in (torch.float64, torch.float32)
        for columns, step in ((SAMPLES, WARM_UP), (SAMPLES, CLUSTER), (8, CLUSTER))
    ]
    by_rank = spawn(gradient_worker, size, tmp_path, cases, monkeypatch=monkeypatch)
    for (cfg, step, dtype), *found in zip(cases, *by_rank, strict=True):
        one = gradients(train.Config(**cfg), step, dtype, Collectives())
        assert ("cluster.weight" in one) == (step == CLUSTER)
        tolerance = 1e-10 if dtype == torch.float64 else 1e-5
        for many in found:
            assert many.keys() == one.keys()
            for name, value in one.items():
                scale = max(1.0, float(value.abs().max()))
                error = float((many[name].double() - value.double()).abs().max())
                assert error <= tolerance * scale, (name, cfg["columns"], step, dtype)


def test_the_gradients_compared_are_not_nothing():
    one = gradients(train.Config(**CFG, columns=8), CLUSTER, torch.float64, Collectives())
    for name in ("trunk.0.weight", "trunk.1.weight", "feature.weight", "cluster.weight"):
        assert one[name].abs().max() > 1e-3
    total = (
        torch.stack(
            [g.square().sum() for n, g in one.items() if n.split(".")[-1] in ("weight", "bias")]
        )
        .sum()
        .sqrt()
    )
    torch.testing.assert_close(one["norm"], total)


def test_gather_and_mean(tmp_path, monkeypatch):
    by_rank = spawn(collective_worker, 2, tmp_path, monkeypatch=monkeypatch)
    rows = torch.tensor([[0.0, 1], [2, 3], [10, 11], [12, 13]])
    for rank, (gathered, grad, mean) in enumerate(by_rank):
        assert torch.equal(gathered, rows)
        assert torch.equal(grad, (1 + 2) * 2 * rows[2 * rank : 2 * rank + 2])  # of both losses
        assert mean == 0.5


def test_one_worker_needs_no_process_group():
    workers = Collectives.join(0, 1)
    x = torch.ones(2, 2)
    assert workers.gather(x) is x
    assert workers.mean(torch.tensor(3.0)) == 3
