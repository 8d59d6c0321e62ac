"""Taking rows to experts and bringing back weighted sums: one dispatcher per MoE layer."""

from moe_lightning.dispatch.bookkeeping import LayerTrace, RoutingLog, Span
from moe_lightning.dispatch.collective import CollectiveDispatcher, LayerExperts
from moe_lightning.dispatch.dispatcher import Dispatcher
from moe_lightning.dispatch.interleave import Interleaver
from moe_lightning.dispatch.local import LocalDispatcher
from moe_lightning.dispatch.placed import PlacedDispatcher
from moe_lightning.dispatch.remote import RemoteDispatcher, RemoteExperts
from moe_lightning.dispatch.slots import Slot, make_slots

__all__ = [
    "CollectiveDispatcher",
    "Dispatcher",
    "Interleaver",
    "LayerExperts",
    "LayerTrace",
    "LocalDispatcher",
    "PlacedDispatcher",
    "RemoteDispatcher",
    "RemoteExperts",
    "RoutingLog",
    "Slot",
    "Span",
    "make_slots",
]
