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


# The columns of the table, in the order of kernels.py. They are no global constants: at each launch triton compares those that
# a kernel uses with what they were, which takes longer than all the rest of the launch.
@triton.jit
def _line(table, matrix):
    return table + 16 * matrix


@triton.jit
def _weight(line):
    """Where the first element is."""
    return tl.load(line)


@triton.jit
def _size(line):
    """(m, n)."""
    return tl.load(line + 1).to(tl.int32), tl.load(line + 2).to(tl.int32)


@triton.jit
def _transposed(line):
    return tl.load(line + 4) != 0


@triton.jit
def _shape(line):
    """m, n, from one row to the next, tiles in a strip, and whether all rows start at 16 bytes."""
    m, n = _size(line)
    return m, n, tl.load(line + 3), tl.load(line + 8).to(tl.int32), tl.load(line + 5) != 0


@triton.jit
def _first_strip(line):
    return tl.load(line + 6)


@triton.jit
def _across(line):
    """How many strips lie side by side."""
    return tl.load(line + 7).to(tl.int32)


@triton.jit
def _partials(line):
    """Where its partial sums start."""
    return tl.load(line + 9)


@triton.jit
def _u(line):
    """Where u is."""
    return tl.load(line + 10)


@triton.jit
def _vector(line, TO_OUT: tl.constexpr):
    """Where its part of the vectors (out,), or of those (in,), of all matrices starts."""
    return tl.load(line + (11 if TO_OUT else 12))


@triton.jit
def _first_chunk(line, TO_OUT: tl.constexpr):
    """The first chunk of that part."""
    return tl.load(line + (13 if TO_OUT else 14))


@triton.jit
def _gamma(line):
    """Where gamma is."""
    return tl.load(line + 15)


