"""Pipeline parallelism: the decoder layers of a model over ranks, a stage each; for inference.

    stage 0: embedding, layers 0..k ──hidden──▶ stage 1: layers k+1.. ──▶ ... ──▶ last: norm
                                                                                   │
    every stage: output embedding, logits ◀──────────── last hidden states ────────┘

All stages run the same batches. Only hidden states travel: the logits of a step are made on every
stage from the last hidden states, so tasks see an ordinary model. transformers' own
``apply_pipeline_parallelism`` (5.23) sends logits instead, V / D times as much.

Large batches without a cache go through the stages in parts, so that stages compute at once.
"""

from functools import wraps
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from moe_lightning.modeling.seam import padding_within

MIN_PART_TOKENS = 128
"""Parts of a batch have so many tokens at least; below, a part costs more than it overlaps."""


class AbsentLayer(nn.Module):
    """Stands where a layer of another stage would be.

    Attributes:
        output_BSD: What comes out; None lets what comes in through.
    """

    def __init__(self) -> None:
        super().__init__()
        self.output_BSD: Tensor | None = None

    def forward(self, hidden_BSD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Pass the hidden states on."""
        return hidden_BSD if self.output_BSD is None else self.output_BSD


def stage_layers(num_layers: int, num_stages: int, stage: int) -> range:
    """The layers of a stage; sizes differ by one at most, and the last stages have fewer.

    The first stage also embeds and the last also normalises, which costs less than a layer.
    """
    per_stage, rest = divmod(num_layers, num_stages)
    start = stage * per_stage + min(stage, rest)
    return range(start, start + per_stage + (stage < rest))


def split_into_stages(model: PreTrainedModel, group: dist.ProcessGroup) -> None:
    """Keep one stage of a model on meta, and route its forward through all stages.

    Args:
        model: The model; changed in place.
        group: The ranks of the stages, in order.
    """
    base: Any = model.base_model
    stage, num_stages = group.rank(), group.size()
    kept = stage_layers(len(base.layers), num_stages, stage)
    for index in range(len(base.layers)):
        if index not in kept:
            base.layers[index] = AbsentLayer()
    if stage > 0 and not model.config.tie_word_embeddings:
        base.embed_tokens = AbsentLayer()
    if stage < num_stages - 1:
        base.norm = nn.Identity()
    before = base.layers[kept.start - 1] if stage > 0 else None
    base.forward = _Stage(base, group, before).wrap(base, base.forward)


class _Stage:
    """One stage's part of every forward of the base model."""

    def __init__(self, base: Any, group: dist.ProcessGroup, before: AbsentLayer | None) -> None:
        self.group = group
        # Where received rows come in: what a family does to embeddings is not for them.
        self.before = before
        self.is_last = group.rank() == group.size() - 1
        self.hidden_size: int = base.config.get_text_config().hidden_size
        self.dtype: torch.dtype = base.dtype

    def wrap(self, base: nn.Module, forward: Any) -> Any:
        """The base model's forward over all stages."""

        @wraps(forward)
        def staged(input_ids: Tensor, **inputs: Any) -> MoeModelOutputWithPast:
            inputs.pop("inputs_embeds", None)  # the causal language model passes None
            num_rows, width = input_ids.shape
            device = input_ids.device
            hidden_BSD = torch.empty(
                num_rows, width, self.hidden_size, dtype=self.dtype, device=device
            )
            cache = inputs.get("past_key_values")
            sends: list[dist.Work] = []
            for start, end in pairwise(self._bounds(num_rows, width, inputs)):
                part = {name: _rows(value, start, end, num_rows) for name, value in inputs.items()}
                with padding_within(base, start * width, end * width):
                    if self.before is None:
                        output = forward(input_ids=input_ids[start:end], **part)
                    else:
                        received = self._receive(hidden_BSD[start:end])
                        self.before.output_BSD = received
                        output = forward(inputs_embeds=received, **part)
                        self.before.output_BSD = None
                cache = output.past_key_values
                hidden_BSD[start:end] = output.last_hidden_state
                if not self.is_last:
                    sends += self._send(hidden_BSD[start:end])
            for send in sends:
                send.wait()
            last = dist.get_global_rank(self.group, self.group.size() - 1)
            dist.broadcast(hidden_BSD, src=last, group=self.group)
            return MoeModelOutputWithPast(last_hidden_state=hidden_BSD, past_key_values=cache)

        return staged

    def _bounds(self, num_rows: int, width: int, inputs: dict[str, Any]) -> list[int]:
        """Where the batch is cut; the same on every stage."""
        num_parts = 1
        if not inputs.get("use_cache") and inputs.get("past_key_values") is None:
            num_parts = min(2 * self.group.size(), num_rows, num_rows * width // MIN_PART_TOKENS)
        num_parts = max(1, num_parts)
        return [num_rows * n // num_parts for n in range(num_parts + 1)]

    def _receive(self, like: Tensor) -> Tensor:
        received = torch.empty_like(like, memory_format=torch.contiguous_format)
        source = dist.get_global_rank(self.group, self.group.rank() - 1)
        for work in dist.batch_isend_irecv(
            [dist.P2POp(dist.irecv, received, source, group=self.group)]
        ):
            work.wait()
        return received

    def _send(self, hidden_BSD: Tensor) -> list[dist.Work]:
        target = dist.get_global_rank(self.group, self.group.rank() + 1)
        operation = dist.P2POp(dist.isend, hidden_BSD.contiguous(), target, group=self.group)
        works: list[dist.Work] = dist.batch_isend_irecv([operation])
        return works


def _rows(value: Any, start: int, end: int, num_rows: int) -> Any:
    """Rows of an input that has one for each of the batch; others as they are."""
    is_batched = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == num_rows
    return value[start:end] if is_batched else value
