"""The Triton kernels behind kernels.py, which has the equations and launches them; imports triton.

A matrix, that is a block of rows of a weight, is read as M (m, n), whose rows are contiguous: M = W, or M = W^T where W is kept
transposed. It is cut into strips of `steps` tiles (BM, BN), one below the other; a program takes one strip. A plan's table
(kernels.py) says where things are, in elements from the base addresses that a kernel is given. Every sum has two stages and a
fixed order, and there are no atomics: the same input gives the same bits.
"""

import torch
import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret  # read when the kernels below are made, as triton does
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# The columns of the table.
WEIGHT, M, N, LD, TRANSPOSED, ALIGNED, FIRST, ACROSS, STEPS, PARTIALS, U, OUT, IN, OUT_CHUNK, IN_CHUNK, FIELDS = (
    tl.constexpr(i) for i in range(16)
)


@triton.jit
def _address(base, offset, DTYPE: tl.constexpr):
    return base + offset * (DTYPE.primitive_bitwidth // 8)


@triton.jit
def _floats(base, offset):
    return (base + offset * 4).to(tl.pointer_type(tl.float32))


@triton.jit
def _load_tile(address, rows, columns, m, n, ld, aligned, DTYPE: tl.constexpr):
    """A tile of M in fp32, zero beyond its edges.

    To load 16 bytes at a time the compiler must know that it may: hence what looks as if it did nothing.
    """
    if aligned:
        start = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)
        at = start + rows[:, None] * (ld // 16 * 16) + columns[None, :]
        tile = tl.load(at, mask=(rows[:, None] < m) & (columns[None, :] < n // 16 * 16), other=0.0)
    else:
        at = address.to(tl.pointer_type(DTYPE)) + rows[:, None] * ld + columns[None, :]
        tile = tl.load(at, mask=(rows[:, None] < m) & (columns[None, :] < n), other=0.0)
    return tile.to(tl.float32)


@triton.jit
def _store_tile(address, tile, rows, columns, m, n, ld, aligned, DTYPE: tl.constexpr):
    if aligned:
        start = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)
        at = start + rows[:, None] * (ld // 16 * 16) + columns[None, :]
        tl.store(at, tile.to(DTYPE), mask=(rows[:, None] < m) & (columns[None, :] < n // 16 * 16))
    else:
        at = address.to(tl.pointer_type(DTYPE)) + rows[:, None] * ld + columns[None, :]
        tl.store(at, tile.to(DTYPE), mask=(rows[:, None] < m) & (columns[None, :] < n))


@triton.jit
def _length(norms, count):
    """|y| of a vector in `count` chunks, of each of which there is (largest |y_i|, sum of (y_i / largest)^2).

    The squares of 1e-20 or 1e20 are out of the range of fp32.
    """
    largest = 0.0
    for k in range(0, count, 128):
        chunk = k + tl.arange(0, 128)
        largest = tl.maximum(largest, tl.max(tl.load(norms + 2 * chunk, mask=chunk < count, other=0.0)))
    safe = tl.where(largest > 0, largest, 1.0)
    total = 0.0
    for k in range(0, count, 128):
        chunk = k + tl.arange(0, 128)
        ratio = tl.load(norms + 2 * chunk, mask=chunk < count, other=0.0) / safe
        total += tl.sum(tl.load(norms + 2 * chunk + 1, mask=chunk < count, other=0.0) * ratio * ratio)
    return safe * tl.sqrt(total)


@triton.jit
def _strip(strips, table, strip):
    """Of a strip: its matrix, the matrix's line in the table, the strip's number in it, its first row of tiles, its column."""
    matrix = tl.load(strips + strip)
    line = table + matrix * FIELDS
    number = (strip - tl.load(line + FIRST)).to(tl.int32)
    across = tl.load(line + ACROSS).to(tl.int32)
    return matrix, line, number, number // across, number % across


@triton.jit
def _shape(line):
    m, n = tl.load(line + M).to(tl.int32), tl.load(line + N).to(tl.int32)
    return m, n, tl.load(line + LD), tl.load(line + STEPS).to(tl.int32), tl.load(line + ALIGNED) != 0


@triton.jit
def products(
    strips, table, partials, z, z_norms, W_base, u_base,
    TO_OUT: tl.constexpr, DTYPE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Each strip's part of W z/|z| (TO_OUT), or of W^T u."""
    strip = tl.program_id(0)
    if TO_OUT:  # backwards: what the pass before read last is still in the cache
        strip = tl.num_programs(0) - 1 - strip
    _, line, _, i, j = _strip(strips, table, strip)
    m, n, ld, steps, aligned = _shape(line)
    over_rows = (tl.load(line + TRANSPOSED) != 0) == TO_OUT
    W = _address(W_base, tl.load(line + WEIGHT), DTYPE)
    to = partials + tl.load(line + PARTIALS)
    if TO_OUT:
        x = z + tl.load(line + IN)
        length = _length(z_norms + 2 * tl.load(line + IN_CHUNK), tl.cdiv(tl.where(over_rows, m, n), CHUNK))
        length = tl.maximum(length, 1.1754943508222875e-38)
    else:
        x = _floats(u_base, tl.load(line + U))
        length = 1.0
    columns = j * BN + tl.arange(0, BN)
    if over_rows:
        sums = tl.zeros((BN,), tl.float32)
        for step in range(steps):
            rows = (i * steps + step) * BM + tl.arange(0, BM)
            tile = _load_tile(W, rows, columns, m, n, ld, aligned, DTYPE)
            sums += tl.sum(tile * (tl.load(x + rows, mask=rows < m, other=0.0) / length)[:, None], 0)
        tl.store(to + i * n + columns, sums, mask=columns < n)
    else:
        right = tl.load(x + columns, mask=columns < n, other=0.0) / length
        for step in range(steps):
            rows = (i * steps + step) * BM + tl.arange(0, BM)
            tile = _load_tile(W, rows, columns, m, n, ld, aligned, DTYPE)
            tl.store(to + j * m + rows, tl.sum(tile * right[None, :], 1), mask=rows < m)


@triton.jit
def add_up(
    chunks, table, partials, y, norms,
    TO_OUT: tl.constexpr, BM: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """y, the sum of what `products` left, and what `_length` takes; a program makes a chunk of one vector."""
    matrix = tl.load(chunks + tl.program_id(0))
    line = table + matrix * FIELDS
    m, n, _, steps, _ = _shape(line)
    over_rows = (tl.load(line + TRANSPOSED) != 0) == TO_OUT
    size = tl.where(over_rows, n, m)
    parts = tl.where(over_rows, tl.cdiv(tl.cdiv(m, BM), steps), tl.load(line + ACROSS).to(tl.int32))
    first = tl.load(line + (OUT_CHUNK if TO_OUT else IN_CHUNK)).to(tl.int32)
    index = (tl.program_id(0) - first) * CHUNK + tl.arange(0, CHUNK)
    source = partials + tl.load(line + PARTIALS)
    sums = tl.zeros((CHUNK,), tl.float32)
    for k in range(0, parts, PARTS):
        part = k + tl.arange(0, PARTS)
        here = (part[:, None] < parts) & (index[None, :] < size)
        sums += tl.sum(tl.load(source + part[:, None] * size + index[None, :], mask=here, other=0.0), 0)
    tl.store(y + tl.load(line + (OUT if TO_OUT else IN)) + index, sums, mask=index < size)
    largest = tl.max(tl.abs(sums))
    scaled = sums / tl.where(largest > 0, largest, 1.0)
    tl.store(norms + 2 * tl.program_id(0), largest)
    tl.store(norms + 2 * tl.program_id(0) + 1, tl.sum(scaled * scaled))


@triton.jit
def normalise(chunks, table, y, y_norms, CHUNK: tl.constexpr):
    """u <- y / |y|. Where y is zero, as W is then, u stays: from zero it could not come back."""
    matrix = tl.load(chunks + tl.program_id(0))
    line = table + matrix * FIELDS
    size = tl.where(tl.load(line + TRANSPOSED) != 0, tl.load(line + N), tl.load(line + M)).to(tl.int32)
    first = tl.load(line + OUT_CHUNK)
    index = (tl.program_id(0) - first.to(tl.int32)) * CHUNK + tl.arange(0, CHUNK)
    length = _length(y_norms + 2 * first, tl.cdiv(size, CHUNK))
    u = _floats(0, tl.load(line + U))
    old = tl.load(u + index, mask=index < size, other=0.0)
    new = tl.load(y + tl.load(line + OUT) + index, mask=index < size, other=0.0)
    tl.store(u + index, tl.where(length == 0, old, new / length), mask=index < size)


@triton.jit
def scale(
    strips, table, z_norms, gamma, s, W_base, to_base,
    DTYPE: tl.constexpr, TO: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """W_hat = gamma/s W, s = |z|; the first strip of each block writes s."""
    matrix, line, number, i, j = _strip(strips, table, tl.program_id(0))
    m, n, ld, steps, aligned = _shape(line)
    inputs = tl.where(tl.load(line + TRANSPOSED) != 0, m, n)
    length = _length(z_norms + 2 * tl.load(line + IN_CHUNK), tl.cdiv(inputs, CHUNK))
    if number == 0:
        tl.store(s + matrix, length)
    factor = tl.load(gamma + matrix).to(tl.float32) / length
    W, to = _address(W_base, tl.load(line + WEIGHT), DTYPE), _address(to_base, tl.load(line + WEIGHT), TO)
    columns = j * BN + tl.arange(0, BN)
    for step in range(steps):
        rows = (i * steps + step) * BM + tl.arange(0, BM)
        tile = _load_tile(W, rows, columns, m, n, ld, aligned, DTYPE)
        _store_tile(to, factor * tile, rows, columns, m, n, ld, aligned, TO)


@triton.jit
def overlaps(
    strips, table, sums, G_base, W_base,
    G_DTYPE: tl.constexpr, DTYPE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Each strip's part of <G, W>."""
    strip = tl.program_id(0)
    _, line, _, i, j = _strip(strips, table, strip)
    m, n, ld, steps, aligned = _shape(line)
    G, W = _address(G_base, tl.load(line + WEIGHT), G_DTYPE), _address(W_base, tl.load(line + WEIGHT), DTYPE)
    columns = j * BN + tl.arange(0, BN)
    total = 0.0
    for step in range(steps):
        rows = (i * steps + step) * BM + tl.arange(0, BM)
        g = _load_tile(G, rows, columns, m, n, ld, aligned, G_DTYPE)
        total += tl.sum(g * _load_tile(W, rows, columns, m, n, ld, aligned, DTYPE))
    tl.store(sums + strip, total)


@triton.jit
def gradient(
    strips, table, sums, z, s, gamma, d_gamma, G_base, u_base, to_base,
    STOP: tl.constexpr, G_DTYPE: tl.constexpr, TO: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dW = gamma/s (G - c u (z/s)^T), c = <G, W>/s; the first strip of each block writes c, which is dgamma."""
    strip = tl.num_programs(0) - 1 - tl.program_id(0)  # backwards: the last of G is still in the cache
    matrix, line, number, i, j = _strip(strips, table, strip)
    m, n, ld, steps, aligned = _shape(line)
    first, count = strip - number, tl.cdiv(tl.cdiv(m, BM), steps) * tl.load(line + ACROSS).to(tl.int32)
    total = 0.0
    for k in range(0, count, 512):
        part = k + tl.arange(0, 512)
        total += tl.sum(tl.load(sums + first + part, mask=part < count, other=0.0))
    length = tl.load(s + matrix)
    c = total / length
    if number == 0:
        tl.store(d_gamma + matrix, c)
    factor = tl.load(gamma + matrix).to(tl.float32) / length
    G, to = _address(G_base, tl.load(line + WEIGHT), G_DTYPE), _address(to_base, tl.load(line + WEIGHT), TO)
    u = _floats(u_base, tl.load(line + U))
    v = z + tl.load(line + IN)
    columns = j * BN + tl.arange(0, BN)
    if tl.load(line + TRANSPOSED) != 0:
        left, left_by, right, right_by = v, length, u, 1.0
    else:
        left, left_by, right, right_by = u, 1.0, v, length
    across = tl.load(right + columns, mask=columns < n, other=0.0) / right_by
    for step in range(steps):
        rows = (i * steps + step) * BM + tl.arange(0, BM)
        d = _load_tile(G, rows, columns, m, n, ld, aligned, G_DTYPE)
        if not STOP:
            down = c * (tl.load(left + rows, mask=rows < m, other=0.0) / left_by)
            d -= down[:, None] * across[None, :]
        _store_tile(to, factor * d, rows, columns, m, n, ld, aligned, TO)
