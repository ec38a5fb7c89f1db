"""The Triton kernels that kernels.py launches; that file has the equations. Importing this one imports triton.

A matrix is a block of rows of a weight. It is read as M (m, n) with contiguous rows: M = W, or M = W^T where W is stored
transposed. M is cut into strips of `steps` tiles (BM, BN), one below the other, and a program takes one strip. Offsets are in
the plan's table (kernels.py), in elements from the base addresses that a kernel is given. Each sum has two stages and a fixed
order, without atomics, so that the same input gives the same bits.
"""

import torch
import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret  # read at import, when triton, too, decides how to make the kernels below
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


# Functions that read the columns of the table, which kernels.py fills. The column numbers are not global constants, because
# triton compares all global constants that a kernel uses at each launch, which takes longer than the rest of the launch.
@triton.jit
def _line(table, matrix):
    return table + 16 * matrix


@triton.jit
def _weight(line):
    """Offset of the first element of the matrix."""
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
    """m, n, the stride between rows, tiles in a strip, and whether each row starts at a multiple of 16 bytes."""
    m, n = _size(line)
    return m, n, tl.load(line + 3), tl.load(line + 8).to(tl.int32), tl.load(line + 5) != 0


@triton.jit
def _first_strip(line):
    return tl.load(line + 6)


@triton.jit
def _across(line):
    """Number of strips side by side."""
    return tl.load(line + 7).to(tl.int32)


@triton.jit
def _partials(line):
    """Offset of the matrix's partial sums."""
    return tl.load(line + 9)


@triton.jit
def _u(line):
    """Offset of u."""
    return tl.load(line + 10)


@triton.jit
def _vector(line, TO_OUT: tl.constexpr):
    """Offset of the matrix's part in the vectors (out,) of all matrices (TO_OUT), or in the vectors (in,)."""
    return tl.load(line + (11 if TO_OUT else 12))


@triton.jit
def _first_chunk(line, TO_OUT: tl.constexpr):
    """Index of the first chunk of that part."""
    return tl.load(line + (13 if TO_OUT else 14))


@triton.jit
def _gamma(line):
    """Offset of gamma."""
    return tl.load(line + 15)


@triton.jit
def _address(base, offset, DTYPE: tl.constexpr):
    return base + offset * (DTYPE.primitive_bitwidth // 8)


@triton.jit
def _floats(base, offset):
    return (base + offset * 4).to(tl.pointer_type(tl.float32))


@triton.jit
def _load_tile(address, rows, columns, m, n, ld, aligned, DTYPE: tl.constexpr):
    """A tile of M in fp32, zero beyond the edges of M.

    Where `aligned`, `x // 16 * 16` equals x; it tells the compiler that it may load 16 bytes at a time.
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
    """|y| of a vector in `count` chunks, from (largest |y_i|, sum of (y_i / largest)^2) of each chunk.

    Entries are divided by the largest because the squares of 1e-20 or 1e20 are out of the range of fp32.
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
    """The matrix of a strip, its line in the table, the strip's number in the matrix, and its place: (strips above, left)."""
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
    """Writes the partial sums of each strip of W z/|z| (TO_OUT), or of W^T u."""
    strip = tl.program_id(0)
    if TO_OUT:  # in reverse: what the previous launch read last is still in the cache
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
    """y, the sum of the partial sums of `products`, and of each chunk the two numbers for `_length`; a program per chunk."""
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
    """u <- y / |y|, and writes |y|. Where y = 0, because W = 0, u is kept: a u of zeros would stay zero for ever."""
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
    """s = |z| / |u|, factor = gamma/s and w = u / (|u|^2 s); a program per matrix."""
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
    """The part of <G, W> of each strip, in sums (strips,)."""
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


# z, w, s and factor may be slices of larger tensors, which need not be aligned.
@triton.jit(do_not_specialize_on_alignment=["z", "w", "s", "factor"])
def gradient(
    strips, table, sums, z, w, s, factor, d_gamma, G_base, to_base,
    STOP: tl.constexpr, G_DTYPE: tl.constexpr, TO: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dW = gamma/s (G - c w z^T), c = <G, W>/s; the first strip of each block writes c, which is dgamma."""
    strip = tl.num_programs(0) - 1 - tl.program_id(0)  # in reverse: the last strips of G are still in the cache
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
