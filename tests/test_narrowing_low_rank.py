"""The mathematics of narrowing: optima against brute force, in float64."""

import itertools

import pytest
import torch

from nin.errors import UserError
from nin.narrowing import channel_elimination, linalg, low_rank

torch.manual_seed(0)


def problem(outputs=6, channels=5, taps=4, samples=4000, seed=0):
    """Correlated patches (D, M), their covariance, and a weight (O, D)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels * taps, channels * taps, generator=generator, dtype=torch.float64)
    mixing *= torch.logspace(0, -1.5, channels * taps, dtype=torch.float64)
    x = mixing @ torch.randn(channels * taps, samples, generator=generator, dtype=torch.float64)
    x -= x.mean(1, keepdim=True)
    weight = torch.randn(outputs, channels * taps, generator=generator, dtype=torch.float64)
    return x, x @ x.T / samples, weight


def plain_roots(size):
    eye = torch.eye(size, dtype=torch.float64)
    return linalg.MatrixRoots(eye, eye)


def mean_error(wanted, got):
    return ((wanted - got) ** 2).sum(0).mean()


def test_output_form_is_the_best_of_its_rank():
    x, xx, weight = problem()
    y = weight @ x
    losses = low_rank.output_losses(weight @ xx @ weight.T, plain_roots(6).sqrt)
    left, strengths, right = torch.linalg.svd(y, full_matrices=False)
    for rank in range(1, 7):
        u, v = low_rank.output_factors(weight @ xx @ weight.T, plain_roots(6), rank)
        best = left[:, :rank] * strengths[:rank] @ right[:rank]  # Eckart, Young: nothing of this rank is nearer
        torch.testing.assert_close(mean_error(y, u @ v @ y), mean_error(y, best), atol=1e-10, rtol=1e-8)
        torch.testing.assert_close(losses[rank], mean_error(y, best), atol=1e-10, rtol=1e-8)


def test_weighted_output_form_is_the_best_in_its_own_measure():
    x, xx, weight = problem()
    y = weight @ x
    gram = torch.randn(6, 6, dtype=torch.float64)
    gram = gram @ gram.T
    roots = linalg.matrix_roots(gram)
    torch.testing.assert_close(roots.sqrt @ roots.inverse_sqrt, torch.eye(6, dtype=torch.float64))
    u, v = low_rank.output_factors(weight @ xx @ weight.T, roots, 3)
    left, strengths, right = torch.linalg.svd(roots.sqrt @ y, full_matrices=False)
    best = left[:, :3] * strengths[:3] @ right[:3]
    torch.testing.assert_close(mean_error(roots.sqrt @ y, roots.sqrt @ u @ v @ y), mean_error(roots.sqrt @ y, best))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_covariance_that_is_not_finite_is_refused(value):
    _, xx, weight = problem()
    xx[3, 3] = value
    with pytest.raises(UserError, match="a covariance must be finite, got NaN or infinity"):
        linalg.least_squares(weight, xx, weight @ xx)


def test_a_covariance_of_rounding_errors_leaves_the_weight():
    _, _, weight = problem()
    noise = torch.randn(20, 20, dtype=torch.float64)
    noise = (noise + noise.T) / 2  # no covariance at all: its values have both signs
    assert float(torch.linalg.eigvalsh(noise)[0]) < -float(noise.diagonal().abs().mean())
    fitted = linalg.least_squares(weight, noise * 1e-12, weight @ noise * 1e-12 + 1e-13)
    assert float((fitted - weight).norm()) < 0.1 * float(weight.norm())


def test_fit_is_least_squares_and_the_weight_where_nothing_changed():
    x, xx, weight = problem()
    torch.testing.assert_close(linalg.least_squares(weight, xx, weight @ xx), weight)
    noise = 1e-6 * torch.randn(6, x.shape[1], dtype=torch.float64)
    noisy = (weight @ x + noise) @ x.T / x.shape[1]
    assert linalg.least_squares(weight, xx, noisy) is weight  # rounding errors are not fitted
    y = torch.tanh(weight @ x)
    fitted = linalg.least_squares(weight, xx, y @ x.T / x.shape[1], ridge=0)
    torch.testing.assert_close(fitted, torch.linalg.lstsq(x.T, y.T).solution.T, atol=1e-8, rtol=1e-6)


def input_error(x, xx, weight, rank, roots=None):
    roots = roots or plain_roots(len(weight))
    form = low_rank.InputProjection(weight, xx, 4, roots.sqrt)
    projection, core = form.factors(rank)
    y = core @ torch.einsum("ri,itm->rtm", projection, x.view(-1, 4, x.shape[1])).flatten(0, 1)
    torch.testing.assert_close(form.output_covariance(rank), y @ y.T / x.shape[1])
    return mean_error(weight @ x, y), form


def test_input_form_loses_less_with_every_rank_and_nothing_at_full_rank():
    x, xx, weight = problem()
    errors = [float(input_error(x, xx, weight, rank)[0]) for rank in range(1, 6)]
    assert all(a > b for a, b in itertools.pairwise(errors))
    assert errors[-1] < 1e-9 * float((weight @ x).square().sum(0).mean())


def test_input_form_at_full_rank_is_the_weight_where_the_samples_say_nothing():
    _, xx, weight = problem(samples=7)  # of patches with 20 values
    form = low_rank.InputProjection(weight, xx, 4, plain_roots(6).sqrt)
    projection, core = form.factors(5)
    effective = torch.einsum("ort,ri->oit", core.view(6, 5, 4), projection).flatten(1)
    torch.testing.assert_close(effective, weight)


def test_input_form_beats_the_svd_of_the_weight_alone():
    x, xx, weight = problem()
    for rank in (1, 2, 3):
        unfolded = weight.view(6, 5, 4).transpose(0, 1).flatten(1)  # (C_in, C_out * k²)
        left = torch.linalg.svd(unfolded, full_matrices=False).U[:, :rank]
        cut = (left @ left.T @ unfolded).view(5, 6, 4).transpose(0, 1).flatten(1)
        assert input_error(x, xx, weight, rank)[0] < mean_error(weight @ x, cut @ x)


def eliminate(weight, xx, taps, least=1):
    """Return the elimination of one layer's input channels, and the variance of its output."""
    fit = channel_elimination.ConsumerFit(weight, xx, taps, plain_roots(len(weight)).sqrt)
    return channel_elimination.eliminate_channels([fit], least=least), fit.variance


