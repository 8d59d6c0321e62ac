"""Reference: unmodified transformers in one process, computed two ways.

    end to end   its own everything, from the token ids
    alone        every part gets what the *configured* part got, so that a part that is wrong is
                 wrong alone, and the parts after it are not

The second is what names places: captured hidden states go into each layer, captured inputs into
each router, captured rows with captured experts and weights into the experts.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from moe_lightning.devices import free_bytes
from moe_lightning.errors import UsageError
from moe_lightning.modeling.checkpoint import CheckpointView
from moe_lightning.modeling.loading import build_on_meta
from moe_lightning.modeling.quiet import quiet_transformers
from moe_lightning.modeling.seam import MoELayer, find_moe_layers
from moe_lightning.verification.capture import first_input

GB = 1e9


class Watcher(Protocol):
    """Who sees the parts of a forward, and may replace what goes on."""

    def embeddings(self, hidden_SD: Tensor) -> Tensor | None:
        """What goes into the first layer; returns what goes in instead."""

    def layer(self, layer: int, hidden_SD: Tensor) -> Tensor | None:
        """What a layer gives; returns what goes on instead."""

    def router_input(self, layer: int, hidden_SD: Tensor) -> Tensor | None:
        """What a router gets; returns what it gets instead."""

    def routing(
        self, layer: int, hidden_SD: Tensor, index_SK: Tensor, weights_SK: Tensor
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """What experts get; returns what they get instead."""

    def experts(self, layer: int, out_SD: Tensor) -> Tensor | None:
        """What experts give; returns what goes on instead."""


class Reference:
    """A checkpoint in unmodified transformers.

    Args:
        path: Directory of the checkpoint.
        weights_dtype: Precision that the weights are rounded to, the configured one, so that
            rounding them is no difference.
        dtype: Precision that it computes in.
        device: Where it computes.
    """

    def __init__(
        self,
        path: Path,
        *,
        weights_dtype: torch.dtype,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=weights_dtype, experts_implementation="eager"
            )
        self.model: Any = model.to(device=device, dtype=dtype).eval()
        self.device = device
        self.dtype = dtype
        self.layers: dict[int, MoELayer] = {
            layer.layer: layer for layer in find_moe_layers(self.model)
        }

    @torch.inference_mode()
    def logits(self, token_ids: list[int], watcher: Watcher) -> Tensor:
        """One forward over a row, ``[S, V]`` on the host.

        Args:
            token_ids: The row.
            watcher: Who sees the parts.

        Returns:
            The logits of every position.
        """
        ids_1S = torch.tensor([token_ids], device=self.device)
        with self._watched_by(watcher):
            logits_SV: Tensor = self.model(ids_1S, use_cache=False).logits[0]
        return logits_SV.cpu()

    @torch.inference_mode()
    def route(self, layer: int, hidden_TD: Tensor) -> tuple[Tensor, Tensor] | None:
        """What a layer's router alone says.

        Args:
            layer: The layer.
            hidden_TD: What the router gets.

        Returns:
            Experts and their weights, both ``[T, K]`` on the host; None if the router gives
            scores, from which the layer around it makes the choice.
        """
        # Its forward, not itself: a watcher that asks would be called again.
        router: Any = self.layers[layer].router
        output = router.forward(self._like(hidden_TD))
        if not isinstance(output, tuple):
            return None
        index = next((t for t in output if t.dtype == torch.int64), None)
        if index is None:
            return None
        weights = [t for t in output if t.is_floating_point() and t.shape == index.shape]
        if not weights:
            return None
        shape = hidden_TD.shape[0], -1
        return index.reshape(shape).cpu(), weights[-1].reshape(shape).cpu()

    @torch.inference_mode()
    def experts(
        self, layer: int, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor
    ) -> Tensor:
        """The weighted sums of a layer's experts, ``[T, D]`` on the host."""
        inputs = self._like(hidden_TD), index_TK.to(self.device), self._like(weights_TK)
        out_TD: Tensor = self.layers[layer].experts(*inputs)
        return out_TD.cpu()

    def _like(self, tensor: Tensor) -> Tensor:
        return tensor.to(device=self.device, dtype=self.dtype)

    @contextmanager
    def _watched_by(self, watcher: Watcher) -> Iterator[None]:
        with ExitStack() as stack:
            for handle in self._hooks(watcher):
                stack.callback(handle.remove)
            yield

    def _hooks(self, watcher: Watcher) -> Iterator[Any]:
        decoder: Any = self.model.base_model.layers
        yield decoder[0].register_forward_pre_hook(self._embeddings(watcher), with_kwargs=True)
        for index, layer in enumerate(decoder):
            yield layer.register_forward_hook(self._layer(index, watcher))
        for moe in self.layers.values():
            yield moe.router.register_forward_pre_hook(
                self._router(moe.layer, watcher), with_kwargs=True
            )
            yield moe.experts.register_forward_pre_hook(
                self._routing(moe.layer, watcher), with_kwargs=True
            )
            yield moe.experts.register_forward_hook(self._experts(moe.layer, watcher))

    def _embeddings(self, watcher: Watcher) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            hidden = first_input(args, kwargs)
            instead = watcher.embeddings(hidden[0])
            return None if instead is None else _with_first(args, kwargs, self._as(instead, hidden))

        return hook

    def _layer(self, layer: int, watcher: Watcher) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = output if isinstance(output, Tensor) else output[0]
            instead = watcher.layer(layer, hidden[0])
            if instead is None:
                return None
            replaced = self._as(instead, hidden)
            return replaced if isinstance(output, Tensor) else (replaced, *output[1:])

        return hook

    def _router(self, layer: int, watcher: Watcher) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            hidden = first_input(args, kwargs)
            instead = watcher.router_input(layer, hidden.reshape(-1, hidden.shape[-1]))
            return None if instead is None else _with_first(args, kwargs, self._as(instead, hidden))

        return hook

    def _routing(self, layer: int, watcher: Watcher) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            hidden_SD, index_SK, weights_SK = [*args, *kwargs.values()][:3]
            instead = watcher.routing(layer, hidden_SD, index_SK, weights_SK)
            if instead is None:
                return None
            hidden, index, weights = instead
            return (
                self._as(hidden, hidden_SD),
                index.to(index_SK.device),
                self._as(weights, weights_SK),
            ), {}

        return hook

    def _experts(self, layer: int, watcher: Watcher) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Any:
            instead = watcher.experts(layer, output)
            return None if instead is None else self._as(instead, output)

        return hook

    def _as(self, tensor: Tensor, like: Tensor) -> Tensor:
        return tensor.to(device=like.device, dtype=like.dtype).reshape(like.shape)


def _with_first(args: Any, kwargs: dict[str, Any], first: Tensor) -> Any:
    if args:
        return (first, *args[1:]), kwargs
    return args, kwargs | {"hidden_states": first}


def reference_bytes(view: CheckpointView, dtype: torch.dtype) -> int:
    """Bytes of the weights of a reference."""
    model = build_on_meta(view.config)
    num_weights: int = sum(parameter.numel() for parameter in model.parameters())
    return num_weights * dtype.itemsize


def check_room(num_bytes: int, device: torch.device, room_bytes: int | None = None) -> None:
    """Refuse a reference that does not fit.

    Args:
        num_bytes: Bytes of its weights.
        device: Where it goes.
        room_bytes: Bytes there; None asks the device what is free.

    Raises:
        UsageError: If there is not enough room.
    """
    room_bytes = free_bytes(device) if room_bytes is None else room_bytes
    if num_bytes > room_bytes:
        raise UsageError(
            f"the reference, the whole model in one process, needs {num_bytes / GB:.1f} GB, but "
            f"{device} has room for {room_bytes / GB:.1f} GB. Run verify on a machine with more "
            "memory, with --reference.dtype bfloat16, or on a checkpoint of the same family with "
            "fewer layers."
        )