@triton.jit
def _address(base, offset, DTYPE: tl.constexpr):
    return base + offset * (DTYPE.primitive_bitwidth // 8)


@triton.jit
def _floats(base, offset):
    return (base + offset * 4).to(tl.pointer_type(tl.float32))


@triton.jit
def _load_tile(address, rows, columns, m, n, ld, aligned, DTYPE: tl.constexpr):
    """A tile of M in fp32, zero beyond its edges.

    Multiples of 16 are written out, though they change no number, to tell the compiler that it may load 16 bytes at a time.
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
    line = _line(table, matrix)
    number = (strip - _first_strip(line)).to(tl.int32)
    across = _across(line)
    return matrix, line, number, number // across, number % across


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
    over_rows = _transposed(line) == TO_OUT
    W = _address(W_base, _weight(line), DTYPE)
    to = partials + _partials(line)
    if TO_OUT:
        x = z + _vector(line, False)
        length = _length(z_norms + 2 * _first_chunk(line, False), tl.cdiv(tl.where(over_rows, m, n), CHUNK))
        length = tl.maximum(length, 1.1754943508222875e-38)
    else:
        x = _floats(u_base, _u(line))
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
    line = _line(table, matrix)
    m, n, _, steps, _ = _shape(line)
    over_rows = _transposed(line) == TO_OUT
    size = tl.where(over_rows, n, m)
    parts = tl.where(over_rows, tl.cdiv(tl.cdiv(m, BM), steps), _across(line))
    first = _first_chunk(line, TO_OUT).to(tl.int32)
    index = (tl.program_id(0) - first) * CHUNK + tl.arange(0, CHUNK)
    source = partials + _partials(line)
    sums = tl.zeros((CHUNK,), tl.float32)
    for k in range(0, parts, PARTS):
        part = k + tl.arange(0, PARTS)
        here = (part[:, None] < parts) & (index[None, :] < size)
        sums += tl.sum(tl.load(source + part[:, None] * size + index[None, :], mask=here, other=0.0), 0)
    tl.store(y + _vector(line, TO_OUT) + index, sums, mask=index < size)
    largest = tl.max(tl.abs(sums))
    scaled = sums / tl.where(largest > 0, largest, 1.0)
    tl.store(norms + 2 * tl.program_id(0), largest)
    tl.store(norms + 2 * tl.program_id(0) + 1, tl.sum(scaled * scaled))


@triton.jit
def normalise(chunks, table, y, y_norms, lengths, CHUNK: tl.constexpr):
    """u <- y / |y|, and |y|. Where y is zero, as W is then, u stays: from zero it could not come back."""
    matrix = tl.load(chunks + tl.program_id(0))
    line = _line(table, matrix)
    m, n = _size(line)
    size = tl.where(_transposed(line), n, m)
    first = _first_chunk(line, True)
    index = (tl.program_id(0) - first.to(tl.int32)) * CHUNK + tl.arange(0, CHUNK)
    length = _length(y_norms + 2 * first, tl.cdiv(size, CHUNK))
    if tl.program_id(0) == first:
        tl.store(lengths + matrix, length)
    u = _floats(0, _u(line))
    old = tl.load(u + index, mask=index < size, other=0.0)
    new = tl.load(y + _vector(line, True) + index, mask=index < size, other=0.0)
    tl.store(u + index, tl.where(length == 0, old, new / length), mask=index < size)


@triton.jit
def measured(table, z_norms, w, s, factor, u_base, gamma_base, CHUNK: tl.constexpr):
    """s = |z| / |u|, gamma/s and w = u / (|u|^2 s); a program does a matrix."""
    matrix = tl.program_id(0)
    line = _line(table, matrix)
    m, n = _size(line)
    transposed = _transposed(line)
    outputs, inputs = tl.where(transposed, n, m), tl.where(transposed, m, n)
    u, to = _floats(u_base, _u(line)), w + _vector(line, True)
    squares = 0.0
    for k in range(0, outputs, CHUNK):
        index = k + tl.arange(0, CHUNK)
        x = tl.load(u + index, mask=index < outputs, other=0.0)
        squares += tl.sum(x * x)
    length = _length(z_norms + 2 * _first_chunk(line, False), tl.cdiv(inputs, CHUNK)) / tl.sqrt(squares)
    tl.store(s + matrix, length)
    tl.store(factor + matrix, tl.load(_floats(gamma_base, _gamma(line))) / length)
    for k in range(0, outputs, CHUNK):
        index = k + tl.arange(0, CHUNK)
        x = tl.load(u + index, mask=index < outputs, other=0.0)
        tl.store(to + index, x / squares / length, mask=index < outputs)


@triton.jit
def overlaps(
    strips, table, sums, G_base, W_base,
    G_DTYPE: tl.constexpr, DTYPE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Each strip's part of <G, W>."""
    strip = tl.program_id(0)
    _, line, _, i, j = _strip(strips, table, strip)
    m, n, ld, steps, aligned = _shape(line)
    G, W = _address(G_base, _weight(line), G_DTYPE), _address(W_base, _weight(line), DTYPE)
    columns = j * BN + tl.arange(0, BN)
    total = 0.0
    for step in range(steps):
        rows = (i * steps + step) * BM + tl.arange(0, BM)
        g = _load_tile(G, rows, columns, m, n, ld, aligned, G_DTYPE)
        total += tl.sum(g * _load_tile(W, rows, columns, m, n, ld, aligned, DTYPE))
    tl.store(sums + strip, total)


# Parts of what was measured of a model start anywhere.
@triton.jit(do_not_specialize_on_alignment=["z", "w", "s", "factor"])
def gradient(
    strips, table, sums, z, w, s, factor, d_gamma, G_base, to_base,
    STOP: tl.constexpr, G_DTYPE: tl.constexpr, TO: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dW = gamma/s (G - c w z^T), c = <G, W>/s; the first strip of each block writes c, which is dgamma."""
    strip = tl.num_programs(0) - 1 - tl.program_id(0)  # backwards: the last of G is still in the cache
    matrix, line, number, i, j = _strip(strips, table, strip)
    m, n, ld, steps, aligned = _shape(line)
    first, count = strip - number, tl.cdiv(tl.cdiv(m, BM), steps) * _across(line)
    total = 0.0
    for k in range(0, count, 512):
        part = k + tl.arange(0, 512)
        total += tl.sum(tl.load(sums + first + part, mask=part < count, other=0.0))
    c = total / tl.load(s + matrix)
    if number == 0:
        tl.store(d_gamma + matrix, c)
    scale = tl.load(factor + matrix)
    G, to = _address(G_base, _weight(line), G_DTYPE), _address(to_base, _weight(line), TO)
    left, right = w + _vector(line, True), z + _vector(line, False)
    if _transposed(line):
        left, right = right, left
    columns = j * BN + tl.arange(0, BN)
    across = tl.load(right + columns, mask=columns < n, other=0.0)
    for step in range(steps):
        rows = (i * steps + step) * BM + tl.arange(0, BM)
        d = _load_tile(G, rows, columns, m, n, ld, aligned, G_DTYPE)
        if not STOP:
            down = c * tl.load(left + rows, mask=rows < m, other=0.0)
            d -= down[:, None] * across[None, :]
        _store_tile(to, scale * d, rows, columns, m, n, ld, aligned, TO)
