"""Device functions of the kernels: loads and stores of tiles, products, activations and their derivatives.

A width that is no power of two is cut into equal chunks; the last one is masked. A row of several chunks is a tuple
of tiles (pixels, chunk), so no tile is padded to the next power of two of the whole width.

Kernels import these functions by name: Inductor copies a kernel's source into the module that it generates, with the
functions that it finds in the kernel's globals, and does not look into other modules.
"""

import triton
import triton.language as tl


@triton.jit
def widen_index(value, WIDE: tl.constexpr):
    """Return an index in 64 bits where a tensor has more values than 32 bits can count."""
    return tl.cast(value, tl.int64) if WIDE else value


@triton.jit
def pixel_offsets(pixel, height, width, image_stride, row_stride, column_stride):
    """Return the offsets of pixels, which are numbered through all images."""
    column, line = pixel % width, pixel // width
    return (line // height) * image_stride + (line % height) * row_stride + column * column_stride


@triton.jit
def normal_upper_tail(z, BITS: tl.constexpr):
    """Return the probability that a standard normal variable is above ``|z|``, 1 - Φ(|z|), and min(|z|, 12).

    Two to the power of a polynomial, fitted to the logarithm on 0 to 5 by least squares, reweighted until the largest
    errors are equal; it falls steeply beyond. For values of 16 bits its error is 1.8e-4 of the result, half of a
    rounding; else 3e-8, and 7e-5 of the result where that is small. tl.erf takes three times as many instructions, and
    1 + erf loses the digits of GELU's negative side.
    """
    a = tl.minimum(tl.abs(z), 12.0)  # where the result is 0, as an infinity times it is no number
    if BITS == 16:
        p = -0.000277861953 * a + 0.0054053138
        p = p * a - 0.0468508825
        p = p * a - 0.465769857
        p = p * a - 1.14876997
    else:
        p = -1.35365394e-06 * a + 2.2064909e-05
        p = p * a - 0.000107669592
        p = p * a - 0.000313204655
        p = p * a + 0.00727069704
        p = p * a - 0.0526201166
        p = p * a - 0.459174871
        p = p * a - 1.15110803
    return tl.exp2(p * a - 1.0), a


@triton.jit
def activate(z, NAME: tl.constexpr, BITS: tl.constexpr):
    """Return the activation of ``z`` (float32), to be rounded to a number of bits; NaN stays NaN."""
    if NAME == "relu":
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif NAME == "gelu":
        tail, a = normal_upper_tail(z, BITS)
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL) - a * tail
    elif NAME == "silu":
        z = z * tl.sigmoid(z)
    return z


@triton.jit
def activation_backward(grad, source, NAME: tl.constexpr, BITS: tl.constexpr):
    """Return the gradient before the activation; ``source`` is its argument, or for ReLU its result."""
    if NAME == "relu":
        grad = tl.where(source <= 0, 0.0, grad)
    elif NAME == "gelu":
        tail, _ = normal_upper_tail(source, BITS)
        # the normal distribution's density, 1 / √(2π) exp(-z² / 2), as a power of two
        density = tl.exp2(-0.7213475204444817 * source * source - 1.3257480647361592)
        grad = grad * (tl.where(source < 0, tail, 1.0 - tail) + source * density)
    elif NAME == "silu":
        sigmoid = tl.sigmoid(source)
        grad = grad * sigmoid * (1.0 + source * (1.0 - sigmoid))
    return grad


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """Return ``a b + total`` with sums in float32; the interpreter cannot multiply bfloat16, so it widens first."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def zero_tiles(COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return a tuple of COUNT tiles (ROWS, COLUMNS) of float32 zeros."""
    # Triton has no lists, so here and below a loop that the compiler unrolls puts a new tuple in the old one's place
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros((ROWS, COLUMNS), tl.float32),)
    return tiles


