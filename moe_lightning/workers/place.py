"""Place: where a process stands among those that torchrun or SLURM started with it."""

from collections.abc import Mapping
from dataclasses import dataclass

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from moe_lightning.errors import UsageError

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Place:
    """Where this process stands among those that were started with it.

    Attributes:
        launcher: Who started them, for messages.
        rank: Its number; 0 is the master.
        size: How many there are.
        local_rank: Its number on this machine.
        is_one_machine: Whether all are on this machine.
        store_host: Where the store is.
        store_port: Its port.
        hosts_store: Whether this process is to open the store.
        attempt: How often the launcher has started all of them again.
    """

    launcher: str
    rank: int
    size: int
    local_rank: int
    is_one_machine: bool
    store_host: str
    store_port: int
    hosts_store: bool
    attempt: int = 0


def read_place(environ: Mapping[str, str]) -> Place | None:
    """Find a process's place in the variables that its launcher set.

    Args:
        environ: The process's environment.

    Returns:
        The place; None if neither torchrun nor srun started the process, or if the SLURM job is
        an interactive one.

    Raises:
        UsageError: If the variables make no sense.
    """
    try:
        return _torchrun(environ) or _slurm(environ)
    except KeyError as error:
        what = f"{error.args[0]} is not set"
    except ValueError as error:
        what = str(error)
    raise UsageError(
        f"the variables that torchrun or SLURM set make no sense: {what}. Start the command with "
        "torchrun or srun itself."
    )


def _torchrun(environ: Mapping[str, str]) -> Place | None:
    if "TORCHELASTIC_RUN_ID" not in environ:  # as torch.distributed.is_torchelastic_launched
        return None
    rank, size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    return Place(
        launcher="torchrun",
        rank=rank,
        size=size,
        local_rank=int(environ["LOCAL_RANK"]),
        is_one_machine=int(environ["LOCAL_WORLD_SIZE"]) == size,
        store_host=environ["MASTER_ADDR"],
        store_port=int(environ["MASTER_PORT"]),
        hosts_store=rank == 0 and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        attempt=int(environ.get("TORCHELASTIC_RESTART_COUNT", 0)),
    )


def _slurm(environ: Mapping[str, str]) -> Place | None:
    """As Lightning's SLURMEnvironment reads them; 2.6.6."""
    if "SLURM_NTASKS" not in environ or environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return None
    rank = int(environ["SLURM_PROCID"])
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
    is_one_machine = int(environ.get("SLURM_STEP_NUM_NODES") or environ["SLURM_NNODES"]) == 1
    first = LOOPBACK if is_one_machine else SLURMEnvironment.resolve_root_node_address(nodes)
    return Place(
        launcher="SLURM",
        rank=rank,
        size=int(environ["SLURM_NTASKS"]),
        local_rank=int(environ["SLURM_LOCALID"]),
        is_one_machine=is_one_machine,
        store_host=environ.get("MASTER_ADDR") or first,
        store_port=int(
            environ.get("MASTER_PORT") or 15000 + int(environ.get("SLURM_JOB_ID", 0)) % 10000
        ),
        hosts_store=rank == 0,
    )
