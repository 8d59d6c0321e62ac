"""How much memory packed experts take, in a process of its own; prints one JSON line.

python measure_packing.py BACKEND DTYPE
"""

import gc
import json
import sys

import psutil
import torch
from torch import nn

from moe_lightning.experts import ExpertShard

E, D, F = 16, 1024, 1536  # 75 million weights; FBGEMM pads widths to multiples of 512


class Experts(nn.Module):
    """What a backend needs of a family's experts; decorating one would import transformers."""

    has_gate, has_bias, is_transposed, has_post_expert_norm = True, False, False, False

    def __init__(self, num_experts, hidden, width, dtype):
        super().__init__()
        self.num_experts = num_experts
        shapes = {"gate_up_proj": (2 * width, hidden), "down_proj": (hidden, width)}
        for name, shape in shapes.items():
            weight_EYX = torch.full((num_experts, *shape), 0.5, dtype=dtype)
            setattr(self, name, nn.Parameter(weight_EYX))

    def _apply_gate(self, gate_up_NF):
        gate_NF, up_NF = gate_up_NF.chunk(2, dim=-1)
        return nn.functional.silu(gate_NF) * up_NF


def resident_bytes():
    gc.collect()
    return psutil.Process().memory_info().rss


def measure(backend, dtype):
    def shard_of(experts):
        ids = range(experts.num_experts)
        return ExpertShard(experts, layer=0, expert_ids=ids, backend=backend)

    small = shard_of(Experts(1, 64, 64, dtype))  # whatever is set up once
    small.pack()
    rows = torch.ones(4, 64, dtype=dtype), torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1)
    with torch.inference_mode():
        small.compute(*rows)
    before = resident_bytes()
    experts = Experts(E, D, F, dtype)
    shard = shard_of(experts)
    grown = {"loaded": resident_bytes() - before}
    shard.pack()
    grown["packed"] = resident_bytes() - before
    shard.make_room()
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.fill_(0.5)
    grown["loaded again"] = resident_bytes() - before
    shard.pack()
    grown["packed again"] = resident_bytes() - before
    shard.make_room()
    del experts, shard, parameter
    grown["gone"] = resident_bytes() - before
    return grown


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], getattr(torch, sys.argv[2]))))
