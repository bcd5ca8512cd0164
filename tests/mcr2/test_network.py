"""The network: where it starts, unit rows, BatchNorm as torch's, evaluation row by row."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from pipeline.mcr2 import network as module
from pipeline.mcr2.network import GlobalBatchNorm, Network

SCALE = 20.0  # logit scale


def inputs(n=10, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 3 + 2 * torch.randn(n, width, generator=generator, dtype=torch.float64)


def cone(n=60, width=6, seed=0):
    """Unit rows about a common direction, like the embeddings of an encoder; float32."""
    x = inputs(n, width, seed) * torch.linspace(0.3, 1, width, dtype=torch.float64)
    return normalize(x, dim=1).float()


def started(x, words=0, feature_dim=4, seed=0):
    torch.manual_seed(seed)
    net = Network([x.shape[1]], 8, feature_dim, words)
    begin(net, x, cone(words, x.shape[1], seed=9) if words else torch.zeros(0, 1))
    return net.eval()


def begin(net, x, table):
    net.centre(x, table, SCALE)
    net.start(x, [1.0] * len(net.dims))


def moved(net, seed=0):
    """Off its start, where the residual is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return net


def oracle_views(x, table):
    """(views, their centres) in float64 numpy, from the formulas."""
    x = x.double().numpy()
    raw = [x]
    if len(table):
        table = table.double().numpy()
        shares = np.exp(SCALE * x @ table.T)
        raw.append(shares / shares.sum(1, keepdims=True) @ table)
    centres = [r.mean(0) for r in raw]
    rows = [r - c for r, c in zip(raw, centres, strict=True)]
    unit = [r / np.linalg.norm(r, axis=1, keepdims=True) for r in rows]
    return np.concatenate(unit, axis=1) / np.sqrt(len(unit)), np.concatenate(centres)


@pytest.mark.parametrize("block_rows", [7, 4096])
@pytest.mark.parametrize("words", [0, 30])
def test_the_start_is_the_principal_components_of_centred_views(monkeypatch, words, block_rows):
    monkeypatch.setattr(module, "BLOCK_ROWS", block_rows)
    x = cone()
    net = started(x, words)
    views, centres = oracle_views(x, net.words.table)
    np.testing.assert_allclose(net.centres, centres, atol=1e-6)
    np.testing.assert_allclose(net.views(x), views, atol=1e-4)
    np.testing.assert_allclose(net.mean, views.mean(0), atol=1e-5)
    centred = views - views.mean(0)
    _, _, right = np.linalg.svd(centred, full_matrices=False)
    expected = centred @ right[:4].T
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = net.features(x).numpy()
    signs = np.sign((found * expected).sum(0))
    np.testing.assert_allclose(found, expected * signs, atol=2e-3)


def test_expected_words_are_a_softmax_of_scaled_cosines():
    x, net = cone(), started(cone(), words=30)
    table = net.words.table.double().numpy()
    logits = SCALE * x.double().numpy() @ table.T
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(net.words.shares(x), shares, atol=1e-6)
    np.testing.assert_allclose(net.words(x), shares @ table, atol=1e-6)
    assert shares.max() > 3 / 30  # not all alike, so the scale counts


def test_views_of_several_encoders_have_their_weights():
    x = torch.cat([cone(), cone(width=4, seed=5)], dim=1)
    net = Network([6, 4], 8, 5, 30)
    net.centre(x, cone(30, seed=9), SCALE)
    net.start(x, [1.0, 0.5, 0.25])
    images, words, other = net.views(x).split([6, 6, 4], dim=1)
    length = (1 + 0.5**2 + 0.25**2) ** 0.5
    for view, weight in ((images, 1), (words, 0.5), (other, 0.25)):
        torch.testing.assert_close(view.norm(dim=1), torch.full((60,), weight / length))
    alone = Network([4], 8, 4)
    alone.centre(x[:, 6:], torch.zeros(0, 1), SCALE)
    torch.testing.assert_close(alone.each_view(x[:, 6:])[0], net.each_view(x)[2])
    net.start(x, [1.0, 0.0, 0.0])
    first = started(x[:, :6], feature_dim=5).features(x[:, :6])
    torch.testing.assert_close(net.eval().features(x), first, atol=1e-5, rtol=0)


def test_both_views_count_alike():
    seen = started(cone(), words=30).views(cone())
    for view in seen.chunk(2, dim=1):
        torch.testing.assert_close(view.norm(dim=1), torch.full((60,), 0.5**0.5))


@pytest.mark.parametrize("words", [0, 30])
def test_more_features_than_inputs_leave_the_last_at_zero(words):
    width = 12 if words else 6
    net = started(cone(), words, feature_dim=width + 3)
    assert not net.project.weight[width:].any()
    eye = torch.eye(width)
    torch.testing.assert_close(net.project.weight[:width] @ net.project.weight[:width].T, eye)
    z = net.features(cone())
    assert not z[:, width:].any()
    torch.testing.assert_close(z.norm(dim=1), torch.ones(60))


def test_components_have_the_sign_that_makes_their_largest_entry_positive():
    components = started(cone(), words=30).project.weight.detach()
    peaks = components.gather(1, components.abs().argmax(1, keepdim=True))
    assert (peaks > 0).all()


def test_the_start_is_the_same_whatever_the_network_was_before():
    a, b = started(cone(), words=30), moved(started(cone(seed=4), words=30))
    begin(b, cone(), a.words.table.clone())
    for name in ("project.weight", "centres", "mean", "words.table", "words.scale"):
        assert torch.equal(a.state_dict()[name], b.state_dict()[name])


def test_half_precision_samples_start_as_the_same_numbers_in_full():
    x = cone().half()
    a, b = started(x, words=30), started(x.float(), words=30)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("words", [0, 5])
@pytest.mark.parametrize(
    "x",
    [cone(1).expand(20, 6), torch.zeros(20, 6), torch.cat([cone(20), torch.zeros(3, 6)]), cone(2)],
    ids=["identical", "zeros", "some zeros", "two"],
)
def test_odd_samples_have_finite_features(x, words):
    net = started(x, words)
    assert net.features(x).isfinite().all()
    moved(net).train()(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("words", [0, 30])
def test_features_have_unit_rows(words):
    z = moved(started(cone(), words)).features(cone(seed=1))
    torch.testing.assert_close(z.norm(dim=1), torch.ones(60))


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
    assert torchs.running_var is not None
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


@pytest.mark.parametrize("words", [0, 30])
def test_out_of_sample_a_row_depends_on_no_other(words):
    net = moved(started(cone(), words))
    net.train()(cone(seed=2))  # moves the running statistics off their start
    net.eval()
    x = cone(seed=3)
    alone = torch.cat([net.features(row[None]) for row in x])
    torch.testing.assert_close(net.features(x), alone, rtol=0, atol=1e-6)
    torch.testing.assert_close(net(x), net.features(x), rtol=0, atol=1e-6)


def test_features_of_a_training_network_are_refused():
    with pytest.raises(AssertionError, match=r"\.eval\(\)"):
        started(cone()).train().features(cone())


def test_the_same_seed_gives_the_same_weights():
    a, b, c = (started(cone(), words=30, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.residual[0].weight, c.residual[0].weight)
