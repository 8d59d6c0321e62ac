"""Which of this machine's addresses TensorPipe may use, and whether it may at all."""

from collections.abc import Callable, Sequence
from typing import Any

from moe_lightning.errors import UsageError
from moe_lightning.transport.addresses import is_loopback
from moe_lightning.transport.own_address import LOOPBACK, own_address
from moe_lightning.transport.transport import ExpertTransport


def tensorpipe_towards(
    addresses: Sequence[str], *, insecure_network: bool, timeout_s: float
) -> Callable[..., ExpertTransport]:
    """How to open TensorPipe between this process and workers.

    Args:
        addresses: Where the workers are.
        insecure_network: Whether the user trusts everybody on the network.
        timeout_s: Longest wait for workers to join.

    Returns:
        What opens the transport, given names and hooks.

    Raises:
        UsageError: If that would open this machine to a network.
    """
    from moe_lightning.transport.tensorpipe import TensorPipeTransport

    hosts = {own_address(towards=address) for address in addresses}
    host = next((host for host in hosts if not is_loopback(host)), LOOPBACK)
    if not is_loopback(host) and not insecure_network:
        raise UsageError(
            "trainer.strategy.transport=tensorpipe cannot be secured: whoever reaches its port "
            "executes what they like here and on the workers. Use zmq; or, on a private network "
            "that you trust, say trainer.strategy.insecure_network=true, and --insecure-network to "
            "every worker."
        )

    def open_transport(names: Sequence[str], **hooks: Any) -> ExpertTransport:
        return TensorPipeTransport.open(host, names, timeout_s=timeout_s, **hooks)

    return open_transport
