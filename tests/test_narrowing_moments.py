"""Patches and their moments: against the layers themselves, and added up over processes."""

import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn

from nin.models.layer_spec import LayerSpec
from nin.narrowing import calibration, moments
from nin.narrowing.calibration import measure_layer_specs
from nin.narrowing.dependency_graph import build_dependency_graph
from nin.narrowing.linalg import least_squares
from nin.narrowing.moments import Moments, collect_moments
from nin.narrowing.patches import POSITIONS_PER_IMAGE, extract_outputs, extract_patches, sampled_positions
from nin.narrowing.search_space import Factorisation, SearchSpace
from nin.narrowing.sensitivity import measure_sensitivities
from nin.narrowing.shortcuts import shortcut_weights

SHAPES = {
    "plain": (nn.Conv2d(4, 6, 3), (5, 4, 9, 8)),
    "padding and stride": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2)), (5, 4, 9, 8)),
    "dilation, same": (nn.Conv2d(4, 6, (4, 3), dilation=2, padding="same"), (5, 4, 9, 8)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2, padding=1), (5, 4, 9, 8)),
    "reflect": (nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"), (5, 4, 9, 8)),
    "circular": (nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="circular"), (5, 4, 9, 8)),
    "more positions than are looked at": (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 20, 20)),
    "one image without a batch": (nn.Conv2d(4, 6, 3, padding=1), (4, 9, 8)),
    "no image": (nn.Conv2d(4, 6, 3), (0, 4, 9, 8)),
    "linear": (nn.Linear(4, 6), (5, 4)),
    "linear on three dimensions": (nn.Linear(4, 6), (5, 7, 4)),
}


@pytest.mark.parametrize(("layer", "size"), SHAPES.values(), ids=SHAPES.keys())
def test_patches_are_what_the_layer_multiplies(layer, size):
    x = torch.randn(size)
    spec = measure_layer_specs(layer, {"": layer}, [x])[""]
    assert len(sampled_positions(spec.positions)) == min(spec.positions, POSITIONS_PER_IMAGE)
    seen = extract_patches(x, spec)
    weight = layer.weight.flatten(1).view(spec.groups, -1, spec.patch)
    expected = extract_outputs(layer(x), spec)
    got = weight @ seen + layer.bias.view(spec.groups, -1, 1)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_moments_are_means_and_covariances():
    moments = Moments(2, 3, 4, device=torch.device("cpu"), products=("xx", "yx", "yy"))
    x, y = torch.randn(2, 3, 100), torch.randn(2, 4, 100) + 5
    for part in range(0, 100, 25):
        moments.add(x[:, :, part : part + 25], y[:, :, part : part + 25])
    assert moments.count == 100
    torch.testing.assert_close(moments.mean("y"), y.double().mean(2))
    for g in range(2):
        both = torch.cat([x[g], y[g]]).double().cov(correction=0)
        torch.testing.assert_close(moments.covariance("xx")[g], both[:3, :3])
        torch.testing.assert_close(moments.covariance("yx")[g], both[3:, :3])
        torch.testing.assert_close(moments.covariance("yy")[g], both[3:, 3:])


def test_wide_patches_keep_the_covariance_of_the_result_only(monkeypatch):
    monkeypatch.setattr(moments, "LARGEST_PATCH", 8)
    layer = nn.Linear(9, 4)
    kept = Moments.of_layer(LayerSpec.of_module("", layer), layer, "xx")
    assert kept.products == ("yy",)
    assert not kept.has_patch_covariance


def shrinkage_of(samples, positions=1, parts=1):
    """Return the shrinkage, and the covariance of the samples as it is and shrunk."""
    kept = Moments(1, len(samples), 1, device=torch.device("cpu"), products=("xx",), positions=positions)
    for part in samples[None].chunk(parts, 2):
        kept.add(part, torch.zeros(1, 1, part.shape[2]))
    return float(kept.shrinkage()), kept.covariance("xx")[0], kept.shrunk_covariance()[0]


def test_a_covariance_is_shrunk_by_what_few_images_leave_open():
    torch.manual_seed(0)
    mixing = torch.randn(24, 24)
    few, many = mixing @ torch.randn(24, 40) + 3, mixing @ torch.randn(24, 4000) + 3
    share, seen, shrunk = shrinkage_of(few)
    assert shrinkage_of(many)[0] < 0.02 < 0.2 < share < 0.8
    truth = (mixing @ mixing.T).double()
    assert (shrunk - truth).norm() < 0.9 * (seen - truth).norm()
    torch.testing.assert_close(shrunk.diagonal(), seen.diagonal())
    assert shrinkage_of(few, parts=4)[0] == pytest.approx(share, rel=0.1)
    # pixels of one image say nothing new
    assert shrinkage_of(few.repeat_interleave(8, 1), positions=8)[0] == pytest.approx(share, rel=1e-4)
    assert shrinkage_of(many.repeat_interleave(32, 1), positions=32)[0] < 0.02  # more values than pixels, and fewer
    assert shrinkage_of(torch.randn(24, 40))[0] > 0.8  # no value is related with another
    assert shrinkage_of(few[:, :1])[0] == shrinkage_of(torch.ones(24, 40))[0] == 0  # nothing is known


