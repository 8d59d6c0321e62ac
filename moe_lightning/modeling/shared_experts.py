"""Shared experts, computed while the rows of the routed ones are away.

A family's block computes its shared experts before or after the routed ones. Those that come after
need nothing but the block's input, so they can be computed in between:

    block(x):  router ─▶ experts: rows sent ─▶ shared experts of x ─▶ rows back ─▶ + shared experts

The block's code stays as it is: when it asks for the shared experts of ``x``, the answer is there.
Families that compute them before (Qwen2-MoE) are left alone.
"""

import threading
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn


class _Pass(threading.local):
    """Where the current pass of the block is; each thread has one of its own."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Nothing has happened yet."""
        self.rows_are_away = False
        self.input_TD: Tensor | None = None
        self.output_TD: Tensor | None = None

    def take(self) -> tuple[Tensor | None, Tensor | None]:
        """What was computed ahead, once."""
        there = self.input_TD, self.output_TD
        self.input_TD = self.output_TD = None
        return there


class SharedExperts:
    """Stands before a block's shared experts.

    Args:
        block: The MoE block.
        shared: Its shared experts, whose forward is replaced on the instance.
    """

    def __init__(self, block: nn.Module, shared: nn.Module) -> None:
        self._compute: Callable[[Tensor], Tensor] = shared.forward
        self._comes_after = False  # found out in the block's first pass without gradients
        self._pass = _Pass()
        shared.forward = self._answer
        block.register_forward_pre_hook(self._begin)

    def ahead(self, hidden_TD: Tensor) -> Callable[[], None] | None:
        """What may be done while the rows are away; None if the block has done it already.

        Args:
            hidden_TD: The rows that the block gives to its experts.
        """
        self._pass.rows_are_away = True
        return partial(self._compute_ahead, hidden_TD) if self._comes_after else None

    def _begin(self, *_: object) -> None:
        self._pass.begin()

    def _compute_ahead(self, hidden_TD: Tensor) -> None:
        self._pass.input_TD, self._pass.output_TD = hidden_TD, self._compute(hidden_TD)

    def _answer(self, hidden: Tensor) -> Tensor:
        # Activation checkpointing needs a pass and its repetition in backward to do the same, so
        # that this is not found out in between.
        if not torch.is_grad_enabled():
            self._comes_after = self._pass.rows_are_away
        there, output_TD = self._pass.take()
        is_same = (
            there is not None
            and there.data_ptr() == hidden.data_ptr()
            and there.numel() == hidden.numel()
        )
        if output_TD is None or not is_same:
            return self._compute(hidden)
        return output_TD.view(*hidden.shape[:-1], output_TD.shape[-1])


def find_shared_experts(block: nn.Module) -> nn.Module | None:
    """The shared experts of a MoE block, by their name; None if it has none."""
    for name, child in block.named_children():
        if name in ("shared_expert", "shared_experts", "shared_mlp"):
            return child
    return None
