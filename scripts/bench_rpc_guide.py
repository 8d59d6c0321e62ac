"""torch.distributed.rpc as guides show it, the peer of bench_rpc.py --layer: a call per expert.

python bench_rpc_guide.py master '{"rank": 0, "addresses": [...], ...}'
python bench_rpc_guide.py worker '{"rank": 1, "addresses": [...], ...}'
"""

import json
import os
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from bench_rpc_player import Turn, play, seconds_of
from bench_rpc_rows import Rows
from torch import Tensor
from torch.distributed import rpc


def mirror(expert: int, rows_RD: Tensor) -> Tensor:
    """What a worker computes for one expert: nothing."""
    return rows_RD


def join(options: Mapping[str, Any]) -> None:
    """Join the others, as machines do: by default processes of one use shared memory instead, and
    even reach through network namespaces so."""
    # Else it takes what the machine's name resolves to.
    os.environ["TP_SOCKET_IFNAME"] = os.environ["GLOO_SOCKET_IFNAME"] = options["interface"]
    host, port = options["master"]
    between_machines = {"_transports": ["uv"], "_channels": ["basic"]}
    channels: Any = {} if options["is_shared_memory"] else between_machines
    rpc.init_rpc(
        f"worker{options['rank']}",
        rank=options["rank"],
        world_size=1 + len(options["addresses"]),
        rpc_backend_options=rpc.TensorPipeRpcBackendOptions(
            init_method=f"tcp://{host}:{port}",
            rpc_timeout=120,
            **channels,
        ),
    )


def ask(options: Mapping[str, Any]) -> tuple[dict[str, Any], Turn]:
    """Be the master; a turn is one layer, its calls all at once or one by one."""
    join(options)
    rows = Rows(options)

    def layer(is_at_once: bool) -> Tensor:
        calls = []
        for expert, slot in enumerate(rows.slot_of):
            token_R, choice_R = (rows.index_TK == expert).nonzero(as_tuple=True)
            if token_R.numel() == 0:
                continue
            args = (expert, rows.hidden_TD[token_R])
            call = rpc.rpc_async(f"worker{slot + 1}", mirror, args=args)
            if not is_at_once:
                call.wait()
            calls.append((token_R, rows.weights_TK[token_R, choice_R], call))
        out_TD = torch.zeros_like(rows.hidden_TD)
        for token_R, weights_R, call in calls:
            out_TD.index_add_(0, token_R, call.wait() * weights_R[:, None])
        return out_TD

    def turn(question: dict[str, Any]) -> dict[str, Any]:
        return {"seconds": seconds_of(partial(layer, question["how"] == "at once"))}

    return {"mean": float((layer(True) / rows.hidden_TD).mean())}, turn


def main() -> None:
    """The process that the command line says."""
    role, options = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(1)
    if role == "master":
        with torch.inference_mode():
            play(partial(ask, options))
    else:
        join(options)
        rpc.shutdown()


if __name__ == "__main__":
    main()
