"""The backward kernels: a pair of 1×1 layers, one layer of any size, and the sum of the partial weight gradients.

No kernel adds to memory that another one adds to: each weight gradient is cut into parts over the pixels, every part
is written by one program, and the parts are added in order. So two runs give the same bits.
"""

import triton
import triton.language as tl

from nin.ops.gpu.primitives import (
    activate,
    activation_backward,
    add_bias,
    dot,
    layer_sums,
    load_gradient,
    load_gradient_rows,
    load_im2col,
    load_rows,
    load_weight,
    load_weights,
    pixel_offsets,
    store_rows,
    widen_index,
    zero_tiles,
)


@triton.jit
def hidden_gradient(grads, w, tiles, j, C1: tl.constexpr, C2: tl.constexpr, BM: tl.constexpr, B1: tl.constexpr,
                    B2: tl.constexpr, RESIDENT: tl.constexpr, PRECISION: tl.constexpr,
                    UPCAST: tl.constexpr):  # fmt: skip
    """Return the gradient of the hidden layer's columns ``j B1 ..``, before its activation's derivative."""
    total = tl.zeros((BM, B1), tl.float32)
    for m in tl.static_range((C2 + B2 - 1) // B2):
        if RESIDENT:
            weight = tiles[j * ((C2 + B2 - 1) // B2) + m]
        else:
            weight = load_weight(w, j * B1 + tl.arange(0, B1), m * B2 + tl.arange(0, B2), 1, 0, C1, 1, C2)
        total = dot(grads[m], tl.trans(weight), total, PRECISION, UPCAST)
    return total


@triton.jit
def pair_input_gradient(
    x, g, s, w1, b1, w2, dx, pixels, height, width, x_image, x_channel, x_row, x_column,
    g_image, g_channel, g_row, g_column, s_image, s_channel, s_row, s_column, d_image, d_channel, d_row, d_column,
    C: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, A1: tl.constexpr, A2: tl.constexpr, BIAS1: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Compute the input's gradient dx of two 1×1 layers; the hidden layer is computed again, chunk by chunk.

    Grid: (programs,), as many as the GPU holds; each loops over tiles of BM pixels, a grid apart. A program holds a
    tile of x and of g and the sums (BM, C) of dx. x and dx are (N, C, H, W), g and s (N, C2, H, W), any strides; w1
    is (C1, C), w2 (C2, C1).

    ``g`` is the gradient of the result and ``s`` what its activation's derivative is taken from.
    """
    tiles1, tiles2 = (), ()
    if RESIDENT:
        tiles1 = load_weights(w1, 1, 0, C, 1, C1, BK, B1)
        tiles2 = load_weights(w2, 1, 0, C1, 1, C2, B1, B2)
    for tile in tl.range(tl.program_id(0), tl.cdiv(pixels, BM), tl.num_programs(0)):
        pixel = widen_index(tile, WIDE) * BM + tl.arange(0, BM)
        inside = pixel < pixels
        rows = load_rows(x, pixel_offsets(pixel, height, width, x_image, x_row, x_column), inside, x_channel, C, BK)
        grads = load_gradient_rows(g, s, pixel_offsets(pixel, height, width, g_image, g_row, g_column),
                           pixel_offsets(pixel, height, width, s_image, s_row, s_column), inside, g_channel,
                           s_channel, C2, B2, A2)  # fmt: skip
        outs = zero_tiles((C + BK - 1) // BK, BM, BK)
        for j in tl.static_range((C1 + B1 - 1) // B1):
            n = j * B1 + tl.arange(0, B1)
            z = layer_sums(rows, w1, tiles1, j, 1, 0, C, 1, C1, BM, BK, B1, RESIDENT, PRECISION, UPCAST)
            z = add_bias(z, b1, n, C1, BIAS1)
            grad = hidden_gradient(grads, w2, tiles2, j, C1, C2, BM, B1, B2, RESIDENT, PRECISION, UPCAST)
            grad = activation_backward(grad, z, A1).to(x.dtype.element_ty)
            sums = ()
            for i in tl.static_range((C + BK - 1) // BK):
                if RESIDENT:
                    weight = tiles1[i * ((C1 + B1 - 1) // B1) + j]
                else:
                    weight = load_weight(w1, i * BK + tl.arange(0, BK), n, 1, 0, C, 1, C1)
                sums = sums + (dot(grad, tl.trans(weight), outs[i], PRECISION, UPCAST),)
            outs = sums
        offsets = pixel_offsets(pixel, height, width, d_image, d_row, d_column)
        store_rows(dx, outs, offsets, inside, d_channel, C, BK)


@triton.jit
def pair_weight_gradient(
    x, g, s, w1, b1, w2, part1, part_bias1, part2, part_bias2, pixels, height, width,
    x_image, x_channel, x_row, x_column, g_image, g_channel, g_row, g_column, s_image, s_channel, s_row, s_column,
    C: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, A1: tl.constexpr, A2: tl.constexpr, BIAS1: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Compute parts of the weights' and biases' gradients of two 1×1 layers, to be added by `add_parts`.

    Grid: (parts, chunks of the hidden layer). A program loops over its part's tiles of BM pixels, computes B1 hidden
    channels alone and holds their sums: (C, B1) and (B1, C2). The parts are float32: part1 (parts, C1 C), part_bias1
    (parts, C1), part2 (parts, C2 C1), part_bias2 (parts, C2); the other shapes are those of `pair_input_gradient`.
    """
    part, parts = tl.program_id(0), tl.num_programs(0)
    n = tl.program_id(1) * B1 + tl.arange(0, B1)
    weights1, weights2 = (), ()
    for i in tl.static_range((C + BK - 1) // BK):
        weights1 = weights1 + (load_weight(w1, i * BK + tl.arange(0, BK), n, 1, 0, C, 1, C1),)
    for m in tl.static_range((C2 + B2 - 1) // B2):
        weights2 = weights2 + (load_weight(w2, n, m * B2 + tl.arange(0, B2), 1, 0, C1, 1, C2),)
    sums1, sums2 = zero_tiles((C + BK - 1) // BK, BK, B1), zero_tiles((C2 + B2 - 1) // B2, B1, B2)
    bias1, bias2 = tl.zeros((B1,), tl.float32), zero_tiles((C2 + B2 - 1) // B2, 1, B2)
    for tile in tl.range(part, tl.cdiv(pixels, BM), parts):
        pixel = widen_index(tile, WIDE) * BM + tl.arange(0, BM)
        inside = pixel < pixels
        rows = load_rows(x, pixel_offsets(pixel, height, width, x_image, x_row, x_column), inside, x_channel, C, BK)
        grads = load_gradient_rows(g, s, pixel_offsets(pixel, height, width, g_image, g_row, g_column),
                           pixel_offsets(pixel, height, width, s_image, s_row, s_column), inside, g_channel,
                           s_channel, C2, B2, A2)  # fmt: skip
        # the tuples hold this program's chunk alone: its index is 0, and the layer is B1 wide
        z = layer_sums(rows, w1, weights1, 0, 1, 0, C, 1, B1, BM, BK, B1, True, PRECISION, UPCAST)
        z = add_bias(z, b1, n, C1, BIAS1)
        grad = hidden_gradient(grads, w2, weights2, 0, C1, C2, BM, B1, B2, True, PRECISION, UPCAST)
        # pixels beyond the last one have no gradient, so what their hidden layer holds counts for nothing
        grad = activation_backward(grad, z, A1).to(x.dtype.element_ty)
        h = activate(z, A1).to(x.dtype.element_ty)
        next1, next2, next_bias = (), (), ()
        for i in tl.static_range((C + BK - 1) // BK):
            next1 = next1 + (dot(tl.trans(rows[i]), grad, sums1[i], PRECISION, UPCAST),)
        for m in tl.static_range((C2 + B2 - 1) // B2):
            next2 = next2 + (dot(tl.trans(h), grads[m], sums2[m], PRECISION, UPCAST),)
            next_bias = next_bias + (bias2[m] + tl.sum(grads[m].to(tl.float32), 0)[None, :],)
        sums1, sums2, bias2 = next1, next2, next_bias
        bias1 += tl.sum(grad.to(tl.float32), 0)
    start = widen_index(part, WIDE)
    for i in tl.static_range((C + BK - 1) // BK):
        k = i * BK + tl.arange(0, BK)
        mask = (k < C)[:, None] & (n < C1)[None, :]
        tl.store(part1 + start * C1 * C + n[None, :] * C + k[:, None], sums1[i], mask=mask)
    for m in tl.static_range((C2 + B2 - 1) // B2):
        k = m * B2 + tl.arange(0, B2)
        mask = (n < C1)[:, None] & (k < C2)[None, :]
        tl.store(part2 + start * C2 * C1 + k[None, :] * C1 + n[:, None], sums2[m], mask=mask)
        # all programs of a part know the last bias's gradient; the first one writes it
        first = (k + tl.program_id(1) * C2)[None, :] < C2
        tl.store(part_bias2 + start * C2 + k[None, :], bias2[m], mask=first)
    tl.store(part_bias1 + start * C1 + n, bias1, mask=n < C1)


@triton.jit
def layer_input_gradient(
    g, s, w, dx, pixels, height, width, out_height, out_width, g_image, g_channel, g_row, g_column,
    s_image, s_channel, s_row, s_column, d_image, d_channel, d_row, d_column, channel_stride, tap_stride,
    C: tl.constexpr, N: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, ACTIVATION: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Compute the input's gradient dx of one layer, of any kernel, stride, padding and dilation.

    Grid: (tiles of the input's pixels times tiles of its channels,). A program holds the sums (BM, BN) and loops over
    the taps and BK filters. dx is (images, C, H, W), g and s (images, N, H', W'), any strides; w is dense by filter.

    The pixel (i, j) of the input got into the result's pixel ((i + P - tap D) / S), where that divides.
    """
    blocks = (C + BN - 1) // BN
    program = tl.program_id(0)
    pixel = widen_index(program // blocks, WIDE) * BM + tl.arange(0, BM)
    inside = pixel < pixels
    column, line = pixel % width, pixel // width
    row, image = line % height, line // height
    c = program % blocks * BN + tl.arange(0, BN)
    CHUNKS: tl.constexpr = (N + BK - 1) // BK
    total = tl.zeros((BM, BN), tl.float32)
    for step in tl.range(0, KH * KW * CHUNKS):
        tap, n = step // CHUNKS, step % CHUNKS * BK + tl.arange(0, BK)
        i, j = row + PH - tap // KW * DH, column + PW - tap % KW * DW
        hits = inside & (i >= 0) & (j >= 0) & (i % SH == 0) & (j % SW == 0)
        i, j = i // SH, j // SW
        hits = hits & (i < out_height) & (j < out_width)
        mask = hits[:, None] & (n < N)[None, :]
        offsets = image * g_image + i * g_row + j * g_column
        sources = image * s_image + i * s_row + j * s_column
        grad = load_gradient(g, s, offsets, sources, n, mask, g_channel, s_channel, ACTIVATION)
        filter_offsets = n[:, None] * (C * KH * KW) + (c * channel_stride)[None, :] + tap * tap_stride
        weight = tl.load(w + filter_offsets, mask=(n < N)[:, None] & (c < C)[None, :], other=0.0)
        total = dot(grad, weight, total, PRECISION, UPCAST)
    offsets = image * d_image + row * d_row + column * d_column
    mask = inside[:, None] & (c < C)[None, :]
    tl.store(dx + offsets[:, None] + (c * d_channel)[None, :], total.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def layer_weight_gradient(
    x, g, s, part_weight, part_bias, pixels, height, width, out_height, out_width,
    x_image, x_channel, x_row, x_column, g_image, g_channel, g_row, g_column, s_image, s_channel, s_row, s_column,
    C: tl.constexpr, N: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, ACTIVATION: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Compute parts of one layer's weight and bias gradients, to be added by `add_parts`.

    Grid: (parts, tiles of filters, tiles of the im2col matrix's columns). A program loops over its part's tiles of BM
    pixels and holds the sums (BN, BK). float32 parts: part_weight (parts, N C KH KW), part_bias (parts, N).
    """
    part, parts = tl.program_id(0), tl.num_programs(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.program_id(2) * BK + tl.arange(0, BK)
    total, bias = tl.zeros((BN, BK), tl.float32), tl.zeros((BN,), tl.float32)
    for tile in tl.range(part, tl.cdiv(pixels, BM), parts):
        pixel = widen_index(tile, WIDE) * BM + tl.arange(0, BM)
        inside = pixel < pixels
        rows = load_im2col(x, pixel, inside, tl.program_id(2) * BK, height, width, out_height, out_width, x_image,
                         x_channel, x_row, x_column, C, KH, KW, SH, SW, PH, PW, DH, DW, BK)  # fmt: skip
        mask = inside[:, None] & (n < N)[None, :]
        offsets = pixel_offsets(pixel, out_height, out_width, g_image, g_row, g_column)
        sources = pixel_offsets(pixel, out_height, out_width, s_image, s_row, s_column)
        grad = load_gradient(g, s, offsets, sources, n, mask, g_channel, s_channel, ACTIVATION)
        total = dot(tl.trans(grad), rows, total, PRECISION, UPCAST)
        bias += tl.sum(grad.to(tl.float32), 0)
    start = widen_index(part, WIDE)
    TAPS: tl.constexpr = KH * KW
    # the weight's own order: filter, channel, tap
    filter_offsets = n[:, None] * (C * TAPS) + (k % C * TAPS + k // C)[None, :]
    mask = (n < N)[:, None] & (k < C * TAPS)[None, :]
    tl.store(part_weight + start * N * C * TAPS + filter_offsets, total, mask=mask)
    # programs that differ in their columns alone know the same bias; the first one writes it
    tl.store(part_bias + start * N + n, bias, mask=n + tl.program_id(2) * N < N)


@triton.jit
def add_parts(parts, result, count, size, BLOCK: tl.constexpr):
    """Add the parts of a gradient in order, for the same bits each run.

    Grid: (blocks of BLOCK values,). parts (count, size) are float32, result (size,) has the parameter's dtype.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.range(0, count):
        total += tl.load(parts + part * size + index, mask=mask, other=0.0)
    tl.store(result + index, total.to(result.dtype.element_ty), mask=mask)
