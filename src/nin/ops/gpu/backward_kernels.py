"""The backward kernels: of a pair of 1×1 layers, of one, and the sum of partial gradients.

They write what a weight's gradient is a product of, the gradients before the activations and the hidden layer, as
matrices (pixels, channels) of one piece of the pixels. `nin.ops.gpu.backward` multiplies them while they are in the L2
cache. No program adds to memory that another one adds to, so two runs give the same bits.
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
    load_rows,
    load_weight,
    pixel_offsets,
    store_matrix,
    two_layers,
    widen_index,
    zero_tiles,
)


@triton.jit
def hidden_gradient(grads, w, j, C1: tl.constexpr, C2: tl.constexpr, BM: tl.constexpr, B1: tl.constexpr,
                    B2: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Return the gradient of the hidden layer's columns ``j B1 ..``, before its activation's derivative."""
    total = tl.zeros((BM, B1), tl.float32)
    for m in tl.static_range((C2 + B2 - 1) // B2):
        weight = load_weight(w, j * B1 + tl.arange(0, B1), m * B2 + tl.arange(0, B2), 1, 0, C1, 1, C2)
        total = dot(grads[m], tl.trans(weight), total, PRECISION, UPCAST)
    return total


@triton.jit
def input_gradient(total, grad, w, i, j, C: tl.constexpr, C1: tl.constexpr, BK: tl.constexpr, B1: tl.constexpr,
                   PRECISION: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Return the sum for the input's columns ``i BK ..`` with what the hidden columns ``j B1 ..`` add."""
    weight = load_weight(w, i * BK + tl.arange(0, BK), j * B1 + tl.arange(0, B1), 1, 0, C, 1, C1)
    return dot(grad, tl.trans(weight), total, PRECISION, UPCAST)


@triton.jit
def store_sums(sums, tile, n, COLUMNS: tl.constexpr, UPCAST: tl.constexpr):
    """Write the sums over the rows of a tile (rows, columns n), in float32."""
    if tile.dtype.primitive_bitwidth == 16:
        # by the matrix units: a reduction over rows that lie in many threads takes ten times as many instructions
        row = tl.arange(0, 16)
        # by way of float32, as the interpreter of Triton 3.6 fills no bfloat16
        ones = tl.full((16, tile.shape[0]), 1.0, tl.float32).to(tile.dtype)
        total = dot(ones, tile, None, "ieee", UPCAST)
        mask = (row == 0)[:, None] & (n < COLUMNS)[None, :]
        tl.store(sums + row[:, None] + n[None, :], total, mask=mask)
    else:
        tl.store(sums + n, tl.sum(tile, 0), mask=n < COLUMNS)


@triton.jit
def pair_gradients(
    x, g, s, w1, b1, w2, b2, dx, x_rows, hidden, dz, gz, bias1, bias2, first, count, height, width,
    x_image, x_channel, x_row, x_column, g_image, g_channel, g_row, g_column, s_image, s_channel, s_row, s_column,
    d_image, d_channel, d_row, d_column, C: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, A0: tl.constexpr,
    A1: tl.constexpr, A2: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr, NEEDS_X: tl.constexpr,
    NEEDS_W1: tl.constexpr, NEEDS_W2: tl.constexpr, NEEDS_B1: tl.constexpr, NEEDS_B2: tl.constexpr,
    COPY_X: tl.constexpr, COPY_G: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, B1: tl.constexpr,
    B2: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Compute the input's gradient dx of two 1×1 layers, and the factors of the weights' gradients.

    Grid: (tiles of BM pixels of the piece,). A program holds a tile of x and of the gradient; the hidden layer is
    computed again, chunk by chunk. The weights are read where they are needed, from the caches: programs that kept them
    and looped over tiles spilled registers. x and dx are (N, C, H, W), g and s (N, C2, H, W), any strides; w1 is
    (C1, C), w2 (C2, C1).

    The piece is the ``count`` pixels from ``first`` on, a multiple of BM. Of each are written, where NEEDS_ and COPY_
    say so: x_rows (count, C), the input; hidden (count, C1), the hidden layer; dz (count, C1) and gz (count, C2), the
    gradients before the two activations. The rows of these are padded to 16 bytes, see `store_matrix`. bias1 (tiles,
    C1) and bias2 (tiles, C2) are the sums of dz and gz over each tile, of all pieces.

    ``g`` is the gradient of the result and ``s`` the result, for A2's derivative. GELU's and SiLU's is taken from their
    argument, which is computed again. A0 is the activation that x came through, "none" or "relu": its derivative
    is applied to dx.
    """
    BITS: tl.constexpr = x.dtype.element_ty.primitive_bitwidth
    tile = tl.program_id(0)
    local = tile * BM + tl.arange(0, BM)
    inside = local < count
    pixel = widen_index(first, WIDE) + local
    rows = load_rows(x, pixel_offsets(pixel, height, width, x_image, x_row, x_column), inside, x_channel, C, BK)
    g_offsets = pixel_offsets(pixel, height, width, g_image, g_row, g_column)
    if A2 == "gelu" or A2 == "silu":
        z2 = two_layers(rows, w1, (), b1, w2, (), b2, 1, 0, C, 1, C1, C2, A1, "none", BIAS1, BIAS2, BM, BK, B1, B2,
                        False, PRECISION, UPCAST)  # fmt: skip
        grads = ()
        for m in tl.static_range((C2 + B2 - 1) // B2):
            n = m * B2 + tl.arange(0, B2)
            mask = inside[:, None] & (n < C2)[None, :]
            grad = tl.load(g + g_offsets[:, None] + (n * g_channel)[None, :], mask=mask, other=0.0)
            grad = activation_backward(grad.to(tl.float32), z2[m], A2, BITS).to(x.dtype.element_ty)
            grads = grads + (grad,)
    else:
        grads = load_gradient_rows(g, s, g_offsets, pixel_offsets(pixel, height, width, s_image, s_row, s_column),
                                   inside, g_channel, s_channel, C2, B2, A2)  # fmt: skip
    for m in tl.static_range((C2 + B2 - 1) // B2):
        n = m * B2 + tl.arange(0, B2)
        if COPY_G:
            store_matrix(gz, grads[m], local, inside, n, C2)
        if NEEDS_B2:
            store_sums(bias2 + widen_index(first // BM + tile, WIDE) * C2, grads[m], n, C2, UPCAST)
    if COPY_X:
        for i in tl.static_range((C + BK - 1) // BK):
            store_matrix(x_rows, rows[i], local, inside, i * BK + tl.arange(0, BK), C)
    # what nothing asks for below, the compiler leaves out
    # to dx each hidden column adds: either all sums (BM, C) in float32 are kept, or dz as it is written (BM, C1)
    HOLD: tl.constexpr = C1 * BITS < C * 32
    outs, held = (), ()
    if not HOLD:
        outs = zero_tiles((C + BK - 1) // BK, BM, BK)
    for j in tl.static_range((C1 + B1 - 1) // B1):
        n = j * B1 + tl.arange(0, B1)
        z = layer_sums(rows, w1, (), j, 1, 0, C, 1, C1, BM, BK, B1, False, PRECISION, UPCAST)
        z = add_bias(z, b1, n, C1, BIAS1)
        if NEEDS_W2:
            store_matrix(hidden, activate(z, A1, BITS).to(hidden.dtype.element_ty), local, inside, n, C1)
        grad = hidden_gradient(grads, w2, j, C1, C2, BM, B1, B2, PRECISION, UPCAST)
        # pixels beyond the last one have no gradient, so what their hidden layer holds counts for nothing
        grad = activation_backward(grad, z, A1, BITS).to(x.dtype.element_ty)
        if NEEDS_W1:
            store_matrix(dz, grad, local, inside, n, C1)
        if NEEDS_B1:
            store_sums(bias1 + widen_index(first // BM + tile, WIDE) * C1, grad, n, C1, UPCAST)
        if HOLD:
            held = held + (grad,)
        else:
            sums = ()
            for i in tl.static_range((C + BK - 1) // BK):
                sums = sums + (input_gradient(outs[i], grad, w1, i, j, C, C1, BK, B1, PRECISION, UPCAST),)
            outs = sums
    if NEEDS_X:
        offsets = pixel_offsets(pixel, height, width, d_image, d_row, d_column)
        for i in tl.static_range((C + BK - 1) // BK):
            if HOLD:
                out = tl.zeros((BM, BK), tl.float32)
                for j in tl.static_range((C1 + B1 - 1) // B1):
                    out = input_gradient(out, held[j], w1, i, j, C, C1, BK, B1, PRECISION, UPCAST)
            else:
                out = outs[i]
            out = activation_backward(out, rows[i].to(tl.float32), A0, BITS)
            c = i * BK + tl.arange(0, BK)
            mask = inside[:, None] & (c < C)[None, :]
            tl.store(dx + offsets[:, None] + (c * d_channel)[None, :], out.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def layer_gradients(
    x, g, s, w, b, dx, x_rows, gz, bias, first, count, height, width,
    x_image, x_channel, x_row, x_column, g_image, g_channel, g_row, g_column, s_image, s_channel, s_row, s_column,
    d_image, d_channel, d_row, d_column, C: tl.constexpr, N: tl.constexpr, A0: tl.constexpr,
    ACTIVATION: tl.constexpr, BIAS: tl.constexpr, NEEDS_X: tl.constexpr, NEEDS_BIAS: tl.constexpr,
    COPY_X: tl.constexpr, COPY_G: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    CHUNKS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Compute the input's gradient dx of one 1×1 layer, and the factors of its weight's gradient.

    Grid: (tiles of BM pixels times blocks of CHUNKS BK input channels,). A program holds the sums of its block of dx
    and loops over BN filters. The other arguments are those of `pair_gradients`; w is (N, C).
    """
    BITS: tl.constexpr = x.dtype.element_ty.primitive_bitwidth
    BLOCKS: tl.constexpr = (C + CHUNKS * BK - 1) // (CHUNKS * BK)
    tile, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    local = tile * BM + tl.arange(0, BM)
    inside = local < count
    pixel = widen_index(first, WIDE) + local
    x_offsets = pixel_offsets(pixel, height, width, x_image, x_row, x_column)
    g_offsets = pixel_offsets(pixel, height, width, g_image, g_row, g_column)
    s_offsets = pixel_offsets(pixel, height, width, s_image, s_row, s_column)
    # programs that differ in their channels alone know the same gradient; the first one writes it
    writes = local + block * count < count
    outs = zero_tiles(CHUNKS, BM, BK)
    for start in tl.range(0, N, BN):
        n = start + tl.arange(0, BN)
        mask = inside[:, None] & (n < N)[None, :]
        if ACTIVATION == "gelu" or ACTIVATION == "silu":
            z = tl.zeros((BM, BN), tl.float32)
            for k in tl.range(0, C, BK):
                c = k + tl.arange(0, BK)
                x_mask = inside[:, None] & (c < C)[None, :]
                values = tl.load(x + x_offsets[:, None] + (c * x_channel)[None, :], mask=x_mask, other=0.0)
                z = dot(values, load_weight(w, c, n, 1, 0, C, 1, N), z, PRECISION, UPCAST)
            z = add_bias(z, b, n, N, BIAS)
            grad = tl.load(g + g_offsets[:, None] + (n * g_channel)[None, :], mask=mask, other=0.0)
            grad = activation_backward(grad.to(tl.float32), z, ACTIVATION, BITS).to(grad.dtype)
        else:
            grad = load_gradient(g, s, g_offsets, s_offsets, n, mask, g_channel, s_channel, ACTIVATION)
        if COPY_G:
            store_matrix(gz, grad, local, writes, n, N)
        if NEEDS_BIAS:
            sums = tl.sum(grad.to(tl.float32), 0)
            tl.store(bias + widen_index(first // BM + tile, WIDE) * N + n, sums, mask=n + block * N < N)
        if NEEDS_X:
            sums = ()
            for i in tl.static_range(CHUNKS):
                c = (block * CHUNKS + i) * BK + tl.arange(0, BK)
                sums = sums + (dot(grad, tl.trans(load_weight(w, c, n, 1, 0, C, 1, N)), outs[i], PRECISION, UPCAST),)
            outs = sums
    offsets = pixel_offsets(pixel, height, width, d_image, d_row, d_column)
    for i in tl.static_range(CHUNKS):
        c = (block * CHUNKS + i) * BK + tl.arange(0, BK)
        mask = inside[:, None] & (c < C)[None, :]
        if COPY_X or (NEEDS_X and A0 != "none"):
            values = tl.load(x + x_offsets[:, None] + (c * x_channel)[None, :], mask=mask, other=0.0)
            if COPY_X:
                store_matrix(x_rows, values, local, inside, c, C)
            if NEEDS_X:
                out = activation_backward(outs[i], values.to(tl.float32), A0, BITS).to(dx.dtype.element_ty)
                tl.store(dx + offsets[:, None] + (c * d_channel)[None, :], out, mask=mask)
        elif NEEDS_X:
            tl.store(dx + offsets[:, None] + (c * d_channel)[None, :], outs[i].to(dx.dtype.element_ty), mask=mask)


@triton.jit
def add_parts(parts1, result1, parts2, result2, count, size1, size2, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Add the parts of one or two gradients, in the same order each run.

    Grid: (blocks of BLOCK values, of the first gradient and then of the second,). parts (count, size) are float32,
    result (size,) has the parameter's dtype.
    """
    blocks = tl.cdiv(size1, BLOCK)
    if tl.program_id(0) < blocks:
        add_columns(parts1, result1, tl.program_id(0), count, size1, ROWS, BLOCK)
    else:
        add_columns(parts2, result2, tl.program_id(0) - blocks, count, size2, ROWS, BLOCK)


@triton.jit
def add_columns(parts, result, block, count, size, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Add BLOCK columns of parts (count, size), ROWS at a time."""
    index = block * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.range(0, count, ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        mask = (row < count)[:, None] & (index < size)[None, :]
        total += tl.load(parts + row[:, None] * size + index[None, :], mask=mask, other=0.0)
    tl.store(result + index, tl.sum(total, 0).to(result.dtype.element_ty), mask=index < size)
