import pytest
import torch
from torch import nn

import nin
from nin.config import TrainConfig
from nin.report.receptive_field import ReceptiveField, layer_field, probe, receptive_field
from nin.server.layer_graph import layer_nodes

CPU = torch.device("cpu")


def test_the_field_of_nin_imagenet_is_195_pixels():
    field = receptive_field(nin.models.nin_imagenet(3).eval(), (3, 224, 224))
    assert field == ReceptiveField((6, 6), (195, 195), (224, 224))
    assert str(field).startswith("The map has 6×6 cells, and each is computed from 195×195 of the 224×224 pixels.")


@pytest.mark.parametrize(("name", "size"), [("nin_digits", 40), ("nin_cifar", 60)])
def test_layers_and_pixels_that_are_no_number_agree(name, size):
    network = getattr(nin.models, name)(2).eval()
    channels = network.config.in_channels
    counted = layer_field(layer_nodes(network))
    rows, columns = network.maps(torch.zeros(1, channels, size, size)).shape[-2:]
    assert [probe(network.maps, (channels, size, size), (rows, columns), axis, CPU) for axis in (0, 1)] == [counted] * 2
    assert counted < size
    # with images as small as the area, it ends at their edges
    assert receptive_field(network, (channels, counted - 2, counted - 2)).pixels == (counted - 2,) * 2


def test_probing_dilation_pooling_strides_and_gaps():
    network = nn.Sequential(
        nn.Conv2d(1, 2, 3, stride=2), nn.ReLU6(), nn.MaxPool2d(2), nn.Conv2d(2, 2, (3, 1), dilation=2), nn.Hardswish()
    )
    with torch.inference_mode():
        cells = network(torch.zeros(1, 1, 60, 60)).shape[-2:]
    # 3, then 3 + (2 - 1) · 2 = 5 in steps of 4, then along the height 2 · 2 steps more
    assert [probe(network, (1, 60, 60), cells, axis, CPU) for axis in (0, 1)] == [21, 5]


def test_a_mean_over_the_image_makes_every_cell_see_all():
    class Excitation(nn.Module):
        def forward(self, x):
            return x * x.mean((2, 3), keepdim=True).sigmoid()

    network = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), Excitation())
    assert probe(network, (1, 20, 20), (20, 20), 0, CPU) == 20


def test_what_a_cell_can_show_in_words():
    assert "cannot show where" in str(ReceptiveField((1, 1), (65, 65), (65, 65)))
    assert "can depend on the whole image, 224×224 pixels" in str(ReceptiveField((7, 7), (224, 224), (224, 224)))
    assert "within half of that distance" in str(ReceptiveField((24, 24), (27, 27), (96, 96)))


@pytest.mark.parametrize(
    ("size", "model"),
    [(16, "nin_digits"), (17, "nin_cifar"), (64, "nin_cifar"), (71, "nin_imagenet"), (96, "nin_imagenet")],
)
def test_a_network_is_chosen_by_cost_too(size, model):
    config = TrainConfig().resolve(images=5000, image_size=size, flip=False, shift=0)
    assert config.model == model
    network = nin.models.create(model, 2)
    limit = nin.cost(nin.models.nin_imagenet(2), (1, 3, 224, 224)).macs
    assert nin.cost(network, (1, network.config.in_channels, size, size)).macs <= limit