def test_elimination_foretells_the_error_of_the_refit():
    x, xx, weight = problem()
    path, variance = eliminate(weight, xx, 4)
    assert len(path.order) == 4
    assert list(path.losses[0]) == sorted(path.losses[0])
    for count in (4, 3, 1):
        kept = path.kept(count, 5)
        assert len(kept) == count
        values = (kept[:, None] * 4 + torch.arange(4)).flatten()
        refit = torch.linalg.lstsq(x[values].T, (weight @ x).T).solution.T
        error = mean_error(weight @ x, refit @ x[values])
        torch.testing.assert_close(
            torch.tensor(variance * path.losses[0][5 - count]).double(), error, rtol=1e-2, atol=1e-6
        )
        dropped = mean_error(weight @ x, weight[:, values] @ x[values])
        assert error < dropped


def test_elimination_first_spares_a_channel_that_repeats_another():
    x, _, weight = problem()
    x = x.view(5, 4, -1)
    x[3] = x[1]
    x = x.flatten(0, 1)
    path, _ = eliminate(weight, x @ x.T / x.shape[1], 4)
    assert path.order[0] in (1, 3)
    assert path.losses[0][1] < 1e-3 * path.losses[0][2]


@pytest.mark.parametrize("units", [6, 260])  # one at a time, and in chunks
def test_units_of_several_channels_and_layers_go_where_all_lose_least(units):
    generator = torch.Generator().manual_seed(1)
    # a 1×1 layer with two channels for each unit, one of them beside others, and a k×k layer with one
    parts = [
        torch.randperm(2 * units + 3, generator=generator)[: 2 * units].view(units, 2),
        torch.arange(units)[:, None],
    ]
    shapes = [(4, 2 * units + 3, 1), (3, units, 2)]
    fits, problems = [], []
    for (outputs, channels, taps), places in zip(shapes, parts, strict=True):
        mix = torch.randn(channels * taps, channels * taps, generator=generator, dtype=torch.float64)
        weight = torch.randn(outputs, channels * taps, generator=generator, dtype=torch.float64)
        xx = mix @ mix.T / len(mix) + 0.1 * torch.eye(len(mix), dtype=torch.float64)
        sqrt = plain_roots(outputs).sqrt
        fits.append(channel_elimination.ConsumerFit(weight, xx, taps, sqrt, places))
        problems.append((sqrt @ weight, xx, taps, places))

    def error(problem, kept):
        """What is lost of tr(W C Wᵀ) when only these channels are regressed on."""
        weight, xx, taps, places = problem
        gone = torch.ones(len(places), dtype=torch.bool)
        gone[kept] = False
        left = torch.ones(len(xx), dtype=torch.bool)
        left[channel_elimination.patch_indices(places[gone].flatten(), taps)] = False
        yx = (weight @ xx)[:, left]
        explained = yx @ torch.linalg.solve(xx[left][:, left], yx.T)
        return float(1 - explained.trace() / (weight @ xx @ weight.T).trace())

    path = channel_elimination.eliminate_channels(fits, least=2, weights=[1.0, 0.5])
    assert len({*path.order}) == len(path.order) == units - 2
    # where several go at a time, the errors between are spread evenly
    for count in range(2, units) if units == 6 else (2,):
        kept = path.kept(count, units)
        for problem, losses in zip(problems, path.losses, strict=True):
            assert losses[units - count] == pytest.approx(error(problem, kept), rel=2e-3, abs=1e-9)
    everything = torch.arange(units)
    if units == 6:
        alone = [[error(p, everything[everything != unit]) for p in problems] for unit in everything]
        first = [a + 0.5 * b for a, b in alone]
        assert path.order[0] == int(torch.tensor(first).argmin())


def test_elimination_in_chunks_is_near_the_exact_one(monkeypatch):
    _, xx, weight = problem(outputs=8, channels=200, taps=1, samples=6000)
    path, _ = eliminate(weight, xx, 1, least=20)
    assert sorted(path.order) == sorted(set(path.order))
    assert len(path.order) == 180
    assert len(path.losses[0]) == 181
    assert list(path.losses[0]) == sorted(path.losses[0])


def test_balancing_keeps_what_a_chain_gives_and_evens_the_scales():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(3, 5, generator=generator, dtype=torch.float64) * 1e-6
    core = torch.randn(4, 3 * 9, generator=generator, dtype=torch.float64) * 1e3
    last = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    before = torch.einsum("ps,srt,ri->pit", last, core.view(4, 3, 9), first)
    one, two, three = low_rank.balance_scales([first, core, last])
    torch.testing.assert_close(torch.einsum("ps,srt,ri->pit", three, two.view(4, 3, 9), one), before)
    torch.testing.assert_close(two.norm(dim=1), three.norm(dim=0))
    assert 0.1 < float(one.norm() / two.norm()) < 10
    assert low_rank.balance_scales([first * 0, core])[0].isfinite().all()  # a channel that is never used
