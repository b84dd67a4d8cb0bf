"""Batches of one image under BatchNorm: every trainer takes them, by one rule."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import nin
from nin import data, training
from nin.cli import app
from nin.narrowing import DistillationStep, FinetuneConfig, NarrowOptions, recalibration
from nin.runtime.single_value_norm import normalise_single_values

QUIET = NarrowOptions(measure_latency=False, revert_slower=False)


def headed():
    """Return a network with BatchNorm over images, over single pixels and over vectors."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(8, 8, 1),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(8, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Linear(8, 2),
    )


def test_single_values_take_the_running_statistics_and_leave_them():
    model, x = headed().train(), torch.randn(1, 3, 6, 6)
    for module in model:
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    expected = copy.deepcopy(model)
    for i in (5, 8):
        expected[i].eval()
    statistics = model[8].running_mean.clone()
    with normalise_single_values(model):
        result = model(x)
    torch.testing.assert_close(result, expected(x), rtol=0, atol=0)
    assert torch.equal(model[8].running_mean, statistics)
    # that over the whole image is as PyTorch has it
    torch.testing.assert_close(model[1].running_mean, expected[1].running_mean, rtol=0, atol=0)
    assert all(module.training and not module._forward_hooks and not module._forward_pre_hooks for module in model)
    result.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_batches_of_two_are_as_before_and_so_is_an_error():
    model, x = headed().train(), torch.randn(2, 3, 6, 6)
    plain = copy.deepcopy(model)
    with normalise_single_values(model):
        torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)
        with pytest.raises(RuntimeError):  # the layer is as before when the call fails
            model[8](torch.randn(1, 8).double())
    assert model[8].training
    assert torch.equal(model[8].running_var, plain[8].running_var)
    with pytest.raises(ValueError, match="Expected more than 1 value"):
        model(x[:1])


def test_an_instance_norm_over_one_pixel():
    norm = nn.InstanceNorm2d(4, track_running_stats=True)
    with normalise_single_values(norm):
        assert norm(torch.ones(3, 4, 1, 1)).shape == (3, 4, 1, 1)
        assert norm(torch.randn(3, 4, 2, 2)).mean((2, 3)).abs().max() < 1e-6  # each image by its own pixels
    norm = nn.InstanceNorm1d(4, track_running_stats=True)
    with normalise_single_values(norm):
        assert norm(torch.randn(4, 7)).mean(1).abs().max() < 1e-6  # one image without a first dimension


def arrays(count):
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)
    return pixels, np.arange(count) % 2


@pytest.mark.parametrize(("count", "batch_size"), [(9, 1), (3, 2), (2, 64)])
def test_training_takes_batches_of_one_and_resumes_to_the_same_weights(count, batch_size):
    images = data.load((arrays(count), arrays(4)))
    config = nin.TrainConfig(epochs=2, batch_size=batch_size, precision="fp32", learning_rate=0.01)
    results = [training.train(images, config, network=headed) for _ in range(2)]
    for a, b in zip(*(r.model.state_dict().values() for r in results), strict=True):
        assert torch.isfinite(a).all()
        assert torch.equal(a, b)


def test_distillation_takes_batches_of_one():
    teacher, student = headed().eval(), headed()
    step = DistillationStep(student, teacher, FinetuneConfig(precision="fp32"), steps=4)
    for size in (1, 4, 1, 1):
        assert np.isfinite(step(torch.randn(size, 3, 6, 6), torch.zeros(size, dtype=torch.int64)))
    assert all(torch.isfinite(value).all() for value in step.finish().state_dict().values())


def test_recalibration_counts_the_batches_that_have_a_variance():
    model, batches = headed().eval(), [torch.randn(n, 3, 6, 6) for n in (1, 5, 4)]
    again = recalibration.recalibrate_batchnorm(model, batches)
    with torch.no_grad():
        seen = [model[0](x) for x in batches]
    torch.testing.assert_close(again[1].running_mean, torch.stack([y.mean((0, 2, 3)) for y in seen]).mean(0))
    assert (int(again[1].num_batches_tracked), int(again[8].num_batches_tracked)) == (3, 2)
    single = recalibration.recalibrate_batchnorm(model, batches[:1])
    assert torch.equal(single[8].running_mean, model[8].running_mean)  # nothing was seen


@pytest.mark.filterwarnings("ignore:fewer samples than values")
def test_narrowing_takes_batches_of_one():
    result = nin.narrow(headed().eval(), [torch.randn(n, 3, 6, 6) for n in (1, 1, 8)], macs=0.8, options=QUIET)
    assert result.report.macs[1] <= 0.8 * result.report.macs[0]


def test_nin_narrow_fine_tunes_on_65_images(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    for part, count in (("train", 65), ("test", 4)):
        for i in range(count):
            folder = tmp_path / "photos" / part / "ab"[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(folder / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "headednets.py").write_text(
        "from torch import nn\n"
        "def headed():\n"
        "    head = nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)\n"
        "    pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()\n"
        "    body = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3), nn.ReLU()\n"
        "    return nn.Sequential(*body, *pool, *head)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import headednets

    torch.save(headednets.headed().state_dict(), "headed.pt")
    command = ["narrow", "--model", "headednets:headed", "--weights", "headed.pt", "--data", "photos", "--size", "8"]
    command += ["--macs", "0.7", "--images", "65", "--finetune", "2", "--out", "out", "--resume"]
    app.main(command)
    assert "holds nothing to resume yet: the narrowing begins" in capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").exists()
    app.main(command)  # a supervisor that says so each time
    assert "is finished; this is its result" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        app.main([*command[:-1], "--resume", "--macs", "0.6"])
