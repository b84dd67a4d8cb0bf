"""Random models, fused, agree with plain PyTorch after and during anything that people do to a model.

Three copies of a model go through the same actions: PyTorch's in float64 (the truth), PyTorch's in the dtype under
test, and the fused one. After every action the fused one must be about as near to the truth as PyTorch's own.
"""

import copy
import functools
import io

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import parametrizations, parametrize, prune

import nin
from support.random_models import in_plain_pytorch, models

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit:FutureWarning",  # PyTorch's forward mode scripts a few functions when it is first used
    "ignore:`torch.jit:DeprecationWarning",
    "ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning",
    "ignore:There is a performance drop because we have not yet implemented the batching rule:UserWarning",
)

LAYERS = nn.Conv2d | nn.Linear


def layers_of(model):
    return sorted(n for n, m in model.named_modules() if isinstance(m, LAYERS))


def pick(names, number):
    return names[number % len(names)] if names else None


def parameter_names(model):
    return sorted(name for name, _ in model.named_parameters())


def needs_layer(change):
    """Return a change that leaves a model alone that has no layer of PyTorch's."""

    @functools.wraps(change)
    def wrapped(model, number, x):
        return change(model, number, x) if layers_of(model) else model

    return wrapped


def dense(parameters):
    """Make parameters contiguous, as PyTorch's own functions on flat vectors need them."""
    for parameter in parameters:
        parameter.data = parameter.data.contiguous()


def owner_of(model, name):
    path, _, last = name.rpartition(".")
    return model.get_submodule(path), last


# Each action is called with a model, a number that chooses among its layers, and an input in the model's dtype; it
# returns the model to go on with, or a result to compare and the model.


def write_data(model, number, x):
    model.get_parameter(pick(parameter_names(model), number)).data.mul_(-1.5)
    return model


def write_one_channel(model, number, x):
    model.get_parameter(pick(parameter_names(model), number)).data[0] = 0.75
    return model


def assign_data(model, number, x):
    parameter = model.get_parameter(pick(parameter_names(model), number))
    parameter.data = 2 * parameter.data.flip(0)
    return model


def write_through_numpy(model, number, x):
    parameter = model.get_parameter(pick(parameter_names(model), number))
    if parameter.dtype != torch.bfloat16:
        parameter.detach().numpy()[...] *= -2
    else:
        parameter.data.mul_(-2)
    return model


def set_storage(model, number, x):
    parameter = model.get_parameter(pick(parameter_names(model), number))
    with torch.no_grad():
        parameter.set_((parameter.detach() * 3 - 1).clone())
    return model


def write_in_place(model, number, x):
    with torch.no_grad():
        model.get_parameter(pick(parameter_names(model), number)).add_(0.5)
    return model


def swap(model, number, x):
    parameter = model.get_parameter(pick(parameter_names(model), number))
    torch.utils.swap_tensors(parameter, nn.Parameter(parameter.detach() * 1.5 + 0.25))
    return model


def assign_parameter(model, number, x):
    owner, name = owner_of(model, pick(parameter_names(model), number))
    if not parametrize.is_parametrized(owner) and not isinstance(owner, nn.ModuleList):
        setattr(owner, name, nn.Parameter(getattr(owner, name).detach() * -2))
    return model


def load_scaled(model, number, x):
    state = {k: (v * 1.25 if v.is_floating_point() else v) for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=number % 2 == 0)
    return model


def vector_to_parameters(model, number, x):
    dense(model.parameters())
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector * 1.5, model.parameters())
    return model


def statistics(model, number, x):
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.eval()  # the statistics behind it would be those of one draw, and each model has its own
    with torch.no_grad() if number % 2 else torch.enable_grad():
        model(3 * x + 1)
    return model.eval()


def norm_state(model, number, x):
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    if norms:
        norm = norms[number % len(norms)]
        norm.running_var.data.mul_(4)
        norm.running_mean.data.sub_(1)
    return model


