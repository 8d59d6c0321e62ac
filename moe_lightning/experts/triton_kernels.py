"""The two Triton kernels of the fused CUDA path; how they are put together is in ``fused.py``.

    rows [R, X] ── gather by pair ──▶ times the expert's weight ── bias, gate ──▶ pairs [P, Y]
    pairs [P, D] ── times router weight, summed over k in order ──▶ [R, D]

Pair ``p = r * K + k`` is the k-th choice of row r. Pairs keep their places in memory; only
``order`` is sorted by expert, so nothing is ever permuted back. Each program finds its block of
pairs, at most BLOCK_M of one expert, from ``ends`` by itself: the host knows no counts and waits
for none.

Letters, also in tile names: R rows, K choices of a row, P pairs, M pairs of a block, E experts,
D hidden, F expert width, X and Y the widths in and out of a product.

Importing this module needs ``triton``; only ``fused.py`` imports it, when it is used.
"""

from moe_lightning.extras import how_to_install

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(f"the Triton kernels need triton: {how_to_install('triton')}") from error


@triton.jit
def _find_block(
    ends_ptr: tl.tensor,
    num_experts: tl.tensor,
    num_columns: tl.tensor,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> tl.tensor:
    """This program's expert (>= num_experts: none), first and last sorted pair, block of Y."""
    e_E = tl.arange(0, E)
    end_E = tl.load(ends_ptr + e_E, mask=e_E < num_experts, other=0)
    start_E = tl.load(ends_ptr + e_E - 1, mask=(e_E > 0) & (e_E < num_experts), other=0)
    blocks_E = (end_E - start_E + BLOCK_M - 1) // BLOCK_M
    num_blocks = tl.sum(blocks_E)
    block = tl.program_id(0) // num_columns
    column = tl.program_id(0) % num_columns
    if block < num_blocks:
        # GROUP_M blocks of pairs use the same columns of the weight while they are in the cache.
        block, column = tl.swizzle2d(block, column, num_blocks, num_columns, GROUP_M)
    is_before_E = tl.cumsum(blocks_E, 0) <= block
    expert = tl.sum(is_before_E.to(tl.int32))
    block -= tl.sum(tl.where(is_before_E, blocks_E, 0))
    start = tl.sum(tl.where(e_E == expert, start_E, 0)) + block * BLOCK_M
    end = tl.sum(tl.where(e_E == expert, end_E, 0))
    return expert, start, end, column


@triton.jit
def grouped_linear(
    out_ptr: tl.tensor,  # [P, Y], [P, Y // 2] if gated; contiguous
    rows_ptr: tl.tensor,  # [P // PAIRS_A_ROW, X]
    weight_ptr: tl.tensor,  # [E, Y, X]
    bias_ptr: tl.tensor,  # [E, Y], contiguous; or None
    order_ptr: tl.tensor,  # [P], the pairs sorted by expert
    ends_ptr: tl.tensor,  # [E], where the pairs of each expert end in order
    num_experts: tl.tensor,
    rows_stride_r: tl.tensor,
    rows_stride_x: tl.tensor,
    weight_stride_e: tl.tensor,
    weight_stride_y: tl.tensor,
    weight_stride_x: tl.tensor,
    X: tl.constexpr,
    Y: tl.constexpr,
    PAIRS_A_ROW: tl.constexpr,
    GATE: tl.constexpr,  # how gate and up lie in Y: "halves", "interleaved"; "none" if not fused
    ALPHA: tl.constexpr,  # fused: (up + SHIFT) * gate * sigmoid(ALPHA * gate),
    SHIFT: tl.constexpr,
    LIMIT: tl.constexpr,  # of gate <= LIMIT and |up| <= LIMIT, if it is not None
    E: tl.constexpr,  # a power of two, at least num_experts
    BLOCK_M: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    """Multiply each pair's row by its expert's weight: one program a block of pairs and of Y."""
    expert, start, end, column = _find_block(
        ends_ptr, num_experts, tl.cdiv(Y, BLOCK_Y), E, BLOCK_M, GROUP_M
    )
    if expert >= num_experts:
        return  # the grid is made for the most blocks that there can be
    place_M = start + tl.arange(0, BLOCK_M)
    is_pair_M1 = (place_M < end)[:, None]
    # 64 bits: rows, and the weights of a layer, can hold more than 2^31 numbers.
    pair_M = tl.load(order_ptr + place_M, mask=place_M < end, other=0).to(tl.int64)
    column_Y = column * BLOCK_Y + tl.arange(0, BLOCK_Y)
    is_column_1Y = (column_Y < Y)[None, :]
    # In a tile, gate and up always stand side by side: in the registers of one thread.
    y_Y = column_Y // 2 + column_Y % 2 * (Y // 2) if GATE == "halves" else column_Y
    x_X = tl.arange(0, BLOCK_X)
    row_M = pair_M // PAIRS_A_ROW
    rows_ptrs = rows_ptr + row_M[:, None] * rows_stride_r + x_X[None, :] * rows_stride_x
    weight_ptr += expert.to(tl.int64) * weight_stride_e
    weight_ptrs = weight_ptr + x_X[:, None] * weight_stride_x + y_Y[None, :] * weight_stride_y
    out_MY = tl.zeros((BLOCK_M, BLOCK_Y), dtype=tl.float32)
    for x in range(0, X, BLOCK_X):
        is_x_X = x_X < X - x
        rows_MX = tl.load(rows_ptrs, mask=is_pair_M1 & is_x_X[None, :], other=0.0)
        weight_XY = tl.load(weight_ptrs, mask=is_x_X[:, None] & is_column_1Y, other=0.0)
        out_MY = tl.dot(rows_MX, weight_XY, out_MY, input_precision="ieee")
        rows_ptrs += BLOCK_X * rows_stride_x
        weight_ptrs += BLOCK_X * weight_stride_x
    if bias_ptr is not None:
        bias_Y = tl.load(bias_ptr + expert * Y + y_Y, mask=column_Y < Y, other=0.0)
        out_MY += bias_Y.to(tl.float32)[None, :]
    if GATE == "none":
        out_ptrs = out_ptr + pair_M[:, None] * Y + column_Y[None, :]
        tl.store(out_ptrs, out_MY, mask=is_pair_M1 & is_column_1Y)
    else:
        gate_MF, up_MF = tl.split(tl.reshape(out_MY, (BLOCK_M, BLOCK_Y // 2, 2)))
        if LIMIT is not None:
            gate_MF = tl.minimum(gate_MF, LIMIT, propagate_nan=tl.PropagateNan.ALL)
            up_MF = tl.clamp(up_MF, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        out_MF = (up_MF + SHIFT) * gate_MF * tl.sigmoid(ALPHA * gate_MF)
        f_F = column * (BLOCK_Y // 2) + tl.arange(0, BLOCK_Y // 2)
        out_ptrs = out_ptr + pair_M[:, None] * (Y // 2) + f_F[None, :]
        tl.store(out_ptrs, out_MF, mask=is_pair_M1 & (f_F < Y // 2)[None, :])


@triton.jit
def combine(
    out_ptr: tl.tensor,  # [R, D]; contiguous, as are all here
    pairs_ptr: tl.tensor,  # [P, D]; what stands for pairs elsewhere is never used
    index_ptr: tl.tensor,  # [R, K]; num_experts stands for elsewhere
    weights_ptr: tl.tensor,  # [R, K]
    num_experts: tl.tensor,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Weighted sum of each row's pairs in float32, in the order of k: one program a row."""
    first_pair = tl.program_id(0).to(tl.int64) * K
    d_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total_D = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for k in tl.static_range(K):
        pair = first_pair + k
        is_here = tl.load(index_ptr + pair) < num_experts
        weight = tl.load(weights_ptr + pair, mask=is_here, other=0.0).to(tl.float32)
        pair_D = tl.load(pairs_ptr + pair * D + d_D, mask=is_here & (d_D < D), other=0.0)
        total_D += weight * pair_D.to(tl.float32)
    tl.store(out_ptr + tl.program_id(0).to(tl.int64) * D + d_D, total_D, mask=d_D < D)
