"""Where the time of one run of predict goes, and what its forwards were."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from bench_experts_machine import Rates
from bench_predict_limits import Forward, Limits

from moe_lightning import MoELightningModule
from moe_lightning.dispatch import LayerTrace
from moe_lightning.modeling.seam import find_moe_layers
from moe_lightning.tasks import decoding, score


@dataclass(frozen=True)
class Profile:
    """Where the time of one run went.

    Attributes:
        seconds: Time per part.
        experts_s: Time within the experts, of some parts.
        limit_s: The least time that the arithmetic of a part takes.
        num_decode_steps: Decode steps.
        mean_decode_rows: Rows of a decode step.
        mean_hit_experts: Distinct experts that the rows of a step go to, per layer.
    """

    seconds: dict[str, float]
    experts_s: dict[str, float]
    limit_s: dict[str, float]
    num_decode_steps: int
    mean_decode_rows: float
    mean_hit_experts: float


class Profiler:
    """Light wrappers around a model's calls, in place during a `with` block.

    Args:
        module: The module, loaded.

    Attributes:
        seconds: Time per part.
        forwards: The forwards of the model.
    """

    def __init__(self, module: MoELightningModule) -> None:
        assert module.model is not None
        self.module, self.model = module, module.model
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.experts_s: defaultdict[str, float] = defaultdict(float)
        self.forwards: list[Forward] = []
        self._traces: list[tuple[Forward, torch.Tensor]] = []
        self._starts: list[float] = []

    def __enter__(self) -> "Profiler":
        model, base = self.model, self.model.base_model
        hooks = [
            base.register_forward_pre_hook(self._before_base, with_kwargs=True),
            base.register_forward_hook(self._after_base),
            *self._around(model.get_output_embeddings(), self._after_head),
        ]
        for layer in find_moe_layers(model):
            hooks += self._around(layer.experts, self._after_experts)
        self.module.routing_log.subscribe(self._read)
        self._exit = contextlib.ExitStack()
        for hook in hooks:
            self._exit.callback(hook.remove)
        self._exit.callback(self.module.routing_log.unsubscribe, self._read)
        for owner, name, part in (
            (decoding, "choose_tokens", "choosing tokens"),
            (decoding, "penalise_repetition", "choosing tokens"),
            (score, "_logprob", "log-softmax"),
        ):
            wrapped = self._timed(getattr(owner, name), part)
            self._exit.enter_context(mock.patch.object(owner, name, wrapped))
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()
        for forward, index_TK in self._traces:
            forward.hit_experts.append(index_TK.unique().numel())

    def _around(self, module: torch.nn.Module, after: Callable[..., None]) -> list[Any]:
        return [
            module.register_forward_pre_hook(lambda *_: self._starts.append(time.perf_counter())),
            module.register_forward_hook(after),
        ]

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            start_s = time.perf_counter()
            result = function(*args)
            self.seconds[part] += time.perf_counter() - start_s
            return result

        return timed

    def _stop(self) -> float:
        return time.perf_counter() - self._starts.pop()

    def _before_base(self, _: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        ids_BS, mask_BS = kwargs["input_ids"], kwargs.get("attention_mask")
        num_real = ids_BS.numel() if mask_BS is None else int(mask_BS.sum())
        is_prefill = ids_BS.shape[1] > 1
        forward = Forward(
            num_tokens=num_real if is_prefill else ids_BS.shape[0],
            num_head_rows=0,
            kv_tokens=0 if is_prefill else int(kwargs["position_ids"].sum()),
            is_prefill=is_prefill,
        )
        self.forwards.append(forward)
        self._starts.append(time.perf_counter())

    def _after_base(self, *_: Any) -> None:
        self.seconds[self.forwards[-1].part] += self._stop()

    def _after_head(self, _: Any, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        self.seconds["output head"] += self._stop()
        self.forwards[-1].num_head_rows += out.numel() // out.shape[-1]

    def _after_experts(self, *_: Any) -> None:
        self.experts_s[self.forwards[-1].part] += self._stop()

    def _read(self, trace: LayerTrace) -> None:
        self._traces.append((self.forwards[-1], trace.index_TK))

    def profile(self, total_s: float, limits: Limits, rates: Rates) -> Profile:
        """Sum up; whatever was in no part is bookkeeping: planning, loops, files."""
        limit_s: defaultdict[str, float] = defaultdict(float)
        for forward in self.forwards:
            limit_s[forward.part] += limits.least_s(forward, rates)
        steps = [forward for forward in self.forwards if not forward.is_prefill]
        hit = [number for forward in steps or self.forwards for number in forward.hit_experts]
        bookkeeping_s = total_s - sum(self.seconds.values())
        return Profile(
            seconds={**self.seconds, "bookkeeping": bookkeeping_s},
            experts_s=dict(self.experts_s),
            limit_s=dict(limit_s),
            num_decode_steps=len(steps),
            mean_decode_rows=_mean([forward.num_tokens for forward in steps]),
            mean_hit_experts=_mean(hit),
        )


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else 0.0
