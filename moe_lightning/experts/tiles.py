"""How a grouped product is cut up for a GPU, from shapes alone: nothing waits for the GPU.

columns ──▶      BLOCK_Y
pairs of  ┌──────────┬──────────┐
expert 0  │ program  │ program  │ BLOCK_M
          ├──────────┼──────────┤          each sums its tile over the rows' width,
expert 1  │ program  │ program  │          BLOCK_X at a time
          └──────────┴──────────┘
"""

from typing import NamedTuple

import torch

MIN_PROGRAMS = 256  # about two for each multiprocessor of the large GPUs
SMALLEST_SHARED_BYTES = 99 * 1024  # a program's most, on the least of the GPUs since 8.0
BARRIER_BYTES = 1024


class Tiles(NamedTuple):
    """How a product is cut up; the names are those of the kernel and of Triton's launcher.

    Attributes:
        BLOCK_M: Pairs of a program.
        BLOCK_Y: Output columns of a program, gate and up together.
        BLOCK_X: Width summed at a time.
        GROUP_M: Blocks of pairs that run next to each other for the same columns.
        num_warps: Warps of a program.
        num_stages: Tiles of both inputs that are in shared memory or on their way to it.
    """

    BLOCK_M: int
    BLOCK_Y: int
    BLOCK_X: int
    GROUP_M: int
    num_warps: int
    num_stages: int

    def shared_bytes(self, dtype: torch.dtype) -> int:
        """Shared memory of a program: what Triton takes is at most this.

        Args:
            dtype: Of rows and weights.

        Returns:
            Bytes of the tiles in flight, and some for barriers.
        """
        numbers = (self.BLOCK_M + self.BLOCK_Y) * self.BLOCK_X * self.num_stages
        return numbers * dtype.itemsize + BARRIER_BYTES


# (pairs an expert up to which they are used, tiles). Boundaries and sizes follow what the tables
# that vLLM measured on A100, H100 and H200 (fused_moe/configs, bfloat16) have in common.
_HALF_TILES = (
    (8, Tiles(16, 64, 128, GROUP_M=1, num_warps=4, num_stages=3)),
    (16, Tiles(32, 128, 128, GROUP_M=1, num_warps=4, num_stages=3)),
    (48, Tiles(64, 128, 64, GROUP_M=1, num_warps=4, num_stages=4)),
    (96, Tiles(128, 128, 64, GROUP_M=8, num_warps=8, num_stages=4)),
    (None, Tiles(128, 256, 64, GROUP_M=8, num_warps=8, num_stages=4)),
)
# float32 is multiplied exactly, without tensor cores: the registers for the sums limit the tile.
_FLOAT_TILES = (
    (16, Tiles(16, 64, 32, GROUP_M=1, num_warps=4, num_stages=3)),
    (None, Tiles(64, 64, 32, GROUP_M=8, num_warps=8, num_stages=3)),
)


def choose_tiles(
    num_pairs: int,
    *,
    num_experts: int,
    in_width: int,
    out_width: int,
    dtype: torch.dtype,
    shared_limit_bytes: int = SMALLEST_SHARED_BYTES,
) -> Tiles:
    """How to cut up one product, from shapes alone.

    Args:
        num_pairs: Pairs of the call, those elsewhere included: the host knows no better.
        num_experts: Experts of the shard.
        in_width: Width of the rows.
        out_width: Width of the output, gate and up together.
        dtype: Of the weights.
        shared_limit_bytes: Shared memory that one program may have.

    Returns:
        Tiles that fit, narrow enough for few pairs to keep the whole GPU busy.
    """
    table = _FLOAT_TILES if dtype == torch.float32 else _HALF_TILES
    tiles = next(t for most, t in table if most is None or num_pairs <= most * num_experts)
    tiles = tiles._replace(
        BLOCK_X=min(tiles.BLOCK_X, power_of_two(in_width, least=16)),
        BLOCK_Y=min(tiles.BLOCK_Y, power_of_two(out_width, least=32)),
    )
    num_blocks = max(min(num_pairs, num_experts), num_pairs // tiles.BLOCK_M)
    while tiles.BLOCK_Y > 32 and num_blocks * -(-out_width // tiles.BLOCK_Y) < MIN_PROGRAMS:
        tiles = tiles._replace(BLOCK_Y=tiles.BLOCK_Y // 2)
    while tiles.shared_bytes(dtype) > shared_limit_bytes:
        if tiles.num_stages > 2:
            tiles = tiles._replace(num_stages=tiles.num_stages - 1)
        else:
            tiles = tiles._replace(BLOCK_X=tiles.BLOCK_X // 2)
    return tiles


def max_programs(num_pairs: int, num_experts: int, out_width: int, tiles: Tiles) -> int:
    """Programs enough for any division of the pairs among the experts.

    An expert with n pairs has ceil(n / M) blocks, at most (n + M - 1) / M, and at most
    ``min(num_pairs, num_experts)`` experts have any.
    """
    surplus = min(num_pairs, num_experts) * (tiles.BLOCK_M - 1)
    return (num_pairs + surplus) // tiles.BLOCK_M * -(-out_width // tiles.BLOCK_Y)


def power_of_two(number: int, *, least: int) -> int:
    """The smallest power of two that is at least the number; never below ``least``, itself one."""
    return max(least, 1 << (number - 1).bit_length())
