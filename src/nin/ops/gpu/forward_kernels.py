"""The forward kernels: a chain of two or three layers in one pass over the pixels, and one layer of any size."""

import triton
import triton.language as tl

from nin.ops.gpu.primitives import (
    activate,
    add_bias,
    dot,
    layer_sums,
    load_im2col,
    load_rows,
    load_weight,
    load_weights,
    pixel_offsets,
    store_rows,
    two_layers,
    widen_index,
)


@triton.jit
def chain_forward(
    x, w1, b1, w2, b2, w3, b3, y, pixels, height, width, out_height, out_width,
    x_image, x_channel, x_row, x_column, y_image, y_channel, y_row, y_column, channel_stride, tap_stride,
    LAYERS: tl.constexpr, C: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, C3: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, A1: tl.constexpr, A2: tl.constexpr, A3: tl.constexpr,
    BIAS1: tl.constexpr, BIAS2: tl.constexpr, BIAS3: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    B1: tl.constexpr, B2: tl.constexpr, B3: tl.constexpr, RESIDENT: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Compute two or three layers in one pass; the first may be k×k.

    Grid: (programs,), as many as the GPU holds; each loops over tiles of BM pixels, a grid apart. A program holds a
    tile of the input, the sums (BM, C2 or C3) of the last layer, and of three layers the first one's result.
    x (N, C, H, W) and y (N, C2 or C3, H', W') have any strides; the weights are (width, columns), see `load_weight`.

    RESIDENT: the weights are read once, before the first tile, and stay in shared memory; else each use reads them
    from the L2 cache.
    """
    TAPS: tl.constexpr = KH * KW
    BITS: tl.constexpr = x.dtype.element_ty.primitive_bitwidth
    tiles1, tiles2, tiles3 = (), (), ()
    if RESIDENT:
        tiles1 = load_weights(w1, channel_stride, tap_stride, C, TAPS, C1, BK, B1)
        tiles2 = load_weights(w2, 1, 0, C1, 1, C2, B1, B2)
        if LAYERS == 3:
            tiles3 = load_weights(w3, 1, 0, C2, 1, C3, B2, B3)
    for tile in tl.range(tl.program_id(0), tl.cdiv(pixels, BM), tl.num_programs(0)):
        pixel = widen_index(tile, WIDE) * BM + tl.arange(0, BM)
        inside = pixel < pixels
        if TAPS == 1 and PH == 0 and PW == 0:
            rows = load_rows(x, pixel_offsets(pixel, out_height, out_width, x_image, x_row, x_column), inside,
                             x_channel, C, BK)  # fmt: skip
        else:
            rows = ()
            for i in tl.static_range((C * TAPS + BK - 1) // BK):
                tile_of_taps = load_im2col(x, pixel, inside, i * BK, height, width, out_height, out_width, x_image,
                                         x_channel, x_row, x_column, C, KH, KW, SH, SW, PH, PW, DH, DW, BK)  # fmt: skip
                rows = rows + (tile_of_taps,)
        offsets = pixel_offsets(pixel, out_height, out_width, y_image, y_row, y_column)
        if LAYERS == 3:
            # held as a whole, in 16 bits where the input is: each of the next layer's chunks needs all of it
            middle = ()
            for j in tl.static_range((C1 + B1 - 1) // B1):
                z = layer_sums(rows, w1, tiles1, j, channel_stride, tap_stride, C, TAPS, C1, BM, BK, B1, RESIDENT,
                                PRECISION, UPCAST)  # fmt: skip
                z = activate(add_bias(z, b1, j * B1 + tl.arange(0, B1), C1, BIAS1), A1, BITS)
                middle = middle + (z.to(w1.dtype.element_ty),)
            outs = two_layers(middle, w2, tiles2, b2, w3, tiles3, b3, 1, 0, C1, 1, C2, C3, A2, A3, BIAS2, BIAS3, BM, B1,
                            B2, B3, RESIDENT, PRECISION, UPCAST)  # fmt: skip
            store_rows(y, outs, offsets, inside, y_channel, C3, B3)
        else:
            outs = two_layers(rows, w1, tiles1, b1, w2, tiles2, b2, channel_stride, tap_stride, C, TAPS, C1, C2, A1, A2,
                            BIAS1, BIAS2, BM, BK, B1, B2, RESIDENT, PRECISION, UPCAST)  # fmt: skip
            store_rows(y, outs, offsets, inside, y_channel, C2, B2)


@triton.jit
def layer_forward(
    x, w, b, y, pixels, height, width, out_height, out_width, x_image, x_channel, x_row, x_column,
    y_image, y_channel, y_row, y_column, channel_stride, tap_stride, C: tl.constexpr, N: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Compute one layer of any size as an implicit matrix product, im2col(x) (pixels, C KH KW) times w.

    Grid: (tiles of pixels times tiles of filters,). A program holds the sums (BM, BN) and loops over BK summands.
    x (images, C, H, W) and y (images, N, H', W') have any strides; w is (N, C KH KW), see `load_weight`.
    Programs beside each other take the filters of the same pixels, which then come from the L2 cache.
    """
    blocks = (N + BN - 1) // BN
    program = tl.program_id(0)
    pixel = widen_index(program // blocks, WIDE) * BM + tl.arange(0, BM)
    inside = pixel < pixels
    n = program % blocks * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for start in tl.range(0, C * KH * KW, BK):
        rows = load_im2col(x, pixel, inside, start, height, width, out_height, out_width, x_image, x_channel, x_row,
                         x_column, C, KH, KW, SH, SW, PH, PW, DH, DW, BK)  # fmt: skip
        weight = load_weight(w, start + tl.arange(0, BK), n, channel_stride, tap_stride, C, KH * KW, N)
        total = dot(rows, weight, total, PRECISION, UPCAST)
    total = activate(add_bias(total, b, n, N, BIAS), ACTIVATION, x.dtype.element_ty.primitive_bitwidth)
    offsets = pixel_offsets(pixel, out_height, out_width, y_image, y_row, y_column)
    mask = inside[:, None] & (n < N)[None, :]
    tl.store(y + offsets[:, None] + (n * y_channel)[None, :], total.to(y.dtype.element_ty), mask=mask)
