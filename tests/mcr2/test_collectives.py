"""W workers with n/W samples each give the gradients of one worker with all n, and fail as one."""

from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline.mcr2 import coding_rate, objective
from pipeline.mcr2.collectives import Collectives
from pipeline.train import loop
from pipeline.train import settings as train_settings

SAMPLES, INPUT_DIM, WORDS = 24, 10, 7
CFG = train_settings.Config(
    words=WORDS,
    feature_dim=6,
    batch_size=SAMPLES,
    steps=12,
    learning_rate=0.01,
    eps_sq=0.2,
    eta=0.15,
    columns=8,
    seed=3,
)
PATIENCE = timedelta(seconds=60)  # for a worker that never comes


def unit(rows, seed):
    x = torch.randn(rows, INPUT_DIM, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=1, keepdim=True)


def network_of(cfg):
    """Off its start, where the residual is zero and most gradients with it."""
    network, _ = loop.new_network(
        replace(cfg, view_weights=(1.0, 1.0)), unit(SAMPLES, 0), unit(WORDS, 1), 10.0
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network


def gradients(columns, dtype, workers):
    """Of the objective at one step, by parameter; its terms; the running statistics."""
    cfg = train_settings.fit_settings(replace(CFG, columns=columns), SAMPLES)
    network = network_of(cfg).to(dtype).train()
    network.gather_with(workers.gather)
    rows = loop.batch_rows(cfg, SAMPLES, 1, workers.rank, workers.size)
    Z = network(unit(SAMPLES, 0)[rows].to(dtype))
    mine = loop.sampled_columns(cfg, 1, workers.rank, workers.size)
    terms = objective.rate_reduction(Z, mine, cfg.eps_sq, cfg.eta, workers.gather)
    terms.loss.backward()
    norm = workers.average_gradients(network)
    found = {n: p.grad for n, p in network.named_parameters()}
    found |= {f"buffer {n}": b for n, b in network.named_buffers()}
    numbers = [terms.loss, terms.compression, terms.expansion, terms.residual]
    found["terms"] = torch.stack([workers.mean(number) for number in numbers])
    found["norm"] = torch.tensor(norm, dtype=torch.float64)
    return found


def join(rank, size, store):
    torch.set_num_threads(1)
    url = f"file://{store}"
    dist.init_process_group("gloo", init_method=url, rank=rank, world_size=size, timeout=PATIENCE)
    return Collectives.join(rank, size)


def finish(found, rank, out):
    torch.save(found, f"{out}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def gradient_worker(rank, size, store, cases, out):
    workers = join(rank, size, store)
    finish([gradients(columns, dtype, workers) for columns, dtype in cases], rank, out)


def collective_worker(rank, size, store, out):
    workers = join(rank, size, store)
    x = torch.arange(4.0).view(2, 2).add(10 * rank).requires_grad_()
    gathered = workers.gather(x)
    ((rank + 1) * gathered * gathered).sum().backward()
    mean = workers.mean(torch.tensor(float(rank)))
    finish((gathered.detach(), x.grad, mean), rank, out)


def compression_failing_at(calls):
    """`coding_rate.compression`; some of its calls, counted from 0, find no determinant."""
    whole, count = coding_rate.compression, iter(range(10_000))

    def compression(*arguments):
        if next(count) in calls:
            raise torch.linalg.LinAlgError("not positive-definite")
        return whole(*arguments)

    return compression


def failing_worker(rank, size, store, failing, out):
    """Trains; the last rank alone has failures."""
    workers = join(rank, size, store)
    if rank == size - 1:
        coding_rate.compression = compression_failing_at(failing)
    cfg = train_settings.fit_settings(replace(CFG, workers=size), SAMPLES)
    state = loop.new_state(cfg, network_of(cfg))
    message = ""
    try:
        for _ in loop.fit(cfg, unit(SAMPLES, 0), state, workers):
            pass
    except RuntimeError as error:
        message = str(error)
    finish((message, state.tensors(), state.facts()), rank, out)


def spawn(function, size, folder, *arguments, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    mp.spawn(function, (size, str(folder / "store"), *arguments, str(folder)), nprocs=size)
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_gradients_of_many_workers_are_those_of_one(size, tmp_path, monkeypatch):
    cases = [(m, dtype) for dtype in (torch.float64, torch.float32) for m in (SAMPLES, 8)]
    by_rank = spawn(gradient_worker, size, tmp_path, cases, monkeypatch=monkeypatch)
    for (columns, dtype), *found in zip(cases, *by_rank, strict=True):
        one = gradients(columns, dtype, Collectives())
        tolerance = 1e-10 if dtype == torch.float64 else 1e-5
        for many in found:
            assert many.keys() == one.keys()
            for name, value in one.items():
                scale = max(1.0, float(value.abs().max()))
                error = float((many[name].double() - value.double()).abs().max())
                assert error <= tolerance * scale, (name, columns, dtype)


def test_the_gradients_compared_are_not_nothing():
    one = gradients(8, torch.float64, Collectives())
    parameters = {n: g for n, g in one.items() if n.split(".")[0] in ("project", "residual")}
    assert len(parameters) == 6
    for name in parameters:
        assert one[name].abs().max() > 1e-3, name
    total = torch.stack([g.square().sum() for g in parameters.values()]).sum().sqrt()
    torch.testing.assert_close(one["norm"], total)


def test_a_failure_of_one_worker_is_a_failure_of_all_and_rescued_once(tmp_path, monkeypatch):
    by_rank = spawn(failing_worker, 2, tmp_path, {4}, monkeypatch=monkeypatch)
    (_, left, facts), (_, right, others) = by_rank
    for message, _, found in by_rank:
        assert message == "" and found["rescued"] and found["step"] == CFG.steps
        assert [row["step"] for row in found["history"]] == list(range(CFG.steps))
        assert found["learning_rates"] == [pytest.approx(CFG.learning_rate / 10)]
    assert [found["step"] for found in facts["looks"]] == [0, 10, 12]
    assert [found["step"] for found in others["looks"]] == [0, 10, 12]
    for name, tensor in left.items():
        assert name.startswith("kept.") or torch.equal(tensor, right[name]), name


def test_the_second_failure_of_one_worker_ends_all(tmp_path, monkeypatch):
    by_rank = spawn(failing_worker, 2, tmp_path, {4, 6}, monkeypatch=monkeypatch)
    for message, _, _ in by_rank:
        assert message.startswith("train: step 1: the loss is not finite, condition number ")
        assert "nan" not in message


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
