"""Flight: one all-to-all of rows that is on its way while other work is done."""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor


class Flight:
    """Bytes on their way between ranks; what is sent stays alive until the wait.

    Args:
        bytes_SX: A row of bytes for each row that leaves, in the order of the ranks.
        num_out: Rows for each rank.
        num_in: Rows from each rank.
        group: The ranks.
    """

    def __init__(
        self,
        bytes_SX: Tensor,
        num_out: Sequence[int],
        num_in: Sequence[int],
        group: dist.ProcessGroup,
    ) -> None:
        self._sent = bytes_SX
        self._received = bytes_SX.new_empty(sum(num_in), bytes_SX.shape[1])
        self._work: dist.Work | None = dist.all_to_all_single(
            self._received, self._sent, list(num_in), list(num_out), group=group, async_op=True
        )

    def wait(self) -> Tensor:
        """Wait until all is there; again is legal.

        Returns:
            A row of bytes for each row that has come, in the order of the ranks.
        """
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._received
