"""torch.distributed.rpc as guides show it: the peer of bench_rpc.py --layer."""

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributed import rpc


def mirror(expert: int, rows_RD: Tensor) -> Tensor:
    """What a worker computes for one expert: nothing."""
    return rows_RD


def start_guide(options: Mapping[str, Any], *, rank: int) -> None:
    """Join the others, with the defaults of torch.distributed.rpc.

    Args:
        options: Where the master is, the interface to use, and the workers' addresses.
        rank: Which process this is; 0 is the master.
    """
    # Else it takes what the machine's name resolves to.
    os.environ["TP_SOCKET_IFNAME"] = os.environ["GLOO_SOCKET_IFNAME"] = options["interface"]
    host, port = options["master"]
    rpc.init_rpc(
        f"worker{rank}",
        rank=rank,
        world_size=1 + len(options["addresses"]),
        rpc_backend_options=rpc.TensorPipeRpcBackendOptions(
            init_method=f"tcp://{host}:{port}", rpc_timeout=120
        ),
    )


def serve_guide(options: Mapping[str, Any]) -> None:
    """Be a worker until the master leaves."""
    start_guide(options, rank=options["rank"])
    rpc.shutdown()
