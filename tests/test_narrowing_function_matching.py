"""All weights of a narrowed network fitted together: nearer to the original on images left apart, or left alone."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

import nin
from nin.errors import UserError
from nin.narrowing import NarrowOptions, pipeline
from nin.narrowing.function_matching import LEAST_PASSES, MOST_PASSES, count_passes, match_function, split_images
from nin.narrowing.recalibration import calibration_error

QUIET = NarrowOptions(measure_latency=False, passes=2)


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 4)).eval()


def other(model):
    """Return a copy with other weights, none of which requires gradients."""
    changed = copy.deepcopy(model).requires_grad_(False)
    for p in changed.parameters():
        p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return changed


def batches(count=200, size=8):
    return list(torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1)).split(64))


def test_a_network_comes_nearer_on_images_that_it_has_not_seen():
    original, unseen = network(), [torch.randn(100, 3, 8, 8, generator=torch.Generator().manual_seed(2))]
    changed, seen = other(original), []
    before = copy.deepcopy(changed.state_dict())
    parts = split_images(original, batches())
    assert [sum(map(len, part)) for part in parts] == [160, 40]
    together = {tuple(x.flatten().tolist()) for part in parts for images in part for x in images}
    assert together == {tuple(x.flatten().tolist()) for images in batches() for x in images}
    fitted = match_function(changed, original, parts[0], passes=20, on_progress=lambda *progress: seen.append(progress))
    assert calibration_error(fitted, original, unseen) < 0.5 * calibration_error(changed, original, unseen)
    assert all(torch.equal(value, before[name]) for name, value in changed.state_dict().items())
    assert torch.equal(fitted[1].running_mean, original[1].running_mean)  # BatchNorm is as in evaluation
    assert not any(p.requires_grad or p.grad is not None for p in fitted.parameters())
    assert not fitted.training
    assert seen[-1] == ("Fitting all weights together", 60, 60)  # 160 images, 50 a step
    again = match_function(changed, original, parts[0], passes=20)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in fitted.state_dict().items())


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = network()

    def forward(self, x):
        y = self.one(x)
        return y, y + 1


@pytest.mark.parametrize(
    ("original", "images"),
    [
        (network, batches(100)),  # too few
        (Both, batches()),
        (network, [{"input": x} for x in batches()]),
        (network, [batches()[0], torch.randn(200, 3, 9, 9)]),
    ],
    ids=["few", "two outputs", "keywords", "sizes"],
)
def test_what_it_is_not_for_is_left_as_it_is(original, images):
    assert split_images(original(), images) is None


def test_a_network_that_does_not_come_nearer_is_left_as_it_is(monkeypatch):
    """What spoils the weights is found by images left apart, and the layers are fitted to all of them again."""

    def spoil(model, **options):
        return other(model)

    plain = nin.narrow(network(), batches(), macs=0.3, options=dataclasses.replace(QUIET, matching_passes=0))
    monkeypatch.setattr(pipeline, "match_function", spoil)
    left = nin.narrow(network(), batches(), macs=0.3, options=dataclasses.replace(QUIET, matching_passes=1))
    assert left.report.notes == plain.report.notes
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(left.model.state_dict()[name], value, rtol=0, atol=0)


def test_it_is_done_where_it_costs_little():
    assert count_passes(500, (41_000_000, 25_000_000)) == 25  # ResNet-20 of CIFAR
    assert count_passes(10, (1000, 500)) == MOST_PASSES
    assert count_passes(512, (400_000_000, 240_000_000)) == 0  # EfficientNet-Lite0 at 224
    assert LEAST_PASSES <= count_passes(500, (125_000_000, 75_000_000)) < MOST_PASSES


def test_the_report_says_that_it_was_done():
    def colours(seed):  # whose mixtures are images like them
        generator = torch.Generator().manual_seed(seed)
        return 2 * torch.randn(300, 3, 1, 1, generator=generator) + torch.randn(300, 3, 8, 8, generator=generator)

    model, images = network(), [colours(1)]
    plain, fitted = (
        nin.narrow(model, images, macs=0.3, options=dataclasses.replace(QUIET, matching_passes=n)) for n in (0, 20)
    )
    assert plain.plan == fitted.plan
    note = "All weights were fitted together to the original's outputs, 20 passes over mixed images."
    assert note not in plain.report.notes
    assert note in fitted.report.notes
    unseen = [colours(2)]
    errors = [calibration_error(result.model, model, unseen) for result in (plain, fitted)]
    assert errors[1] < errors[0]
    by_default = nin.narrow(model, images, macs=0.3, options=QUIET).report
    assert any(f"{MOST_PASSES} passes over mixed images" in note for note in by_default.notes)
    with pytest.raises(UserError, match="matching_passes must be at least 0"):
        NarrowOptions(matching_passes=-1)
