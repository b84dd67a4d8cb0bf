"""Networks of other packages with their trained weights, all of them."""

from pathlib import Path

from nin.errors import UserError
from nin.models.factory import ExternalModel, create_external_model
from nin.models.head_surgery import cut_head
from nin.models.initial_weights import InitialWeights
from nin.names import LIBRARIES


def load_trained(name: str, weights: Path) -> ExternalModel:
    """Return a network with the weights of a file, in evaluation mode.

    Where the file is of another number of classes or of channels of the images than the network has by default, timm
    and torchvision make the network for those of the file.

    Args:
        name: ``timm:NAME``, ``torchvision:NAME`` or ``package.module:factory``, see `create_external_model`.
        weights: a ``state_dict`` in a .safetensors file, or one that ``torch.save`` wrote; it is read with
            ``weights_only=True``, so that it cannot run code. Names or, where they are others, the order of all
            tensors must be the network's.

    Raises:
        UserError: there is no such network, the file holds no weights, or not exactly those of the network.
    """
    tensors = InitialWeights.of_file(weights)
    external = create_external_model(name)
    class_layer = cut_head(external.model.eval()).class_layer
    if tensors.is_of_classifier and not {"body", "head"} & dict(external.model.named_children()).keys():
        raise UserError(f"{weights} is of a run of nin: give the run folder, {weights.parent}, instead of {name}")
    other = tensors.find_other_numbers(external.model, class_layer)
    if other and name.partition(":")[0] in LIBRARIES:
        external = create_external_model(name, **other)
    tensors.load_all_into(external.model.eval(), class_layer, name)
    return external
