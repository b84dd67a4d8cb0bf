"""Looking inside any network of nin: its layers are the network, narrowed ones too, and few directions are the best."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import nin
from nin import models
from nin.narrowing import LayerPlan, Plan
from nin.server import activations, pca
from nin.server.layer_graph import layer_nodes


def small_nin():
    torch.manual_seed(0)
    return models.nin_digits(5).eval()


def small_googlenet(monkeypatch):
    inceptions = ((192, 8, 6, 8, 4, 4, 4), None, (24, 6, 4, 6, 4, 6, 6))
    monkeypatch.setattr(models.GoogLeNet, "INCEPTIONS", inceptions)
    torch.manual_seed(0)
    model = models.googlenet(5).eval()
    model.classifier = torch.nn.Linear(24, 5)
    return model


PLANS = {
    models.NiN: [("blocks.0.0.2", "output", None, 20, 64, 64), ("blocks.1.0.0", "tucker", 20, 24, 64, 128)],
    models.GoogLeNet: [("inceptions.0.threes.1.0", "tucker", 3, 4, 6, 8), ("classifier", "output", None, 3, 24, 5)],
}


def narrowed(model):
    """Return the network with two layers taken apart, with random weights."""
    layers = tuple(LayerPlan(*values) for values in PLANS[type(model)])
    return nin.apply_plan(model, Plan(layers, (), "macs", 0.5)).eval()


@pytest.fixture(params=["nin", "nin narrowed", "googlenet", "googlenet narrowed"])
def network(request, monkeypatch):
    shape = (1, 8, 8) if request.param.startswith("nin") else (3, 32, 32)
    model = small_nin() if shape[0] == 1 else small_googlenet(monkeypatch)
    return (narrowed(model) if "narrowed" in request.param else model), torch.rand(3, *shape)


def test_the_layers_are_the_network(network):
    model, x = network
    layers = activations.layers(model)
    values = [activations.layer_activations(model, x, index) for index in range(len(layers))]
    with torch.inference_mode():
        torch.testing.assert_close(values[-1], model.maps(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(values[-1].mean((2, 3)), model(x), atol=1e-5, rtol=1e-4)
    for layer, node, value in zip(layers, layer_nodes(model), values, strict=True):
        given = [values[i] for i in layer.inputs]
        assert value.shape[1] == layer.channels
        if layer.kind == "convolution":
            weight, bias = activations.layer_weights(model, layers.index(layer))
            expected = F.conv2d(given[0], weight, bias, stride=layer.stride, padding=layer.padding)
            expected = expected.relu() if layer.activation == "relu" else expected
        elif layer.kind == "joining":
            expected = torch.cat(given, 1)
        elif layer.kind == "pooling":
            expected = node.module(given[0])
        else:
            expected = x
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)


def test_names_and_places_are_unique_and_narrowed_layers_keep_theirs(monkeypatch):
    for whole in (small_nin(), small_googlenet(monkeypatch)):
        before, after = activations.layers(whole), activations.layers(narrowed(whole))
        for layers in (before, after):
            assert len({layer.name for layer in layers}) == len({layer.place for layer in layers}) == len(layers)
        assert [layer.name for layer in before] == [layer.place for layer in before]
        assert {layer.place for layer in before} <= {layer.place for layer in after}
        assert sum(", part 1 of " in layer.name for layer in after) == 2


def test_inceptions_are_named_as_in_their_paper():
    names = [layer.name for layer in activations.layers(models.googlenet(2))]
    assert [name for name in names if name.endswith("joined")] == [
        f"inception {name}, joined" for name in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b")
    ]
    assert {"inception 4e, before the 5×5, 1×1", "inception 3a, after the pooling, 1×1"} <= set(names)


def test_sums_are_what_comes_before_the_activation(network):
    model, x = network
    sums = activations.layer_activations(model, x, 1, sums=True)
    assert (sums < 0).any()
    assert torch.equal(sums.relu(), activations.layer_activations(model, x, 1))


def test_dead_channels_do_not_depend_on_how_many_images_go_at_once(network, monkeypatch):
    model, x = network
    with torch.no_grad():
        node = next(node for node in layer_nodes(model) if node.layer.activation == "relu")
        node.bias[1] = -1e6
    index = next(i for i, one in enumerate(layer_nodes(model)) if one.layer == node.layer)
    together = activations.dead_channels(model, x)
    monkeypatch.setattr(activations, "ACTIVATION_BATCH_SIZE", 2)
    assert activations.dead_channels(model, x) == together
    assert 1 in together[index]


def covariance(rows):
    centred = rows - rows.mean(0)
    return centred.mT @ centred / len(rows)


def test_a_spectrum_is_the_covariance_of_the_sums(network, monkeypatch):
    model, x = network
    monkeypatch.setattr(activations, "ACTIVATION_BATCH_SIZE", 2)
    found = pca.principal_components(model, x, 1)
    sums = activations.layer_activations(model, x, 1, sums=True)
    rows = sums.movedim(1, -1).flatten(0, 2).double()
    expected = covariance(rows)
    rebuilt = found.directions.mT @ found.variances.diag() @ found.directions
    torch.testing.assert_close(rebuilt, expected, atol=1e-6, rtol=1e-5)
    assert (found.variances.diff() <= 0).all()
    assert (found.pixels, found.images) == (sums.shape[2] * sums.shape[3], len(x))
    # what is lost with r directions is the variance of the others, and with all of them nothing
    for rank in (1, 3, len(found.mean)):
        back = pca.low_rank_output(sums, found, rank, "none").movedim(1, -1).flatten(0, 2).double()
        lost = ((back - rows) ** 2).sum(1).mean()
        assert lost.item() == pytest.approx(found.variances[rank:].sum().item(), rel=1e-3, abs=1e-5)


def test_no_two_convolutions_of_that_rank_come_closer():
    model, x = small_nin(), torch.rand(16, 1, 8, 8)
    found = pca.principal_components(model, x, 2)
    y = activations.layer_activations(model, x, 2, sums=True)
    best = (pca.low_rank_output(y, found, 3, "none") - y).square().mean()
    for seed in range(5):
        other, _ = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)))
        guess = dataclasses.replace(found, directions=other.double())
        assert (pca.low_rank_output(y, guess, 3, "none") - y).square().mean() > best


def test_scores_of_a_narrowed_layer_are_those_of_two_convolutions(network):
    model, x = network
    index, rank = 1, 4
    layer = activations.layers(model)[index]
    found = pca.principal_components(model, x, index)
    kept, mean = found.directions[:rank].float(), found.mean.float()
    weight, bias = activations.layer_weights(model, index)
    narrow = torch.einsum("rc,cikl->rikl", kept, weight)
    inner = F.conv2d(x, narrow, kept @ (bias - mean), stride=layer.stride, padding=layer.padding)
    outer = F.conv2d(inner, kept.mT[:, :, None, None], mean).relu()
    nodes = layer_nodes(model)
    *_, (_, maps) = activations.layer_outputs(nodes, x, lambda place, value: outer if place == index else value)
    scores = pca.narrowed_scores(model, x, index, found, rank)
    torch.testing.assert_close(scores, maps.mean((2, 3)), atol=1e-4, rtol=1e-4)
    with torch.inference_mode():
        whole = pca.narrowed_scores(model, x, index, found, len(mean))
        torch.testing.assert_close(whole, model(x), atol=1e-4, rtol=1e-4)


def test_what_has_no_spectrum_is_refused():
    model, x = small_nin(), torch.rand(2, 1, 8, 8)
    for index in (0, 4, 99):
        with pytest.raises(LookupError, match="layer"):
            pca.principal_components(model, x, index)
