# mypy: disallow-untyped-defs=False
"""The kernels of the `triton` variants; native_triton.py launches them and makes their tables.

They compute what reference.py specifies: q . k is a transformed query times codes, centred by 8 and exact in fp16, plus
what a token's scale and minimum, the rotating shift and position 0 add to it.
"""

import triton
import triton.language as tl

# --- bytes of a page, which layout.py states


@triton.jit
def _k_byte(slot, byte, D: tl.constexpr):
    """Offset of byte 4g + b of a token's K codes: dimensions 8g + b (low nibble) and 8g + 4 + b (high)."""
    return slot // 16 * (8 * D) + byte // 4 * 64 + slot % 16 * 4 + byte % 4


@triton.jit
def _v_byte(slot, byte, D: tl.constexpr):
    """Offset in the V codes of a token's byte i: dimensions 2i (low nibble) and 2i + 1 (high)."""
    return slot // 2 * D + byte // 2 * 4 + slot % 2 * 2 + byte % 2


@triton.jit
def _split_k(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """x [ROWS, COLUMNS] -> the columns of the K bytes' low and high nibbles, [ROWS, COLUMNS / 2] each."""
    low, high = tl.split(x.reshape(ROWS, COLUMNS // 8, 2, 4).permute(0, 1, 3, 2))
    return low.reshape(ROWS, COLUMNS // 2), high.reshape(ROWS, COLUMNS // 2)


@triton.jit
def _join_k(low, high, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The inverse of _split_k."""
    low = low.reshape(ROWS, COLUMNS // 8, 4)
    return tl.join(low, high.reshape(ROWS, COLUMNS // 8, 4)).permute(0, 1, 3, 2).reshape(ROWS, COLUMNS)


# --- arithmetic

PROPAGATE_NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _hadamard(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr):
    """x [ROWS, COLUMNS] times blocks of 2^STEPS of Sylvester's matrix of ones and minus ones."""
    for step in tl.static_range(STEPS):
        a, b = tl.split(x.reshape(ROWS, COLUMNS >> (step + 1), 2, 1 << step).permute(0, 1, 3, 2))
        x = tl.join(a + b, a - b).permute(0, 1, 3, 2).reshape(ROWS, COLUMNS)
    return x


@triton.jit
def _angle(position, turns):
    """fp32 radians in -pi .. pi of int64 positions, exact up to their rounding: the product wraps modulo a turn."""
    return (position * turns).to(tl.float32) * 3.4061215800304857e-19  # 2 pi / 2^64


@triton.jit
def _product(x, matrix, low: tl.constexpr):
    """fp32 x times a matrix, both at most 1. matrix: fp16, and its rounding errors as fp16 `low` elements further."""
    high = x.to(tl.float16)
    m = tl.load(matrix)
    product = tl.dot((x - high.to(tl.float32)).to(tl.float16), m, tl.dot(high, tl.load(matrix + low)))
    return tl.dot(high, m, product)


@triton.jit
def _centred(nibble):
    """Codes 0 .. 15 (uint8) -> fp16 -8 .. 7, through the bits of 1024 + code."""
    return (nibble.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) - 1032.0


@triton.jit
def _shift_at(position, at, d, inside, k_shift, k_first, turns, PAIRS: tl.constexpr):
    """K_t of int64 positions [ROWS] in dimensions d, which are `at` in the tables: [ROWS, COLUMNS]."""
    shift = tl.load(k_shift + at, mask=inside, other=0)[None, :]
    if PAIRS:
        pair = tl.where(d < PAIRS, d, d - PAIRS)
        angle = _angle(position[:, None], tl.load(turns + pair, mask=d < 2 * PAIRS, other=0)[None, :])
        other = tl.load(k_shift + tl.where(d < PAIRS, at + PAIRS, at - PAIRS), mask=d < 2 * PAIRS, other=0)
        shift = shift * tl.cos(angle) + tl.where(d < PAIRS, -other, other)[None, :] * tl.sin(angle)
    return tl.where(position[:, None] == 0, tl.load(k_first + at, mask=inside, other=0)[None, :], shift)


@triton.jit
def _softmax_step(scores, m, ROWS: tl.constexpr):
    """Weights of scores [ROWS, n] in units of log 2, the new maximum, and the factor on what was summed before."""
    new = tl.maximum(m, tl.max(scores, 1))
    finite = tl.where(new == float("-inf"), 0.0, new)
    return tl.exp2(scores - finite[:, None]), new, tl.exp2(m - finite)


@triton.jit
def _quantize(x, inside):
    """fp32 x [ROWS, COLUMNS] -> codes uint8, scale and minimum fp16 [ROWS], over the columns `inside`."""
    low = tl.min(tl.where(inside, x, float("inf")), 1)
    high = tl.max(tl.where(inside, x, float("-inf")), 1)
    minimum = tl.minimum(tl.maximum(low, -65504.0), 65504.0).to(tl.float16)
    scale = tl.minimum(tl.div_rn(high - low, 15.0), 65504.0).to(tl.float16)
    step = scale.to(tl.float32)
    inverse = tl.where(step > 0, tl.div_rn(1.0, tl.where(step > 0, step, 1.0)), 0.0)
    codes = (x - minimum.to(tl.float32)[:, None]) * inverse[:, None]
    codes = tl.minimum(tl.maximum(codes, 0.0), 15.0) + 12582912.0  # rounds to the nearest, ties to the even one
    return (codes - 12582912.0).to(tl.int32).to(tl.uint8), scale, minimum


# --- kernels

# arguments that differ between calls of one model: a kernel compiled for each value would be compiled in a capture
COUNTS = [
    "lse_token",
    "lse_head",
    "lse_part",
    "out_part",
    "table_stride",
    "num_tokens",
    "num_seqs",
    "num_blocks",
    "parts",
    "window",
]


@triton.jit(do_not_specialize=["num_tokens", "num_slots"])
def write(
    key,
    value,
    cache,
    slots,
    positions,
    key_scale,
    k_shift,
    v_shift,
    k_first,
    v_first,
    turns,
    k_token,
    k_head,
    v_token,
    v_head,
    block_stride,
    num_tokens,
    num_slots,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,  # D to the next power of two
    PAIRS: tl.constexpr,
    HADAMARD: tl.constexpr,  # log 2 of the block, 0: none
    BLOCK_SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    V_CODES: tl.constexpr,
    K_META: tl.constexpr,
    V_META: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A program takes ROWS tokens of one KV head."""
    head = tl.program_id(1)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(slots + token, mask=token < num_tokens, other=-1)
    kept = (slot >= 0) & (slot < num_slots)
    position = tl.load(positions + token, mask=kept, other=0)
    token = token.to(tl.int64)
    d = tl.arange(0, COLUMNS)
    inside = d < D
    both = kept[:, None] & inside[None, :]
    at = head * D + d
    k = tl.load(key + (token * k_token + head * k_head)[:, None] + d[None, :], mask=both, other=0).to(tl.float32)
    v = tl.load(value + (token * v_token + head * v_head)[:, None] + d[None, :], mask=both, other=0).to(tl.float32)
    first = position[:, None] == 0
    shift = _shift_at(position, at, d, inside, k_shift, k_first, turns, PAIRS)
    k = (k - shift) * tl.load(key_scale + at, mask=inside, other=0)[None, :]
    k = _hadamard(k, ROWS, COLUMNS, HADAMARD)
    v -= tl.where(
        first,
        tl.load(v_first + at, mask=inside, other=0)[None, :],
        tl.load(v_shift + at, mask=inside, other=0)[None, :],
    )
    k_codes, k_scale, k_minimum = _quantize(k, inside[None, :])
    v_codes, v_scale, v_minimum = _quantize(v, inside[None, :])

    page = cache + slot // BLOCK_SIZE * block_stride + head * PAGE
    slot = (slot % BLOCK_SIZE).to(tl.int32)
    byte = tl.arange(0, COLUMNS // 2)[None, :]
    both = kept[:, None] & (byte < D // 2)
    low, high = _split_k(k_codes, ROWS, COLUMNS)
    tl.store(page[:, None] + _k_byte(slot[:, None], byte, D), low | (high << 4), mask=both)
    low, high = tl.split(v_codes.reshape(ROWS, COLUMNS // 2, 2))
    tl.store(page[:, None] + V_CODES + _v_byte(slot[:, None], byte, D), low | (high << 4), mask=both)
    k_meta = (page + K_META + 4 * slot).to(tl.pointer_type(tl.float16))
    v_meta = (page + V_META + 4 * slot).to(tl.pointer_type(tl.float16))
    tl.store(k_meta, k_scale, mask=kept)
    tl.store(k_meta + 1, k_minimum, mask=kept)
    tl.store(v_meta, v_scale, mask=kept)
    tl.store(v_meta + 1, v_minimum, mask=kept)


@triton.jit(do_not_specialize=["table_stride", "num_tokens", "num_keys", "num_blocks"])
def gather(
    key,
    value,
    keys,
    values,
    cache,
    block_table,
    seq_lens,
    starts,
    first,
    key_starts,
    query_scale,
    k_shift,
    v_shift,
    k_first,
    v_first,
    turns,
    k_token,
    k_head,
    v_token,
    v_head,
    table_stride,
    block_stride,
    num_tokens,
    num_keys,
    num_blocks,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,  # D to the next power of two
    PAIRS: tl.constexpr,
    HADAMARD: tl.constexpr,  # log 2 of the block, 0: none
    BLOCK_SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    V_CODES: tl.constexpr,
    K_META: tl.constexpr,
    V_META: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A program takes ROWS tokens of one sequence and KV head."""
    seq = tl.program_id(1)
    head = tl.program_id(2)
    begin = tl.load(starts + seq)
    past = tl.load(seq_lens + seq) - (tl.load(starts + seq + 1) - begin)
    row = tl.load(key_starts + seq) + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = (row < tl.load(key_starts + seq + 1)) & (row < num_keys)
    position = tl.load(first + seq) + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    old = valid & (position < past)
    token = begin + position - past
    new = valid & (position >= past) & (token < num_tokens)
    token = token.to(tl.int64)
    d = tl.arange(0, COLUMNS)
    inside = d < D
    at = head * D + d

    page = tl.load(block_table + seq * table_stride + position // BLOCK_SIZE, mask=old, other=0)
    page = tl.minimum(tl.maximum(page, 0), num_blocks - 1)
    base = cache + page.to(tl.int64) * block_stride + head * PAGE
    slot = position % BLOCK_SIZE
    byte = tl.arange(0, COLUMNS // 2)[None, :]
    both = old[:, None] & (byte < D // 2)
    k = tl.load(base[:, None] + _k_byte(slot[:, None], byte, D), mask=both, other=0)
    v = tl.load(base[:, None] + V_CODES + _v_byte(slot[:, None], byte, D), mask=both, other=0)
    k_meta = (base + K_META + 4 * slot).to(tl.pointer_type(tl.float16))
    v_meta = (base + V_META + 4 * slot).to(tl.pointer_type(tl.float16))
    k_scale = tl.load(k_meta, mask=old, other=0).to(tl.float32)[:, None]
    k_middle = 8 * k_scale + tl.load(k_meta + 1, mask=old, other=0).to(tl.float32)[:, None]
    v_scale = tl.load(v_meta, mask=old, other=0).to(tl.float32)[:, None]
    v_middle = 8 * v_scale + tl.load(v_meta + 1, mask=old, other=0).to(tl.float32)[:, None]
    k = _join_k(_centred(k & 15), _centred(k >> 4), ROWS, COLUMNS).to(tl.float32) * k_scale + k_middle
    k = _hadamard(tl.where(inside[None, :], k, 0.0), ROWS, COLUMNS, HADAMARD)
    k *= tl.load(query_scale + at, mask=inside, other=0)[None, :]
    k += _shift_at(position.to(tl.int64), at, d, inside, k_shift, k_first, turns, PAIRS)
    v = tl.interleave(_centred(v & 15), _centred(v >> 4)).to(tl.float32) * v_scale + v_middle
    v += tl.where(
        position[:, None] == 0,
        tl.load(v_first + at, mask=inside, other=0)[None, :],
        tl.load(v_shift + at, mask=inside, other=0)[None, :],
    )

    both = new[:, None] & inside[None, :]
    raw = tl.load(key + (token * k_token + head * k_head)[:, None] + d[None, :], mask=both, other=0)
    k = tl.where(new[:, None], raw.to(tl.float32), k)
    raw = tl.load(value + (token * v_token + head * v_head)[:, None] + d[None, :], mask=both, other=0)
    v = tl.where(new[:, None], raw.to(tl.float32), v)
    to = (row.to(tl.int64) * (HEADS * D))[:, None] + at[None, :]
    both = (old | new)[:, None] & inside[None, :]
    tl.store(keys + to, tl.clamp(k, -65504.0, 65504.0, PROPAGATE_NAN).to(tl.float16), mask=both)
    tl.store(values + to, tl.clamp(v, -65504.0, 65504.0, PROPAGATE_NAN).to(tl.float16), mask=both)


@triton.jit(do_not_specialize=COUNTS)
def attention(
    query,
    key,
    value,
    out,
    lse,
    cache,
    block_table,
    seq_lens,
    starts,
    query_scale,
    k_shift,
    k_extra,
    v_shift,
    v_extra,
    turns,
    basis,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    out_token,
    out_head,
    out_part,
    lse_token,
    lse_head,
    lse_part,
    table_stride,
    block_stride,
    num_tokens,
    num_seqs,
    num_blocks,
    parts,
    window,
    scale,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,  # D to the next power of two
    PAIRS: tl.constexpr,
    ROTARY: tl.constexpr,  # PAIRS to the next power of two, at least 16
    HADAMARD: tl.constexpr,  # log 2 of the block, 0: none
    BLOCK_SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    V_CODES: tl.constexpr,
    K_META: tl.constexpr,
    V_META: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,  # (query token, head of the group) of a program
    KEYS: tl.constexpr,  # of a turn of its loops
    BASIS: tl.constexpr,  # tokens of the basis, no fewer
    PART_TURNS: tl.constexpr,  # least of a part
    OPERAND: tl.constexpr,  # type of products with the step's own keys and values
):
    """A program takes ROWS // GROUP query tokens of one sequence and KV head, over one part of the past.

    Part 0 takes the step's own tokens, too. Each part writes a normalized output and its
    log-sum-exp, a part without work -inf alone.
    """
    TOKENS: tl.constexpr = ROWS // GROUP
    HALF: tl.constexpr = COLUMNS // 2
    tile = tl.program_id(0)
    head = tl.program_id(1)
    part = tl.program_id(2)
    # tiles starts[s] // TOKENS + s and later ones are of sequence s, more than it needs
    seq = 0
    stop = num_seqs
    while stop - seq > 1:
        middle = (seq + stop) // 2
        if tl.load(starts + middle) // TOKENS + middle <= tile:
            seq = middle
        else:
            stop = middle
    begin = tl.load(starts + seq)
    count = tl.load(starts + seq + 1) - begin
    first = (tile - begin // TOKENS - seq) * TOKENS
    if first >= count:
        return
    past = tl.load(seq_lens + seq) - count

    row = tl.arange(0, ROWS)
    index = first + row // GROUP  # of the query in the step's tokens of the sequence
    token = begin + index
    valid = (row < TOKENS * GROUP) & (index < count) & (token < num_tokens)
    token = token.to(tl.int64)
    q_heads = head * GROUP + row % GROUP

    oldest = tl.maximum(past + first - window + 1, 0)  # that any row sees
    block = oldest // KEYS
    blocks = tl.maximum(tl.cdiv(past, KEYS) - block, 0)
    used = tl.minimum(tl.cdiv(blocks, PART_TURNS), parts)
    if part >= tl.maximum(used, 1):
        if lse is not None:
            nothing = tl.full((ROWS,), float("-inf"), tl.float32)
            tl.store(lse + token * lse_token + q_heads * lse_head + part * lse_part, nothing, mask=valid)
        return
    share = tl.cdiv(blocks, tl.maximum(used, 1))
    last = tl.minimum(block + (part + 1) * share, block + blocks)
    block += part * share

    d = tl.arange(0, COLUMNS)
    inside = d < D
    at = head * D + d
    q_rows = query + token * q_token + q_heads * q_head
    q = tl.load(q_rows[:, None] + d[None, :], mask=valid[:, None] & inside[None, :], other=0)
    scale *= 1.4426950408889634  # scores are in units of log 2
    wide = q.to(tl.float32) * scale
    shift = tl.load(k_shift + at, mask=inside, other=0)
    fixed = tl.sum(wide * tl.where(d >= 2 * PAIRS, shift, 0.0)[None, :], 1)
    extra = tl.sum(wide * tl.load(k_extra + at, mask=inside, other=0)[None, :], 1)  # of position 0
    if PAIRS:
        j = tl.arange(0, ROTARY)
        paired = valid[:, None] & (j < PAIRS)[None, :]
        a = tl.load(q_rows[:, None] + j[None, :], mask=paired, other=0).to(tl.float32) * scale
        b = tl.load(q_rows[:, None] + (PAIRS + j)[None, :], mask=paired, other=0).to(tl.float32) * scale
        shift_a = tl.load(k_shift + head * D + j, mask=j < PAIRS, other=0)[None, :]
        shift_b = tl.load(k_shift + head * D + PAIRS + j, mask=j < PAIRS, other=0)[None, :]
        of_cos = a * shift_a + b * shift_b
        of_sin = b * shift_a - a * shift_b
        size = tl.maximum(tl.max(tl.sqrt(of_cos * of_cos + of_sin * of_sin), 1), 1e-30)
        of_cos /= size[:, None]
        of_sin /= size[:, None]
        turn = tl.load(turns + j, mask=j < PAIRS, other=0)
        within = basis + j[:, None] * BASIS + tl.arange(0, KEYS)[None, :]
    transformed = wide * tl.load(query_scale + at, mask=inside, other=0)[None, :]
    transformed = _hadamard(transformed, ROWS, COLUMNS, HADAMARD)
    total = tl.sum(transformed, 1)
    norm = tl.maximum(tl.max(tl.abs(transformed), 1), 1e-30)
    low, high = _split_k(transformed / norm[:, None], ROWS, COLUMNS)
    q_low = low.to(tl.float16)
    q_high = high.to(tl.float16)

    m = tl.full((ROWS,), float("-inf"), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    weight_first = tl.zeros((ROWS,), tl.float32)  # of position 0
    middle_sum = tl.zeros((ROWS,), tl.float32)  # of the values of code 8
    acc_even = tl.zeros((ROWS, HALF), tl.float32)
    acc_odd = tl.zeros((ROWS, HALF), tl.float32)
    n = tl.arange(0, KEYS)
    byte = tl.arange(0, HALF)
    byte_inside = byte < D // 2
    for i in range(block, last):
        position = i * KEYS + n
        seen = (position >= oldest) & (position < past)
        page = tl.load(block_table + seq * table_stride + position // BLOCK_SIZE, mask=seen, other=0)
        page = tl.minimum(tl.maximum(page, 0), num_blocks - 1)
        base = cache + page.to(tl.int64) * block_stride + head * PAGE
        slot = position % BLOCK_SIZE
        both = seen[:, None] & byte_inside[None, :]
        k = tl.load(base[:, None] + _k_byte(slot[:, None], byte[None, :], D), mask=both, other=0)
        v = tl.load(base[:, None] + V_CODES + _v_byte(slot[:, None], byte[None, :], D), mask=both, other=0)
        k_meta = (base + K_META + 4 * slot).to(tl.pointer_type(tl.float16))
        v_meta = (base + V_META + 4 * slot).to(tl.pointer_type(tl.float16))
        k_scale = tl.load(k_meta, mask=seen, other=0).to(tl.float32)
        k_middle = 8 * k_scale + tl.load(k_meta + 1, mask=seen, other=0).to(tl.float32)
        v_scale = tl.load(v_meta, mask=seen, other=0).to(tl.float32)
        v_middle = 8 * v_scale + tl.load(v_meta + 1, mask=seen, other=0).to(tl.float32)

        scores = tl.dot(q_low, tl.trans(_centred(k & 15)))
        scores = tl.dot(q_high, tl.trans(_centred(k >> 4)), scores)
        scores = scores * norm[:, None] * k_scale[None, :] + total[:, None] * k_middle[None, :] + fixed[:, None]
        if PAIRS:
            angle = _angle(tl.cast(i, tl.int64) * KEYS, turn)
            cos = tl.cos(angle)[None, :]
            sin = tl.sin(angle)[None, :]
            shifted = _product(of_cos * cos + of_sin * sin, within, ROTARY * BASIS)
            shifted += _product(of_sin * cos - of_cos * sin, within + 2 * ROTARY * BASIS, ROTARY * BASIS)
            scores += shifted * size[:, None]
        scores += tl.where(position == 0, 1.0, 0.0)[None, :] * extra[:, None]
        visible = seen[None, :] & (position[None, :] > (past + index - window)[:, None])
        p, m, keep = _softmax_step(tl.where(visible, scores, float("-inf")), m, ROWS)

        weight = weight * keep + tl.sum(p, 1)
        weight_first = weight_first * keep + tl.sum(tl.where((position == 0)[None, :], p, 0.0), 1)
        middle_sum = middle_sum * keep + tl.sum(p * v_middle[None, :], 1)
        largest = tl.maximum(tl.max(v_scale, 0), 1e-30)
        p16 = (p * (v_scale / largest)[None, :]).to(tl.float16)
        acc_even = acc_even * keep[:, None] + tl.dot(p16, _centred(v & 15)) * largest
        acc_odd = acc_odd * keep[:, None] + tl.dot(p16, _centred(v >> 4)) * largest

    even = head * D + 2 * byte
    even_shift = tl.load(v_shift + even, mask=byte_inside, other=0)
    odd_shift = tl.load(v_shift + even + 1, mask=byte_inside, other=0)
    even_extra = tl.load(v_extra + even, mask=byte_inside, other=0)
    odd_extra = tl.load(v_extra + even + 1, mask=byte_inside, other=0)
    acc_even += (
        middle_sum[:, None] + weight[:, None] * even_shift[None, :] + weight_first[:, None] * even_extra[None, :]
    )
    acc_odd += middle_sum[:, None] + weight[:, None] * odd_shift[None, :] + weight_first[:, None] * odd_extra[None, :]

    current = tl.where(part == 0, tl.minimum(first + TOKENS, count), 0)
    for start in range(tl.maximum(first - window + 1, 0), current, KEYS):
        other = start + n
        real = (other < current) & (begin + other < num_tokens)
        keys = (begin + other).to(tl.int64)
        k = tl.load(
            key + (keys * k_token + head * k_head)[:, None] + d[None, :],
            mask=real[:, None] & inside[None, :],
            other=0,
        )
        v = value + (keys * v_token + head * v_head)[:, None] + 2 * byte[None, :]
        both = real[:, None] & byte_inside[None, :]
        v_even = tl.load(v, mask=both, other=0)
        v_odd = tl.load(v + 1, mask=both, other=0)
        scores = tl.dot(q.to(OPERAND), tl.trans(k.to(OPERAND)), input_precision="tf32x3") * scale
        distance = index[:, None] - other[None, :]
        visible = real[None, :] & (distance >= 0) & (distance < window)
        p, m, keep = _softmax_step(tl.where(visible, scores, float("-inf")), m, ROWS)
        weight = weight * keep + tl.sum(p, 1)
        p = p.to(OPERAND)
        acc_even = tl.dot(p, v_even.to(OPERAND), acc_even * keep[:, None], input_precision="tf32x3")
        acc_odd = tl.dot(p, v_odd.to(OPERAND), acc_odd * keep[:, None], input_precision="tf32x3")

    weight = tl.where(weight > 0, weight, 1.0)
    result = tl.interleave(acc_even, acc_odd) / weight[:, None]
    out_rows = out + token * out_token + q_heads * out_head + part * out_part
    tl.store(out_rows[:, None] + d[None, :], result.to(out.dtype.element_ty), mask=valid[:, None] & inside[None, :])
    if lse is not None:
        lse_rows = lse + token * lse_token + q_heads * lse_head + part * lse_part
        tl.store(lse_rows, (m + tl.log2(weight)) * 0.6931471805599453, mask=valid)


@triton.jit(do_not_specialize=["lse_token", "lse_head", "num_tokens", "num_seqs"])
def combine(
    parts,
    parts_lse,
    out,
    lse,
    starts,
    out_token,
    out_head,
    lse_token,
    lse_head,
    num_tokens,
    num_seqs,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """A program merges the parts of one (token, head): parts [PARTS, num_tokens, HEADS, D], parts_lse without D."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    if token >= tl.load(starts + num_seqs):
        return
    row = (tl.arange(0, PARTS) * num_tokens + token) * HEADS + head
    each = tl.load(parts_lse + row)
    m = tl.max(each, 0)
    m = tl.where(m == float("-inf"), 0.0, m)
    weight = tl.exp(each - m)
    d = tl.arange(0, COLUMNS)
    x = tl.load(parts + row[:, None] * D + d[None, :], mask=(weight > 0)[:, None] & (d < D)[None, :], other=0)
    total = tl.sum(weight, 0)
    result = tl.sum(x * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    token = token.to(tl.int64)
    tl.store(out + token * out_token + head * out_head + d, result.to(out.dtype.element_ty), mask=d < D)
    if lse is not None:
        found = tl.where(total > 0, m + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))
        tl.store(lse + token * lse_token + head * lse_head, found)
