"""The KV cache of the decode loop: rows come and go, columns are shared.

    columns:   0 ... start ................ end ... capacity
    row 0:           .  .  p  r  o  m  p  t  a  b |          all rows end in the same column, so the
    causal and row 1:           t  h  e     l  o  n  g  e  s |          sliding-window masks that
    transformers builds for a row 2:           .  .  .  .  .  .  .  h  i  . |          left-padded
    batch are right as they are

A finished row's place is given to a waiting row, whose prompt is computed apart and written so that
it ends in the current column; a place that nobody needs is filled by the last row. Nothing is
concatenated as rows grow.

Layer classes and their methods: transformers/cache_utils.py, 5.23.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer
from typing_extensions import override


class _Columns:
    """What all layers of a cache share: which columns and rows are in use."""

    def __init__(self, max_rows: int, capacity: int) -> None:
        self.max_rows = max_rows
        self.capacity = capacity
        self.start = 0
        self.end = 0
        self.prefill_places: Tensor | None = None


class _ColumnLayer(CacheLayerMixin):
    """Keys and values of one layer, ``[max_rows, heads, capacity, head_dim]`` each."""

    is_sliding = False

    def __init__(self, columns: _Columns) -> None:
        super().__init__()
        self.columns = columns

    @override
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros: a masked column weighs 0, and 0 * NaN would be NaN.
        self.keys = self._allocate(key_states)
        self.values = self._allocate(value_states)
        self.is_initialized = True

    def _allocate(self, like: Tensor) -> Tensor:
        shape = (self.columns.max_rows, like.shape[1], self.columns.capacity, like.shape[3])
        return torch.zeros(shape, dtype=like.dtype, device=like.device)

    @override
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        columns, num_new = self.columns, key_states.shape[2]
        if columns.prefill_places is not None:
            window = slice(columns.end - num_new, columns.end)
            self.keys[columns.prefill_places, :, window] = key_states
            self.values[columns.prefill_places, :, window] = value_states
            return key_states, value_states
        num_rows, new_end = key_states.shape[0], columns.end + num_new
        self.keys[:num_rows, :, columns.end : new_end] = key_states
        self.values[:num_rows, :, columns.end : new_end] = value_states
        window = slice(columns.start, new_end)
        return self.keys[:num_rows, :, window], self.values[:num_rows, :, window]

    @override
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    @override
    def get_seq_length(self) -> int:
        return (
            0 if self.columns.prefill_places is not None else self.columns.end - self.columns.start
        )

    @override
    def get_max_length(self) -> int:
        return -1


class ColumnCache(Cache):
    """A KV cache whose rows are replaced while it is in use.

    Args:
        config: The text model's config; :meth:`supports` must hold for it.
        max_rows: Rows at a time.
        max_tokens: Tokens of the longest row, prompt and answer together.
    """

    def __init__(self, config: PreTrainedConfig, *, max_rows: int, max_tokens: int) -> None:
        # Spare columns, so that moving the window back to the front is rare.
        self.columns = _Columns(max_rows, max_tokens + max(64, max_tokens // 2))
        num_layers = len(DynamicCache(config=config).layers)
        super().__init__(layers=[_ColumnLayer(self.columns) for _ in range(num_layers)])

    @staticmethod
    def supports(config: PreTrainedConfig) -> bool:
        """Whether all layers keep plain keys and values (no recurrent state, no indexer)."""
        layers = DynamicCache(config=config).layers
        return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)

    def begin_prefill(self, places: Tensor, num_columns: int, longest_active: int) -> None:
        """Let the next forward write new rows, ``num_columns`` wide, that end in the current
        column.

        Args:
            places: Rows of the cache to write; int64 on the model's device.
            num_columns: Width of the left-padded prompts.
            longest_active: Tokens of the longest row already in the cache; 0 if there is none.
        """
        columns = self.columns
        if longest_active == 0:
            columns.start = columns.end = num_columns
        elif num_columns > columns.end:
            self._move_window(num_columns)
        columns.start = min(columns.start, columns.end - num_columns)
        columns.prefill_places = places

    def end_prefill(self) -> None:
        """Return to decoding."""
        self.columns.prefill_places = None

    def begin_step(self, longest_active: int) -> None:
        """Make room for one more column before a decode step.

        Args:
            longest_active: Tokens of the longest row, without the new one.
        """
        columns = self.columns
        columns.start = columns.end - longest_active
        if columns.end == columns.capacity:
            self._move_window(longest_active)

    def end_step(self) -> None:
        """Keep the column that the step wrote."""
        self.columns.end += 1

    def move_row(self, source: int, target: int) -> None:
        """Copy the row in place ``source`` to place ``target``."""
        window = slice(self.columns.start, self.columns.end)
        for tensor in self._tensors():
            tensor[target, :, window] = tensor[source, :, window]

    def clear_row(self, place: int) -> None:
        """Zero a row that went bad, so that its NaNs cannot reach the row that comes after it."""
        for tensor in self._tensors():
            tensor[place].zero_()

    def _move_window(self, new_end: int) -> None:
        columns = self.columns
        length = columns.end - columns.start
        old, new = slice(columns.start, columns.end), slice(new_end - length, new_end)
        for tensor in self._tensors():
            tensor[:, :, new] = tensor[:, :, old].clone()
        columns.start, columns.end = new.start, new.stop

    def _tensors(self) -> list[Tensor]:
        return [
            t for layer in self.layers if layer.is_initialized for t in (layer.keys, layer.values)
        ]


def keep_rows(cache: Any, rows: Tensor) -> None:
    """Drop all other rows of a cache that a model made for itself.

    Args:
        cache: Any of transformers' caches.
        rows: Places to keep; int64 on the model's device.
    """
    # Layers with recurrent states know only how to reorder; a family's own class (MiniMax), only
    # how to select.
    if type(cache).batch_select_indices is not Cache.batch_select_indices:
        cache.batch_select_indices(rows)
    else:
        cache.reorder_cache(rows)
