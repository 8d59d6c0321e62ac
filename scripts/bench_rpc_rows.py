"""The rows of bench_rpc.py --layer, the same in every process that asks about them."""

from collections.abc import Mapping
from typing import Any

import torch


class Rows:
    """The rows of the layer, the same in every process.

    Args:
        options: Sizes and the seed.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        generator = torch.Generator().manual_seed(options["seed"])
        shape = (options["tokens"], options["num_experts"])
        self.hidden_TD = torch.randn(shape[0], options["width"], generator=generator)
        self.index_TK = torch.rand(shape, generator=generator).topk(options["top_k"]).indices
        self.weights_TK = torch.rand(self.index_TK.shape, generator=generator).softmax(1)
        num_workers = len(options["addresses"])
        self.slot_of = [e * num_workers // shape[1] for e in range(shape[1])]
