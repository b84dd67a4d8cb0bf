"""A chain of layers as a graph of ONNX, built directly: the exporter would take seconds for each of a thousand."""

from typing import Any

import numpy as np

from nin.models.layer_spec import LayerSpec

# PyTorch's names of padding in ONNX; zeros are a part of the convolution. OpenVINO does not wrap around: to copy the
# edge takes as long.
_PADDING_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "edge"}

# of the operators, and the format of the file that goes with it: engines of years ago read both
OPSET, IR_VERSION = 17, 8


def chain_to_onnx(chain: tuple[LayerSpec, ...]) -> bytes:
    """Return a graph of a chain of layers with random weights, at any batch size.

    Each layer has a bias, as BatchNorm is folded into one, and the last a ReLU, which stands for its activation:
    engines compute both in the same pass. Without layers, the graph is the ReLU of one number.
    """
    import onnx
    from onnx import helper, numpy_helper

    rng = np.random.default_rng(0)
    nodes, weights, value = [], [], "images"

    def add_weight(name: str, *shape: int) -> str:
        values = rng.standard_normal(shape, dtype=np.float32) / np.sqrt(np.prod(shape[1:]) or 1)
        weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    for number, spec in enumerate(chain):
        result, bias = f"y{number}", add_weight(f"b{number}", spec.out_channels)
        if spec.kind == "linear":
            weight = add_weight(f"w{number}", spec.in_channels, spec.out_channels)
            nodes.append(helper.make_node("MatMul", [value, weight], [f"p{number}"]))
            nodes.append(helper.make_node("Add", [f"p{number}", bias], [result]))
        else:
            weight = add_weight(f"w{number}", spec.out_channels, spec.in_channels // spec.groups, *spec.kernel_size)
            pads = _pads(spec)
            if spec.padding_mode != "zeros" and any(pads):
                amounts = numpy_helper.from_array(np.array([0, 0, *pads[:2], 0, 0, *pads[2:]], np.int64), f"a{number}")
                weights.append(amounts)
                mode = _PADDING_MODES[spec.padding_mode]
                nodes.append(helper.make_node("Pad", [value, f"a{number}"], [f"x{number}"], mode=mode))
                value, pads = f"x{number}", [0] * 4
            geometry: dict[str, Any] = {"strides": spec.stride, "dilations": spec.dilation, "pads": pads}
            geometry |= {"kernel_shape": spec.kernel_size, "group": spec.groups}
            nodes.append(helper.make_node("Conv", [value, weight, bias], [result], **geometry))
        value = result
    nodes.append(helper.make_node("Relu", [value], ["y"]))
    shape: list[str | int | None] = ["batch", *input_shape(chain)] if chain else [1, 1, 1, 1]
    images = helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "layers", [images], [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = IR_VERSION
    return bytes(model.SerializeToString())


def input_shape(chain: tuple[LayerSpec, ...]) -> tuple[int, ...]:
    """Return the shape of one input of a chain: (C, H, W), or of fully connected layers (positions, C)."""
    first = chain[0]
    if first.kind == "linear":
        return first.input_size[0], first.in_channels
    return first.in_channels, *first.input_size


def _pads(spec: LayerSpec) -> list[int]:
    """Return the padding at the top, left, bottom and right, with what the layer pads itself."""
    left, right, top, bottom = spec.own_padding
    starts, ends = [top, left], [bottom, right]
    for axis in range(2):
        if spec.padding == "same":  # of stride 1; what is odd comes last, as in PyTorch
            total = spec.dilation[axis] * (spec.kernel_size[axis] - 1)
            own = total // 2, total - total // 2
        else:
            own = (0, 0) if isinstance(spec.padding, str) else (spec.padding[axis],) * 2
        starts[axis] += own[0]
        ends[axis] += own[1]
    return [*starts, *ends]