def optimise(model, number, x):
    options = [{"foreach": True}, {"fused": True}, {"foreach": False}][number % 3]
    kind = [torch.optim.SGD, torch.optim.AdamW][number // 3 % 2]
    optimiser = kind([p for p in model.parameters() if p.requires_grad], lr=0.125, **options)
    for _ in range(2):
        optimiser.zero_grad()
        y = model(x)
        (y.float() if y.dtype in (torch.half, torch.bfloat16) else y).sigmoid().mean().backward()
        optimiser.step()
    return model


@needs_layer
def hook(model, number, x):
    model.get_submodule(pick(layers_of(model), number)).register_forward_hook(lambda _, args, out: out.clamp(max=1) + 1)
    return model


@needs_layer
def hook_inputs(model, number, x):
    model.get_submodule(pick(layers_of(model), number)).register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    return model


@needs_layer
def replace(model, number, x):
    name = pick(layers_of(model), number)
    owner, last = owner_of(model, name)
    old = getattr(owner, last)
    new = copy.deepcopy(old) if not parametrize.is_parametrized(old) and not hooked_weight(old) else None
    if new is None:
        return model
    with torch.no_grad():
        new.weight.mul_(-1)
    setattr(owner, last, nn.Sequential(new, nn.Tanh()) if number % 2 else new)
    return model


def hooked_weight(layer):
    return "weight" not in layer._parameters


@needs_layer
def prune_layer(model, number, x):
    layer = model.get_submodule(pick(layers_of(model), number))
    if not hooked_weight(layer):
        dense([layer.weight])
        prune.l1_unstructured(layer, "weight", 0.4)
    return model


@needs_layer
def weight_norm(model, number, x):
    layer = model.get_submodule(pick(layers_of(model), number))
    if not hooked_weight(layer):
        (nn.utils.weight_norm if number % 2 else parametrizations.weight_norm)(layer)
    return model


class Squared(nn.Module):
    def forward(self, weight):
        return weight * weight.abs()


@needs_layer
def parametrise(model, number, x):
    layer = model.get_submodule(pick(layers_of(model), number))
    if not hooked_weight(layer):
        parametrize.register_parametrization(layer, "weight", Squared())
    return model


def freeze(model, number, x):
    name = pick(parameter_names(model), number)
    if sum(p.requires_grad for p in model.parameters()) > 1:
        model.get_parameter(name).requires_grad_(False)
    return model


def to_channels_last(model, number, x):
    return model.to(memory_format=torch.channels_last)


def copied(model, number, x):
    return copy.deepcopy(model) if copyable(model) else model


def copyable(model):
    """Return whether PyTorch itself can copy the model: not with weights that pruning or weight_norm computed."""
    tensors = [t for m in model.modules() for t in vars(m).values() if isinstance(t, torch.Tensor)]
    return all(t.is_leaf for t in tensors)


def pickled(model, number, x):
    hooks = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    if hooks or not copyable(model) or any(parametrize.is_parametrized(m) for m in model.modules()):
        return model  # PyTorch cannot either
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def nothing(model, number, x):
    return model


CHANGES = [
    write_data,
    write_one_channel,
    assign_data,
    write_through_numpy,
    set_storage,
    write_in_place,
    swap,
    assign_parameter,
    load_scaled,
    vector_to_parameters,
    statistics,
    norm_state,
    optimise,
    hook,
    hook_inputs,
    replace,
    prune_layer,
    weight_norm,
    parametrise,
    freeze,
    to_channels_last,
    copied,
    pickled,
    nothing,
]


# What is computed of the model, given its input.


def values(model, x):
    with torch.no_grad():
        return [model(x)]


def values_in_inference_mode(model, x):
    with torch.inference_mode():
        return [model(x)]


def gradients(model, x):
    x = x.clone().requires_grad_()
    parameters = [p for p in model.parameters() if p.requires_grad]
    y = model(x)
    grads = torch.autograd.grad(y.sigmoid().sum(), [x, *parameters], allow_unused=True)
    return [y.detach(), *(g for g in grads if g is not None)]


def tangent(model, x):
    return list(jvp(model, (x,), (x.cos(),)))


def mapped(model, x):
    return [vmap(lambda image: model(image[None])[0])(x)]


def mapped_gradients(model, x):
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, image):
        return functional_call(model, parameters, (image[None],)).sigmoid().sum()

    if any(hooked_weight(m) for m in model.modules() if isinstance(m, LAYERS)):
        return gradients(model, x)
    grads = vmap(grad(loss), (None, 0))(parameters, x)
    return [grads[name] for name in sorted(grads)]


