"""Products are cut up so that they fit and keep a GPU busy; the kernels compile for real GPUs."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import torch

from moe_lightning.experts.tiles import Tiles, choose_tiles, max_programs

# The up product of a layer of Qwen3-30B-A3B, which has 8 experts a token.
QWEN3 = {"num_experts": 128, "in_width": 2048, "out_width": 2 * 768}


def test_tiles_follow_the_number_of_pairs():
    tiles = [choose_tiles(8 * t, **QWEN3, dtype=torch.bfloat16) for t in (1, 128, 512, 8192)]
    assert [t.BLOCK_M for t in tiles] == [16, 16, 64, 128]
    assert [t.BLOCK_Y for t in tiles] == [32, 64, 128, 256]
    # 8 blocks of pairs for 8 experts: 384 programs, more than any GPU has multiprocessors.
    assert max_programs(8, 128, 1536, tiles[0]) == 8 * 48


def test_tiles_fit_into_what_a_program_may_have():
    for num_pairs in (1, 100, 1500, 3000, 10_000, 10**6):
        for dtype in (torch.float32, torch.bfloat16):
            for limit_bytes in (48 * 1024, 99 * 1024, 163 * 1024, 227 * 1024):
                tiles = choose_tiles(
                    num_pairs, **QWEN3, dtype=dtype, shared_limit_bytes=limit_bytes
                )
                assert tiles.shared_bytes(dtype) <= limit_bytes
                assert tiles.num_stages >= 2
                assert tiles.BLOCK_X >= 16


def test_programs_are_enough_for_any_division_of_the_pairs():
    tiles = Tiles(16, 32, 32, 1, 4, 2)
    generator = torch.Generator().manual_seed(0)
    for num_pairs in (1, 5, 16, 17, 64, 200):
        for num_experts in (1, 2, 7, 100):
            limit = max_programs(num_pairs, num_experts, 33, tiles) // 2  # two blocks of columns
            for skew in (0.1, 1.0, 10.0):
                share_E = torch.rand(num_experts, generator=generator) ** skew + 1e-6
                picks = share_E.multinomial(num_pairs, replacement=True, generator=generator)
                counts = picks.bincount(minlength=num_experts)
                assert (-(-counts // 16)).sum() <= limit
            assert limit <= num_pairs  # never a block without a pair in the worst case


# Shared memory that one program may have, by compute capability.
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
SWIGLU = ("halves", 1.0, 0.0, None)
# (dtype, which step through a weight is 1, gate, numbers of pairs that get different tiles)
LINEARS = [
    (torch.bfloat16, "weight_stride_x", SWIGLU, [8, 1024, 2048, 4096, 8192, 65536]),
    (torch.float16, "weight_stride_y", ("interleaved", 1.702, 1.0, 7.0), [65536]),
    (torch.float32, "weight_stride_y", ("none", *SWIGLU[1:]), [8, 65536]),
]


def shared_bytes(kernel, capability, types, constants, **options):
    """Compile a kernel for a GPU that need not be there: the shared memory that it takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    places = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    # As for real tensors: pointers and steps are multiples of 16.
    sixteens = [name for name in types if "stride" in name or types[name].startswith("*")]
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in places},
        {places[name]: value for name, value in constants.items()},
        {places[name]: [["tt.divisibility", 16]] for name in sixteens},
    )
    compiled = triton.compile(source, GPUTarget("cuda", capability, 32), options)
    assert compiled.asm["cubin"]
    return compiled.metadata.shared


def compile_all(cache_dir):
    """(capability, shared memory taken, promised) of each kernel with each of its tiles."""
    os.environ["TRITON_CACHE_DIR"] = cache_dir
    from moe_lightning.experts.triton_kernels import combine, grouped_linear

    found = []
    for capability, limit_bytes in SHARED_BYTES.items():
        for dtype, unit_step, gate, all_pairs in LINEARS:
            for num_pairs in all_pairs:
                tiles = choose_tiles(
                    num_pairs, **QWEN3, dtype=dtype, shared_limit_bytes=limit_bytes
                )
                matrices = ("out_ptr", "rows_ptr", "weight_ptr", "bias_ptr")
                types = dict.fromkeys(matrices, POINTERS[dtype])
                types |= {"order_ptr": "*i64", "ends_ptr": "*i32", "num_experts": "i32"}
                steps = {"rows_stride_r", "weight_stride_e", "weight_stride_y", "weight_stride_x"}
                types |= dict.fromkeys(steps - {unit_step}, "i32")
                constants = dict(zip(("GATE", "ALPHA", "SHIFT", "LIMIT"), gate, strict=True))
                constants |= {"X": 2048, "Y": 1536, "E": 128, "PAIRS_A_ROW": 8}
                constants |= {"rows_stride_x": 1, unit_step: 1, **tiles._asdict()}
                options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
                used = shared_bytes(grouped_linear, capability, types, constants, **options)
                found.append((capability, used, tiles.shared_bytes(dtype)))
        types = {"out_ptr": "*bf16", "pairs_ptr": "*bf16", "index_ptr": "*i64"}
        types |= {"weights_ptr": "*fp32", "num_experts": "i32"}
        constants = {"D": 2048, "K": 8, "BLOCK_D": 1024}
        found.append((capability, shared_bytes(combine, capability, types, constants), 0))
    return found


def test_the_kernels_compile_for_gpus_and_fit(tmp_path):
    """In another process: one either compiles or, as the tests of FusedExperts do, interprets."""
    with (
        mock.patch.dict(os.environ, {"TRITON_INTERPRET": "0"}),
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        found = pool.submit(compile_all, str(tmp_path)).result()
    assert len(found) == 2 * (6 + 1 + 2 + 1)
    for capability, used, promised in found:
        assert used <= promised <= SHARED_BYTES[capability]