@triton.jit
def load_rows(x, offsets, inside, channel_stride, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the channels of pixels as a tuple of tiles (pixels, BLOCK)."""
    tiles = ()
    for i in tl.static_range((CHANNELS + BLOCK - 1) // BLOCK):
        c = i * BLOCK + tl.arange(0, BLOCK)
        mask = inside[:, None] & (c < CHANNELS)[None, :]
        tiles = tiles + (tl.load(x + offsets[:, None] + (c * channel_stride)[None, :], mask=mask, other=0.0),)
    return tiles


@triton.jit
def load_gradient(g, s, offsets, sources, c, mask, channel_stride, source_stride, NAME: tl.constexpr):
    """Return a tile (pixels, channels c) of the gradient before the last activation.

    Its derivative is taken from ``s``, at ``sources``; see `activation_backward`.
    """
    grad = tl.load(g + offsets[:, None] + (c * channel_stride)[None, :], mask=mask, other=0.0)
    if NAME != "none":
        source = tl.load(s + sources[:, None] + (c * source_stride)[None, :], mask=mask, other=0.0)
        BITS: tl.constexpr = grad.dtype.primitive_bitwidth
        grad = activation_backward(grad.to(tl.float32), source.to(tl.float32), NAME, BITS).to(grad.dtype)
    return grad


@triton.jit
def load_gradient_rows(g, s, offsets, sources, inside, channel_stride, source_stride, CHANNELS: tl.constexpr,
                       BLOCK: tl.constexpr, NAME: tl.constexpr):  # fmt: skip
    """Return the gradients before the last activation as a tuple of tiles (pixels, BLOCK), as `load_rows` does."""
    tiles = ()
    for i in tl.static_range((CHANNELS + BLOCK - 1) // BLOCK):
        c = i * BLOCK + tl.arange(0, BLOCK)
        mask = inside[:, None] & (c < CHANNELS)[None, :]
        tiles = tiles + (load_gradient(g, s, offsets, sources, c, mask, channel_stride, source_stride, NAME),)
    return tiles


@triton.jit
def store_rows(y, tiles, offsets, inside, channel_stride, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """Write a tuple of tiles (pixels, BLOCK) as the channels of pixels."""
    for i in tl.static_range((CHANNELS + BLOCK - 1) // BLOCK):
        c = i * BLOCK + tl.arange(0, BLOCK)
        mask = inside[:, None] & (c < CHANNELS)[None, :]
        tl.store(y + offsets[:, None] + (c * channel_stride)[None, :], tiles[i].to(y.dtype.element_ty), mask=mask)


@triton.jit
def store_matrix(matrix, values, row, inside, n, COLUMNS: tl.constexpr):
    """Write a tile (rows, columns n) of a matrix whose rows are 8 values apart or a multiple: 16 bytes of 16 bits."""
    mask = inside[:, None] & (n < COLUMNS)[None, :]
    tl.store(matrix + row[:, None] * ((COLUMNS + 7) // 8 * 8) + n[None, :], values, mask=mask)


@triton.jit
def load_im2col(x, pixel, inside, start, height, width, out_height, out_width, image_stride, channel_stride, row_stride,
              column_stride, CHANNELS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr,
              SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
              BLOCK: tl.constexpr):  # fmt: skip
    """Return a tile (pixels of the output, BLOCK) of the im2col matrix, columns ``k = tap C + channel`` from start on.

    Where a chunk lies in one tap, a row's offset is computed once and not for each value.
    """
    j, line = pixel % out_width, pixel // out_width
    i, image = line % out_height, line // out_height
    k = start + tl.arange(0, BLOCK)
    if CHANNELS % BLOCK == 0 or KH * KW == 1:
        tap = start // CHANNELS
        row, column = i * SH - PH + tap // KW * DH, j * SW - PW + tap % KW * DW
        hits = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        offsets = (image * image_stride + row * row_stride + column * column_stride)[:, None]
        c = k - tap * CHANNELS
        mask = hits[:, None] & (k < CHANNELS * KH * KW)[None, :]
    else:
        tap, c = k // CHANNELS, k % CHANNELS
        row = (i * SH - PH)[:, None] + (tap // KW * DH)[None, :]
        column = (j * SW - PW)[:, None] + (tap % KW * DW)[None, :]
        offsets = (image * image_stride)[:, None] + row * row_stride + column * column_stride
        mask = inside[:, None] & (k < CHANNELS * KH * KW)[None, :]
        mask = mask & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return tl.load(x + offsets + (c * channel_stride)[None, :], mask=mask, other=0.0)


@triton.jit
def load_weight(w, k, n, channel_stride, tap_stride, CHANNELS: tl.constexpr, TAPS: tl.constexpr,
                COLUMNS: tl.constexpr):  # fmt: skip
    """Return a tile (k, n) of a layer's matrix; ``k = tap C + channel``, and a filter's values lie together."""
    # what is masked is 0, which adds nothing to a product: no kernel needs to know which summands are padding
    offsets = n[None, :] * (CHANNELS * TAPS) + (k % CHANNELS * channel_stride + k // CHANNELS * tap_stride)[:, None]
    mask = (k < CHANNELS * TAPS)[:, None] & (n < COLUMNS)[None, :]
    return tl.load(w + offsets, mask=mask, other=0.0)


@triton.jit
def load_weights(w, channel_stride, tap_stride, CHANNELS: tl.constexpr, TAPS: tl.constexpr,
                 COLUMNS: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Return a layer's matrix as a tuple of tiles (BK, BN), row of tiles by row of tiles."""
    tiles = ()
    for i in tl.static_range((CHANNELS * TAPS + BK - 1) // BK):
        for j in tl.static_range((COLUMNS + BN - 1) // BN):
            k, n = i * BK + tl.arange(0, BK), j * BN + tl.arange(0, BN)
            tiles = tiles + (load_weight(w, k, n, channel_stride, tap_stride, CHANNELS, TAPS, COLUMNS),)
    return tiles


@triton.jit
def layer_sums(rows, w, tiles, j, channel_stride, tap_stride, CHANNELS: tl.constexpr, TAPS: tl.constexpr,
                COLUMNS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
                RESIDENT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Return columns ``j BN ..`` of a layer's product (pixels, BN) in float32, bias not added."""
    total = tl.zeros((BM, BN), tl.float32)
    for i in tl.static_range((CHANNELS * TAPS + BK - 1) // BK):
        if RESIDENT:
            weight = tiles[i * ((COLUMNS + BN - 1) // BN) + j]
        else:
            k, n = i * BK + tl.arange(0, BK), j * BN + tl.arange(0, BN)
            weight = load_weight(w, k, n, channel_stride, tap_stride, CHANNELS, TAPS, COLUMNS)
        total = dot(rows[i], weight, total, PRECISION, UPCAST)
    return total


@triton.jit
def add_bias(z, b, n, COLUMNS: tl.constexpr, BIAS: tl.constexpr):
    """Return ``z`` (pixels, columns n) with one number added to each column."""
    if BIAS:
        z = z + tl.load(b + n, mask=n < COLUMNS, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit
def two_layers(rows, w, tiles, b, w_next, tiles_next, b_next, channel_stride, tap_stride, CHANNELS: tl.constexpr,
             TAPS: tl.constexpr, C: tl.constexpr, C_NEXT: tl.constexpr, ACTIVATION: tl.constexpr,
             LAST: tl.constexpr, BIAS: tl.constexpr, BIAS_NEXT: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
             BN: tl.constexpr, BN_NEXT: tl.constexpr, RESIDENT: tl.constexpr, PRECISION: tl.constexpr,
             UPCAST: tl.constexpr):  # fmt: skip
    """Return the output of two layers, a tuple of tiles (BM, BN_NEXT) in float32; ``rows`` are (BM, BK).

    The layer between them is computed in chunks of BN columns, each used at once, so it is never held as a whole.
    """
    BITS: tl.constexpr = w.dtype.element_ty.primitive_bitwidth
    outs = zero_tiles((C_NEXT + BN_NEXT - 1) // BN_NEXT, BM, BN_NEXT)
    for j in tl.static_range((C + BN - 1) // BN):
        n = j * BN + tl.arange(0, BN)
        z = layer_sums(rows, w, tiles, j, channel_stride, tap_stride, CHANNELS, TAPS, C, BM, BK, BN, RESIDENT,
                        PRECISION, UPCAST)  # fmt: skip
        h = activate(add_bias(z, b, n, C, BIAS), ACTIVATION, BITS).to(w.dtype.element_ty)
        sums = ()
        for m in tl.static_range((C_NEXT + BN_NEXT - 1) // BN_NEXT):
            if RESIDENT:  # both branches are decided when the kernel is compiled
                weight = tiles_next[j * ((C_NEXT + BN_NEXT - 1) // BN_NEXT) + m]
            else:
                weight = load_weight(w_next, n, m * BN_NEXT + tl.arange(0, BN_NEXT), 1, 0, C, 1, C_NEXT)
            sums = sums + (dot(h, weight, outs[m], PRECISION, UPCAST),)
        outs = sums
    finished = ()
    for m in tl.static_range((C_NEXT + BN_NEXT - 1) // BN_NEXT):
        z = add_bias(outs[m], b_next, m * BN_NEXT + tl.arange(0, BN_NEXT), C_NEXT, BIAS_NEXT)
        finished = finished + (activate(z, LAST, BITS),)
    return finished
