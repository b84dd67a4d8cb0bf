"""Backward pass on a GPU: kernels for the gradients that travel from pixel to pixel, library products for the weights'.

The gradient of a weight is a product summed over all pixels. A kernel writes its two factors (the gradient before the
activation, and the layer's input) for one piece of the pixels, and the library (cuBLAS, cuDNN) multiplies them while
they are in the L2 cache. The scratch of a piece is as large as that cache, whatever the size of the images.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from nin.ops import reference
from nin.ops.arguments import ChainArguments, Gradients, needs_input_gradient
from nin.ops.gpu import autotune, backward_kernels, forward, tile_sizes
from nin.ops.gpu.engine_plan import BackwardGroup
from nin.ops.gpu.strides import coalesce_pixels, subsample


def mlpconv_backward(
    grad: Tensor, x: Tensor, y: Tensor, chain: ChainArguments, needs: Sequence[bool], plan: Sequence[BackwardGroup]
) -> Gradients:
    """Compute the gradients group by group, the last first; see `reference.mlpconv_backward` for the arguments."""
    count = len(chain.weights)
    subchains = [chain.subchain(group.first, group.count) for group in plan]
    inputs = [x]
    # only what passes from group to group is written; a pair's hidden layer is computed again in its kernel
    for group, subchain in zip(plan[:-1], subchains, strict=False):
        inputs.append(forward.mlpconv(inputs[-1], subchain, group.output_plan))
    outputs = [*inputs[1:], y]
    grad_weights, grad_biases = [x.new_empty(0) for _ in range(count)], [x.new_empty(0) for _ in range(count)]
    for k, group in reversed(list(enumerate(plan))):
        where = slice(group.first, group.first + group.count)
        go_on = needs_input_gradient(needs, group.first)
        group_needs = [go_on, *needs[1 : 1 + count][where], *needs[1 + count :][where]]
        through = "none"
        if k > 0 and group.fused and subchains[k - 1].activations[-1] == "relu":
            # the kernel has the group's input at hand: it takes the gradient through that ReLU too
            *others, through = subchains[k - 1].activations
            subchains[k - 1] = subchains[k - 1]._replace(activations=[*others, "none"])
        grad, grad_weights[where], grad_biases[where] = group_backward(
            grad, inputs[k], outputs[k], subchains[k], group_needs, group, through
        )
        if not go_on:
            break
    return grad if needs[0] else x.new_empty(0), grad_weights, grad_biases


def group_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    chain: ChainArguments,
    needs: Sequence[bool],
    group: BackwardGroup,
    through: str = "none",
) -> Gradients:
    """Compute a group's gradients by the engine that the plan names.

    Args:
        grad: gradient of the group's output.
        x: input of the group.
        y: its output.
        chain: its layers.
        needs: which gradients are needed, see `reference.mlpconv_backward`.
        group: its plan.
        through: the activation that ``x`` came through, "none" or "relu", whose derivative the kernels apply to the
            input's gradient.
    """
    if not group.fused:
        return reference.mlpconv_backward(grad, x, y, chain, needs)
    gradients = reference.empty_gradients(x, chain, needs)
    if needs[0] and tuple(chain.stride) != (1, 1):  # the kernel writes only the pixels that the stride visits
        gradients[0].zero_()
    tensors = GroupTensors(
        subsample(x, chain.stride), grad, y, subsample(gradients[0], chain.stride) if needs[0] else None, chain,
        *gradients[1:],
    )  # fmt: skip
    widths, numbers = tensors.widths(), coalesce_pixels(*tensors.images()).numbers()

    # one measurement of all that is launched: the products read what the kernel has left in the cache
    def launch(tiles: tile_sizes.PairTiles | tile_sizes.LayerGradientTiles) -> None:
        GroupLaunch.of(tensors, through, tiles).run(tensors)

    with autotune.running(group):
        shape = (*widths, *numbers, *map(int, needs))
        autotune.launch_tuned(f"backward_of_{group.count}", shape, x, group.tiles, launch)
    return gradients


class GroupTensors(NamedTuple):
    """What the gradients of one or two 1×1 layers are computed from and written to.

    Attributes:
        x: the pixels of the input that the first layer reads.
        grad: gradient of the output.
        y: the output.
        grad_x: for the gradient of ``x``; None where it is not needed.
        chain: the layers.
        grad_weights: for their gradients; empty where not needed.
        grad_biases: the same.
    """

    x: Tensor
    grad: Tensor
    y: Tensor
    grad_x: Tensor | None
    chain: ChainArguments
    grad_weights: Sequence[Tensor]
    grad_biases: Sequence[Tensor]

    def widths(self) -> tuple[int, ...]:
        """Return the channels of the input and of each layer."""
        return self.x.shape[1], *(weight.shape[0] for weight in self.chain.weights)

    def images(self) -> tuple[Tensor, ...]:
        """Return what the kernel walks pixel by pixel, in the order of its arguments."""
        return self.x, self.grad, self.y, self.x if self.grad_x is None else self.grad_x


@dataclasses.dataclass(frozen=True)
class GroupLaunch:
    """How a group's gradients are launched: what depends on sizes, strides and tiles, and on no tensor.

    Attributes:
        kernel: `backward_kernels.pair_gradients` or `layer_gradients`.
        grid_of: the kernel's grid for a number of pixels.
        numbers: its height, width and strides.
        constants: its compile-time arguments.
        pieces: of the pixels, (first, count) each, all but the last of the same size.
        rows: pixels of a tile, that a bias's gradient is first summed over.
        x_matrix, grad_matrix: whether the input, and the gradient before the last activation, are matrices (pixels,
            channels) where they lie, so that the products read them there.
    """

    kernel: Any
    grid_of: Callable[[Any], tuple[Any, ...]]
    numbers: tuple[Any, ...]
    constants: dict[str, Any]
    pieces: tuple[tuple[Any, Any], ...]
    rows: int
    x_matrix: bool
    grad_matrix: bool

    @classmethod
    def of(
        cls, tensors: GroupTensors, through: str, tiles: tile_sizes.PairTiles | tile_sizes.LayerGradientTiles
    ) -> "GroupLaunch":
        """Return the launch with these tiles; see `group_backward` for ``through``."""
        x, grad, _, _, chain, grad_weights, grad_biases = tensors
        walk, widths = coalesce_pixels(*tensors.images()), tensors.widths()
        needs_weights, needs_biases = [t.numel() > 0 for t in grad_weights], [t.numel() > 0 for t in grad_biases]
        x_matrix, grad_matrix = is_matrix(x), chain.activations[-1] == "none" and is_matrix(grad)
        constants: dict[str, Any] = {
            **forward.precision_constants(x),
            **tiles.constants(),
            "C": widths[0],
            "A0": through,
            "NEEDS_X": tensors.grad_x is not None,
            "COPY_X": needs_weights[0] and not x_matrix,
            "COPY_G": needs_weights[-1] and not grad_matrix,
            "WIDE": walk.needs_64_bits,
        }
        columns = [widths[0] * constants["COPY_X"], widths[-1] * constants["COPY_G"]]
        if len(widths) == 2:
            kernel: Any = backward_kernels.layer_gradients
            constants |= {"N": widths[1], "ACTIVATION": chain.activations[0], "BIAS": chain.biases[0] is not None}
            constants["NEEDS_BIAS"] = needs_biases[0]
        else:
            kernel = backward_kernels.pair_gradients
            for layer in (1, 2):
                constants |= {f"C{layer}": widths[layer], f"A{layer}": chain.activations[layer - 1]}
                constants[f"BIAS{layer}"] = chain.biases[layer - 1] is not None
                constants[f"NEEDS_W{layer}"] = needs_weights[layer - 1]
                constants[f"NEEDS_B{layer}"] = needs_biases[layer - 1]
            columns += [widths[1] * needed for needed in needs_weights]
        device = tile_sizes.device_limits(x)
        bytes_per_pixel = x.dtype.itemsize * sum(matrix_columns(width) for width in columns)
        return cls(
            kernel=kernel,
            grid_of=lambda count: tiles.grid(count, widths),
            numbers=walk.numbers()[1:],
            constants=constants,
            pieces=split_pixels(walk.pixels, tiles.pixels, device.scratch_bytes() // max(1, bytes_per_pixel)),
            rows=tiles.pixels,
            x_matrix=x_matrix,
            grad_matrix=grad_matrix,
        )

    def run(self, tensors: GroupTensors) -> None:
        """Compute all gradients that are needed."""
        x, grad, _, _, chain, grad_weights, grad_biases = tensors
        first_piece, tiles = self.pieces[0][1], triton.cdiv(self.pieces[-1][0] + self.pieces[-1][1], self.rows)
        placeholder = chain.weights[0]

        def scratch(wanted: bool, width: int) -> Tensor:
            return x.new_empty((first_piece, matrix_columns(width)))[:, :width] if wanted else placeholder

        def parts(count: Any, gradient: Tensor) -> Tensor:
            shape = (count, gradient.numel())
            return torch.empty(shape, dtype=torch.float32, device=x.device) if gradient.numel() else placeholder

        x_rows = scratch(self.constants["COPY_X"], x.shape[1])
        gz = scratch(self.constants["COPY_G"], grad.shape[1])
        bias_parts = [parts(tiles, gradient) for gradient in grad_biases]
        # with one piece the product is the gradient
        weight_parts = [parts(len(self.pieces), gradient) for gradient in grad_weights] if len(self.pieces) > 1 else []
        # what the two factors of each weight's gradient are read from, and whether it holds all pixels
        inputs = [(as_matrix(x) if self.x_matrix else x_rows, self.x_matrix)]
        gradients = [(as_matrix(grad) if self.grad_matrix else gz, self.grad_matrix)]
        matrices = [forward.dense_filters(weight)[0] for weight in chain.weights]
        biases = [forward.bias_or_placeholder(bias, x) for bias in chain.biases]
        between: tuple[Tensor, ...] = ()
        if len(matrices) == 2:
            hidden, dz = (scratch(t.numel() > 0, matrices[0].shape[0]) for t in reversed(grad_weights))
            between = hidden, dz
            inputs, gradients = [*inputs, (hidden, False)], [(dz, False), *gradients]
        parameters = [t for layer in zip(matrices, biases, strict=True) for t in layer]
        grad_x = placeholder if tensors.grad_x is None else tensors.grad_x
        arguments = *tensors.images()[:3], *parameters, grad_x, x_rows, *between, gz, *bias_parts
        for number, (first, count) in enumerate(self.pieces):
            forward.launch(self.kernel, self.grid_of(count), *arguments, first, count, *self.numbers, **self.constants)
            for layer, gradient in enumerate(grad_weights):
                if gradient.numel():
                    gradient_rows, input_rows = (
                        rows[first : first + count] if whole else rows[:count]
                        for rows, whole in (gradients[layer], inputs[layer])
                    )
                    product = weight_parts[layer][number] if weight_parts else gradient
                    write_product(gradient_rows, input_rows, product.view(gradient.shape[:2]))
        if weight_parts:
            sum_parts(weight_parts, grad_weights)
        sum_parts(bias_parts, grad_biases)


def is_matrix(images: Tensor) -> bool:
    """Return whether the images are a matrix (pixels, channels) where they lie, with rows that do not overlap."""
    walk = coalesce_pixels(images)
    _, channel, _, column = walk.strides[0]
    return walk.height == 1 and walk.width == walk.pixels and channel == 1 and column >= images.shape[1]


def as_matrix(images: Tensor) -> Tensor:
    """Return a view (pixels, channels) of images of which `is_matrix` is true."""
    return images.permute(0, 2, 3, 1).flatten(0, 2)


def matrix_columns(width: int) -> int:
    """Return the columns between two rows of a scratch matrix, see `primitives.store_matrix`."""
    return -(-width // 8) * 8


def split_pixels(pixels: Any, tile: int, most: int) -> tuple[tuple[Any, Any], ...]:
    """Return equal pieces (first, count) of about ``most`` pixels or fewer, each a number of tiles but for the last."""
    # int: a symbolic number of pixels becomes a guard on the number of pieces
    count = int(-(-pixels // max(tile, most // tile * tile)))
    size = -(-pixels // (count * tile)) * tile
    if count == 1:
        return ((0, pixels),)
    count = int(-(-pixels // size))
    return tuple((i * size, size if i < count - 1 else pixels - i * size) for i in range(count))


def write_product(gradient_rows: Tensor, input_rows: Tensor, result: Tensor) -> None:
    """Write a weight's gradient (filters, channels), the product of its factors (pixels, …), with sums in float32."""
    if gradient_rows.dtype == torch.float32:
        # by a convolution of an image one pixel high, as the operator's precision is that of convolutions (TF32)
        images = [rows[None, None].permute(0, 3, 1, 2) for rows in (gradient_rows, input_rows)]
        mask = [False, True, False]
        _, product, _ = torch.ops.aten.convolution_backward(
            *images, result[:, :, None, None], None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1, mask
        )
        result.copy_(product[:, :, 0, 0])
    elif result.dtype == torch.float32 and not gradient_rows.is_cuda:  # no product there has 16 bits and gives 32
        result.copy_(gradient_rows.t().float() @ input_rows.float())
    elif result.dtype == torch.float32:
        torch.mm(gradient_rows.t(), input_rows, out_dtype=torch.float32, out=result)
    else:
        torch.mm(gradient_rows.t(), input_rows, out=result)


def sum_parts(parts: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Write the sums of gradients' parts, of one or two layers, into those gradients that are needed."""
    needed = [(part, gradient) for part, gradient in zip(parts, gradients, strict=True) if gradient.numel()]
    if needed:
        (part1, gradient1), (part2, gradient2) = needed[0], needed[-1]
        count, sizes = part1.shape[0], [gradient.numel() for _, gradient in needed]
        rows = min(512, triton.next_power_of_2(count)) if isinstance(count, int) else 512
        block = max(16, 4096 // rows)
        grid = (sum(triton.cdiv(size, block) for size in sizes),)
        arguments = part1, gradient1, part2, gradient2, count, sizes[0], sizes[-1]
        forward.launch(backward_kernels.add_parts, grid, *arguments, ROWS=rows, BLOCK=block)
