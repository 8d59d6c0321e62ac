"""LocalDispatcher: all experts of a layer on the device of the rows. The readable reference."""

from collections.abc import Callable

from torch import Tensor
from typing_extensions import override

from moe_lightning.dispatch.bookkeeping import RoutingLog
from moe_lightning.dispatch.dispatcher import Dispatcher
from moe_lightning.experts import ExpertShard


class LocalDispatcher(Dispatcher):
    """Nothing travels: the shard holds every expert, where the rows are.

    Args:
        shard: All experts of the layer, in logical order.
        log: Where the layer's work is recorded while somebody looks.
    """

    def __init__(self, shard: ExpertShard, *, log: RoutingLog) -> None:
        super().__init__(layer=shard.layer, num_experts=len(shard.expert_ids), log=log)
        assert shard.expert_ids == tuple(range(self.num_experts)), (
            "a local shard holds every expert, in order"
        )
        self.shard = shard

    @override
    def __call__(
        self,
        hidden_TD: Tensor,
        index_TK: Tensor,
        weights_TK: Tensor,
        meanwhile: Callable[[], None] | None = None,
    ) -> Tensor:
        trace = self.log.open(
            self.layer, self.num_experts, index_TK, weights_TK, slots=(str(hidden_TD.device),)
        )
        out_TD = self.shard.compute(hidden_TD, index_TK, weights_TK)
        trace.lap("compute", 0)
        self.log.close(trace)
        return out_TD
