"""The network: unit rows, BatchNorm as torch's, evaluation row by row."""

import pytest
import torch
from torch import nn

from pipeline.mcr2.network import GlobalBatchNorm, Network


def inputs(n=10, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 3 + 2 * torch.randn(n, width, generator=generator, dtype=torch.float64)


def network(seed=0):
    torch.manual_seed(seed)
    return Network(6, 8, 4).double()


def test_both_heads_have_unit_rows():
    for head in network()(inputs()):
        torch.testing.assert_close(head.norm(dim=1), torch.ones(10, dtype=torch.float64))


def test_batchnorm_equals_torchs_in_value_and_gradients():
    ours, torchs = GlobalBatchNorm(6).double(), nn.BatchNorm1d(6).double()
    weight = torch.linspace(0.5, 2, 6, dtype=torch.float64)
    found = []
    for norm in (ours, torchs):
        with torch.no_grad():
            norm.weight.copy_(weight)
            norm.bias.copy_(weight - 1)
        x = inputs().requires_grad_()
        y = norm(x)
        (y * inputs(seed=1)).sum().backward()
        found.append((y.detach(), x.grad, norm.weight.grad, norm.bias.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_batchnorms_running_statistics():
    """The mean is torch's; the variance is the batch's own, n − 1 over n of torch's share."""
    ours, torchs = GlobalBatchNorm(6).double(), nn.BatchNorm1d(6).double()
    for seed in range(3):
        ours(inputs(seed=seed))
        torchs(inputs(seed=seed))
    torch.testing.assert_close(ours.mean, torchs.running_mean)
    start = 0.9**3  # of the initial 1 that is left
    torch.testing.assert_close(ours.var - start, (torchs.running_var - start) * 9 / 10)
    torchs.running_var.copy_(ours.var)
    torch.testing.assert_close(ours.eval()(inputs()), torchs.eval()(inputs()))


def test_batchnorm_keeps_its_precision_far_from_zero():
    """A mean of squares less a square of means would leave nothing of a variance of 1e-4 here."""
    x = (100 + 0.01 * (inputs(200) - 3) / 2).float()
    y = GlobalBatchNorm(6)(x)
    torch.testing.assert_close(y, nn.BatchNorm1d(6)(x), rtol=0, atol=1e-2)


def test_batchnorm_over_shares_of_a_batch_equals_the_whole():
    x = inputs(12).requires_grad_()
    whole = GlobalBatchNorm(6).double()
    shared = GlobalBatchNorm(6).double()
    shares = x.chunk(3)
    moments = torch.stack([torch.stack([s.mean(0), s.var(0, correction=0)]) for s in shares])
    shared.gather = lambda own: moments
    outputs = whole(x), torch.cat([shared(share) for share in shares])
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)
    grads = [torch.autograd.grad((y**3).sum(), x, retain_graph=True)[0] for y in outputs]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-9)


def test_in_evaluation_a_row_depends_on_no_other():
    net = network()
    net(inputs())  # moves the running statistics off their start
    net.eval()
    x = inputs(seed=3)
    alone = torch.cat([net.features(row[None]) for row in x])
    torch.testing.assert_close(net.features(x), alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(net(x)[0], net.features(x), rtol=0, atol=1e-12)


def test_features_of_a_training_network_are_refused():
    with pytest.raises(AssertionError, match=r"\.eval\(\)"):
        network().features(inputs())


def test_the_cluster_head_starts_as_a_copy_and_lives_its_own_life():
    net = network()
    Z, C = net(inputs())
    assert not torch.equal(Z, C)
    net.start_cluster_head()
    Z, C = net(inputs())
    assert torch.equal(Z, C)
    with torch.no_grad():
        net.cluster.weight.add_(1)
    assert not torch.equal(net.cluster.weight, net.feature.weight)


def test_the_same_seed_gives_the_same_weights():
    a, b, c = network(0), network(0), network(1)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.feature.weight, c.feature.weight)
