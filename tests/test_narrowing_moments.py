"""Patches and their moments: against the layers themselves, and added up over processes."""

import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn

from nin.models.layer_spec import LayerSpec
from nin.narrowing import moments
from nin.narrowing.calibration import measure_layer_specs
from nin.narrowing.moments import Moments, collect_moments
from nin.narrowing.patches import POSITIONS_PER_IMAGE, extract_outputs, extract_patches, sampled_positions

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
        torch.testing.assert_close(together[name], value)
