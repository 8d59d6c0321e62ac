"""Taking rows to experts and bringing back weighted sums: one dispatcher per MoE layer."""

from moe_lightning.dispatch.bookkeeping import LayerTrace, RoutingLog, Span
from moe_lightning.dispatch.dispatcher import Dispatcher
from moe_lightning.dispatch.local import LocalDispatcher

__all__ = ["Dispatcher", "LayerTrace", "LocalDispatcher", "RoutingLog", "Span"]
