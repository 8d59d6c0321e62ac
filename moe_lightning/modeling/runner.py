"""ModelRunner: a loaded model, and the few ways in which tasks call it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_lightning.dispatch import Interleaver, RoutingLog
from moe_lightning.modeling.lock_step import LockStep
from moe_lightning.modeling.seam import PaddingMask


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """Token ids of several rows, padded to one length.

    Attributes:
        input_ids_BS: Token ids, on the model's device.
        mask_BS: 1 for real tokens, on the model's device; None if no token is padding.
        host_mask_BS: The same on the host.
        position_ids_BS: Position of every token within its row.
    """

    input_ids_BS: Tensor
    mask_BS: Tensor | None
    host_mask_BS: Tensor | None
    position_ids_BS: Tensor

    def rows(self, start: int, end: int) -> "PaddedBatch":
        """Some of the rows, padded as they are."""
        mask_BS, host_mask_BS = self.mask_BS, self.host_mask_BS
        return PaddedBatch(
            self.input_ids_BS[start:end],
            None if mask_BS is None else mask_BS[start:end],
            None if host_mask_BS is None else host_mask_BS[start:end],
            self.position_ids_BS[start:end],
        )


class ModelRunner:
    """A loaded model with its tokenizer, as tasks see it.

    Args:
        model: The causal language model, its experts attached to dispatchers.
        tokenizer: Its tokenizer.
        padding: The model's padding mask, from ``seam.attach``.
        log: Where its dispatchers record their work; probes are kept out of it.
        interleaver: Lets parts of a batch take turns; None computes batches whole.
        lock_step: Keeps the forwards of several ranks in step; None if this rank needs no other.
        calls_whole_model: Whether forwards must go through the model itself and never through its
            parts, because FSDP gathers parameters from there.
        is_alone: Whether no other rank takes part in this one's forwards.
        device: Where inputs go. None is where the model's head is.

    Attributes:
        is_alone: As above; a forward that fails may be tried again then.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        padding: PaddingMask,
        log: RoutingLog,
        interleaver: Interleaver | None = None,
        *,
        lock_step: LockStep | None = None,
        calls_whole_model: bool = False,
        is_alone: bool = True,
        device: torch.device | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.padding = padding
        self._log = log
        self._interleaver = interleaver
        self._lock_step = lock_step
        self._calls_whole_model = calls_whole_model
        self.is_alone = is_alone
        self._device = device
        self._has_plain_head: bool | None = None
        self._takes_left_padding: bool | None = None

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        if self._device is not None:
            return self._device
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight.device

    @property
    def _vocab_size(self) -> int:
        size: int = self.model.config.get_text_config(decoder=True).vocab_size
        return size

    def pad(self, rows: Sequence[Sequence[int]], *, side: str) -> PaddedBatch:
        """Pad rows to the longest one.

        Args:
            rows: Token ids of each row; none is empty.
            side: Where the padding goes, ``left`` or ``right``.

        Returns:
            The batch on the model's device.
        """
        width = max(map(len, rows))
        ids_BS = torch.zeros(len(rows), width, dtype=torch.int64)
        mask_BS = torch.zeros(len(rows), width, dtype=torch.int64)
        for row, ids in enumerate(rows):
            where = slice(width - len(ids), width) if side == "left" else slice(0, len(ids))
            ids_BS[row, where] = torch.tensor(ids)
            mask_BS[row, where] = 1
        positions_BS = (mask_BS.cumsum(1) - 1).clamp_(min=0)
        is_padded = any(len(ids) < width for ids in rows)
        return PaddedBatch(
            ids_BS.to(self.device, non_blocking=True),
            mask_BS.to(self.device, non_blocking=True) if is_padded else None,
            mask_BS if is_padded else None,
            positions_BS.to(self.device, non_blocking=True),
        )

    def last_hidden_state(self, batch: PaddedBatch) -> Tensor:
        """The output of the last layer after the final norm, ``[B, S, D]``."""
        return self._in_turns(batch, self._last_hidden_state)

    def logits(self, batch: PaddedBatch) -> Tensor:
        """Logits of every position, ``[B, S, V]``."""
        return self._in_turns(batch, lambda part: self._forward(self.model, part).logits)

    def head(self, hidden_ND: Tensor) -> Tensor:
        """Logits of last hidden states, ``[N, V]``, right after :meth:`last_hidden_state`; only
        where :meth:`has_plain_head`."""
        head: Any = self.model.get_output_embeddings()
        if self._calls_whole_model:
            # FSDP has left the weight gathered; its hooks expect no call from outside the model.
            return linear(hidden_ND, head.weight, head.bias)
        logits_NV: Tensor = head(hidden_ND)
        return logits_NV

    def forward(self, **inputs: Any) -> Any:
        """The model's own forward, in step with other ranks if there are any."""
        return self._step(self.model, inputs)

    def idle(self) -> None:
        """Once this rank has no more rows: keep other ranks company until they have none."""
        if self._lock_step is not None:
            with self._log.paused():
                self._lock_step.idle_until_all_are_done(self._idle_forward)

    def _step(self, model: Any, inputs: dict[str, Any]) -> Any:
        if self._lock_step is not None:
            self._lock_step.begin_forward()
        return model(**inputs)

    def _idle_forward(self) -> None:
        token = torch.zeros(1, 1, dtype=torch.int64)
        with self.padding.over(token):  # so it goes to no expert
            self.model(input_ids=token.to(self.device), use_cache=False, logits_to_keep=1)

    def _last_hidden_state(self, batch: PaddedBatch) -> Tensor:
        if not self._calls_whole_model:
            hidden_BSD: Tensor = self._forward(self.model.base_model, batch).last_hidden_state
            return hidden_BSD
        return self._hidden_and_logits(batch, logits_to_keep=1)[0]

    def _hidden_and_logits(self, batch: PaddedBatch, **options: Any) -> tuple[Tensor, Tensor]:
        """Last hidden states and logits of one forward through the model itself."""
        seen: list[Tensor] = []
        hook = self.model.base_model.register_forward_hook(
            lambda module, args, output: seen.append(output.last_hidden_state)
        )
        try:
            logits_BSV: Tensor = self._forward(self.model, batch, **options).logits
        finally:
            hook.remove()
        return seen[0], logits_BSV

    def _in_turns(self, batch: PaddedBatch, compute: Callable[[PaddedBatch], Tensor]) -> Tensor:
        num_rows, width = batch.input_ids_BS.shape
        turns = self._interleaver
        if turns is None or num_rows < 2 or num_rows * width < turns.min_tokens:
            return compute(batch)
        num_parts = min(turns.num_parts, num_rows)
        ends = [num_rows * n // num_parts for n in range(num_parts + 1)]
        parts = [batch.rows(start, end) for start, end in pairwise(ends)]
        return torch.cat(turns.run([partial(compute, part) for part in parts]))

    def _forward(self, model: Any, batch: PaddedBatch, **options: Any) -> Any:
        inputs = {
            "input_ids": batch.input_ids_BS,
            "attention_mask": batch.mask_BS,
            "position_ids": batch.position_ids_BS,
            "use_cache": False,
            **options,
        }
        with self.padding.over(batch.host_mask_BS):
            return self._step(model, inputs)

    def has_plain_head(self) -> bool:
        """Whether logits are just the output embedding of the last hidden state, found by trying it
        once.

        Most families; some scale or cap their logits. With a plain head, logits need not be made
        for all positions at once, nor for padding.
        """
        if self._has_plain_head is None:
            probe = self.pad([[token % self._vocab_size for token in range(1, 9)]], side="right")
            with self._log.paused():
                # Of one forward: rows of other ranks may change another one in the last bits.
                hidden_BSD, logits_BSV = self._hidden_and_logits(probe)
                self._has_plain_head = self._may_call_head() and torch.equal(
                    self.head(hidden_BSD), logits_BSV
                )
        return self._has_plain_head

    def _may_call_head(self) -> bool:
        """Whether the head's weight is whole after a forward, if FSDP has it; with tensor
        parallelism it is not."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return not (self._calls_whole_model and isinstance(weight, DTensor))

    def takes_left_padding(self) -> bool:
        """Whether a left-padded row decodes as it does alone, found by trying it once.

        Attention does. Some recurrent layers let padding into their state.
        """
        if self._takes_left_padding is None:
            long, short = ([token % self._vocab_size for token in range(1, n)] for n in (12, 5))
            with self._log.paused():
                padded, alone = self._two_steps([long, short]), self._two_steps([short])
            tolerance = 1e-4 if alone.dtype == torch.float32 else 2e-2
            difference = (padded[-1] - alone[-1]).abs().max() / alone.abs().max()
            self._takes_left_padding = float(difference) < tolerance
        return self._takes_left_padding

    def _two_steps(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Logits ``[B, 2, V]`` of a prefill's last position and of the decode step after it."""
        batch = self.pad(rows, side="left")
        steps = {"attention_mask": batch.mask_BS, "position_ids": batch.position_ids_BS}
        first = self.forward(input_ids=batch.input_ids_BS, use_cache=True, **steps)
        if batch.mask_BS is not None:
            steps["attention_mask"] = torch.nn.functional.pad(batch.mask_BS, (0, 1), value=1)
        steps["position_ids"] = batch.position_ids_BS[:, -1:] + 1
        second = self.forward(
            input_ids=batch.input_ids_BS[:, -1:],
            past_key_values=first.past_key_values,
            use_cache=True,
            **steps,
        )
        return torch.stack((first.logits[:, -1], second.logits[:, -1]), dim=1)
