"""ExpertHost: the experts that a worker holds, read from its own copy of the checkpoint."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moe_lightning.devices import free_bytes
from moe_lightning.experts import BackendName, ExpertShard, HeldExperts
from moe_lightning.experts.backends import bytes_of_experts
from moe_lightning.experts.freed_memory import give_back_freed_memory
from moe_lightning.modeling.checkpoint import CheckpointView
from moe_lightning.modeling.loading import build_on_meta, load_experts
from moe_lightning.modeling.seam import MoELayer, find_moe_layers


class ExpertHost:
    """Loads experts and computes rows with them.

    Args:
        view: The opened checkpoint.
        device: Where experts go.
        experts_backend: How experts are computed; None leaves it to the master.
        memory_bytes: Most bytes that experts may take; None means what is free.
        show_progress: Whether to show a progress bar while loading.
    """

    def __init__(
        self,
        view: CheckpointView,
        *,
        device: torch.device,
        experts_backend: BackendName | None = None,
        memory_bytes: float | None = None,
        show_progress: bool = False,
    ) -> None:
        self.view = view
        self.device = device
        self.experts_backend = experts_backend
        self._memory_bytes = memory_bytes
        self._show_progress = show_progress
        self._held: dict[int, HeldExperts] = {}

    @property
    def has_limit(self) -> bool:
        """Whether experts may take a part of the memory only."""
        return self._memory_bytes is not None

    def offered_bytes(self) -> int:
        """Bytes that more experts may take now."""
        free = free_bytes(self.device)
        if self._memory_bytes is None:
            return free
        held = sum(
            bytes_of_experts(shard.backend_name, shard.experts, self.device.type)
            for held in self._held.values()
            for shard in held.shards
        )
        return max(0, min(free, int(self._memory_bytes) - held))

    def load(
        self,
        experts: Mapping[int, Sequence[int]],
        *,
        dtype: torch.dtype,
        experts_backend: BackendName,
    ) -> None:
        """Hold more experts; those that are held already stay as they are.

        Args:
            experts: Logical experts by layer.
            dtype: Dtype of the weights.
            experts_backend: How they are computed, unless this worker has a way of its own.

        Raises:
            CheckpointError: If they cannot be read.
            ValueError: If there are no such experts, or no room for them.
        """
        backend = self.experts_backend or experts_backend
        layers = {
            layer.layer: layer
            for layer in find_moe_layers(build_on_meta(self.view.config, dtype=dtype))
        }
        if unknown := experts.keys() - layers.keys():
            raise ValueError(f"layers {sorted(unknown)} have no experts.")
        for layer, ids in experts.items():
            if strange := [i for i in ids if not 0 <= i < layers[layer].num_experts]:
                raise ValueError(f"layer {layer} has no experts {strange[:8]}.")
        wanted = {
            layer: self._held[layer].missing(ids) if layer in self._held else list(ids)
            for layer, ids in experts.items()
        }
        needed = sum(
            bytes_of_experts(backend, layers[number].experts, self.device.type)
            * len(ids)
            // layers[number].num_experts
            for number, ids in wanted.items()
        )
        if needed > (offered := self.offered_bytes()):
            raise ValueError(
                f"these experts take {needed / 1e9:.3f} GB, and {offered / 1e9:.3f} GB are free."
            )

        def on_layer(layer: MoELayer) -> None:
            ids = wanted[layer.layer]
            shard = ExpertShard(layer.experts, layer=layer.layer, expert_ids=ids, backend=backend)
            shard.pack()
            shards[layer.layer] = shard

        shards: dict[int, ExpertShard] = {}
        with torch.no_grad():
            load_experts(
                self.view,
                device=self.device,
                dtype=dtype,
                experts={layer: ids for layer, ids in wanted.items() if ids},
                on_layer=on_layer,
                show_progress=self._show_progress,
            )
        for number, shard in shards.items():
            if number not in self._held:
                self._held[number] = HeldExperts(layers[number].num_experts)
            self._held[number].add(shard)

    def compute(
        self, layer: int, rows_RD: Tensor, index_RK: Tensor, weights_RK: Tensor
    ) -> Tensor | None:
        """The weighted sums of rows.

        Args:
            layer: Decoder layer.
            rows_RD: Rows on the host.
            index_RK: Logical experts on the host; the layer's number of experts is "elsewhere".
            weights_RK: Router weights on the host.

        Returns:
            ``[R, D]`` on the worker's device; None if not all of the experts are here.
        """
        held = self._held.get(layer)
        if held is None or not held.holds(index_RK):
            return None
        with torch.inference_mode():
            tensors = (rows_RD, index_RK, weights_RK)
            return held.compute(*(t.to(self.device, non_blocking=True) for t in tensors))

    def free(self) -> None:
        """Hold nothing any more."""
        self._held.clear()
        give_back_freed_memory()