def in_training(model, x):
    if any(isinstance(m, nn.Dropout | nn.Dropout2d) for m in model.modules()):
        return values(model, x)
    model.train()
    y = gradients(model, x)
    model.eval()
    return y


LOOKS = [values, values, values_in_inference_mode, gradients, tangent, mapped, mapped_gradients, in_training]

# of the output's largest value, above what PyTorch's own result is off by
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


def compare(look, truth, plain, fused, x, note):
    try:
        exact = look(truth, x.double())
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return  # PyTorch itself cannot differentiate it: ReLU(inplace=True) behind a layer that needs its result
    near = look(plain, x)
    result = look(fused, x)
    assert len(result) == len(near) == len(exact), note
    for got, other, want in zip(result, near, exact, strict=True):
        assert got.shape == other.shape, note
        assert got.dtype == other.dtype, note
        scale = 1 + want.abs().max().item() if want.numel() else 1
        error, allowed = ((t.double() - want).abs().max().item() if t.numel() else 0 for t in (got, other))
        # what is not finite in PyTorch need not be here, and tells nothing
        if want.isfinite().all() and other.isfinite().all():
            assert error <= 16 * allowed + TOLERANCE[x.dtype] * scale, f"{note}: off by {error}, PyTorch by {allowed}"


def check_random_model(data):
    model = data.draw(models().filter(lambda model: any(True for _ in model.parameters())))
    dtype = data.draw(st.sampled_from([torch.float32] * 4 + [torch.float64, torch.bfloat16, torch.float16]))
    layout = data.draw(st.sampled_from([torch.contiguous_format, torch.channels_last]))
    size = data.draw(st.integers(2, 3)), 3, data.draw(st.integers(4, 9)), data.draw(st.integers(4, 9))
    training = data.draw(st.integers(0, 4)) == 0
    x = torch.randn(size).to(dtype).contiguous(memory_format=layout)
    model = model.to(dtype)
    plain = in_plain_pytorch(model)
    truth = copy.deepcopy(plain).double()
    fused = nin.fuse(model, training=training).model
    steps = ["fuse for training" if training else "fuse"]
    for _ in range(data.draw(st.integers(1, 4))):
        change, number = data.draw(st.sampled_from(CHANGES)), data.draw(st.integers(0, 23))
        look = data.draw(st.sampled_from(LOOKS))
        steps += [f"{change.__name__}({number})", look.__name__]
        truth = change(truth, number, x.double())
        plain, fused = (change(m, number, x) for m in (plain, fused))
        note = f"{' → '.join(steps)}, {dtype}, {layout}, {tuple(size)}"
        assert list(fused.state_dict()) == list(plain.state_dict()), note
        compare(look, truth, plain, fused, x, note)
        compare(values, truth, plain, fused, x, note)


def examples(number):
    quiet = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    return settings(max_examples=number, derandomize=True, print_blob=True, **quiet)


@examples(40)
@given(data=st.data())
def test_fused_models_agree_with_plain_ones(data):
    check_random_model(data)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@examples(2000)
@given(data=st.data())
def test_many_fused_models_agree_with_plain_ones(data):
    check_random_model(data)