def test_a_fit_to_few_images_does_not_follow_the_noise():
    """What a layer is wanted to give holds errors of the layers before it, which its input does not tell."""
    torch.manual_seed(0)
    mixing, weight = torch.randn(96, 96), torch.randn(8, 96) / 10
    x = mixing @ torch.randn(96, 80)
    y = weight @ x
    kept = Moments(1, 96, 8, device=torch.device("cpu"), products=("xx", "yx"))
    kept.add(x[None], (y + 0.5 * y.std() * torch.randn(y.shape))[None])
    xx, yx, share = kept.covariance("xx")[0], kept.covariance("yx")[0], kept.shrinkage()[0]

    def unseen_error(shrinkage):
        change = least_squares(weight.double(), xx, yx, shrinkage) - weight
        return float((change @ mixing.double()).square().sum() / (weight @ mixing).square().sum())

    assert unseen_error(share) < 0.25
    assert unseen_error(0.0) > 3 * unseen_error(share)


def observe_in_process(rank, port, path):
    """Look at half of the batches in one of two processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    layer, batches = example()
    shapes = measure_layer_specs(layer, {"": layer}, batches)
    moments = collect_moments(layer, shapes, batches[rank::2])[""]
    if rank == 0:
        torch.save(moments.sums, path)
    dist.destroy_process_group()


def example():
    torch.manual_seed(0)
    return nn.Conv2d(3, 4, 3, padding=1), [torch.randn(n, 3, 6, 6) for n in (4, 3, 5, 1)]


def test_two_processes_find_what_one_finds(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(observe_in_process, (port, tmp_path / "sums.pt"), nprocs=2)
    layer, batches = example()
    shapes = measure_layer_specs(layer, {"": layer}, batches)
    alone = collect_moments(layer, shapes, batches)[""]
    together = torch.load(tmp_path / "sums.pt", weights_only=True)
    assert together["count"] == 13 * 36
    for name, value in alone.sums.items():
        # an estimate: each process takes it about the mean of its own first batch
        close = {"rtol": 0.01, "atol": 0.0} if name == "squares" else {}
        torch.testing.assert_close(together[name], value, **close)


class Residual(nn.Module):
    """A block whose second layer gives a small part of the sum."""

    def __init__(self):
        super().__init__()
        self.before, self.inside, self.norm = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        nn.init.constant_(self.norm.weight, 0.1)

    def forward(self, x):
        x = self.before(x).relu()
        return x + self.norm(self.inside(x))


def test_a_layer_before_an_addition_counts_by_its_part_of_the_sum():
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(8, 3, 8, 8)
    layers = {"before": model.before, "inside": model.inside}
    specs = measure_layer_specs(model, layers, [x])
    graph = build_dependency_graph(model, set(layers))
    equal = dict.fromkeys(layers, torch.eye(6, dtype=torch.float64)[None])
    with torch.no_grad():
        hidden = model.before(x).relu()
        part = model.norm(model.inside(hidden)).transpose(0, 1).flatten(1)
        whole = part + hidden.transpose(0, 1).flatten(1)
    expected = (part.var(1).sum() / whole.var(1).sum()).sqrt()
    weights = shortcut_weights(model, graph, specs, [x], equal)
    assert weights == {"inside": pytest.approx(float(expected), rel=1e-4)}
    assert 0 < weights["inside"] < 0.5
    space = SearchSpace({"inside": (Factorisation(loss=0.4),)}, {("before", "inside"): {4: 0.2, 2: 0.3}})
    counted = space.weighted({"inside": 0.5})
    assert counted.factorisations["inside"][0].loss == 0.2
    assert counted.widths == {("before", "inside"): {4: 0.1, 2: 0.15}}


def test_large_images_go_through_a_few_at_a_time(monkeypatch):
    layer, batches = example()
    specs = measure_layer_specs(layer, {"": layer}, batches)
    whole = collect_moments(layer, specs, batches)[""]
    monkeypatch.setattr(calibration, "PIXELS_AT_A_TIME", 2 * 36 + 1)
    seen = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    parts = collect_moments(layer, specs, batches)[""]
    measure_sensitivities(layer, specs, batches[:1])
    assert seen == [2, 2, 2, 1, 2, 2, 1, 1, 2, 2]
    for name in ("count", "x", "y", "xx"):
        torch.testing.assert_close(parts.sums[name], whole.sums[name])
    monkeypatch.setattr(calibration, "PIXELS_AT_A_TIME", 1)  # one image is the least
    seen.clear()
    collect_moments(layer, specs, batches[3:])
    assert seen == [1]
