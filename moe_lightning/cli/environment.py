"""``--env``: what a bug report needs to know of this machine, and what is wrong with it.

Each part looks for itself: where a package is broken the error stands in its line, and the others
go on. Only the standard library is imported before a part begins.
"""

import importlib
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from moe_lightning import __version__
from moe_lightning.cli.environment_packages import Lines, dependencies, optional_packages, words

SHOWN = {  # what each begins with; nothing else is shown, since others may hold secrets
    "": ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    "SLURM_": ("JOB_ID", "NNODES", "NTASKS", "NTASKS_PER_NODE", "PROCID", "LOCALID"),
    "OMP_": ("NUM_THREADS",),
    "CUDA_": ("VISIBLE_DEVICES",),
    "NCCL_": ("SOCKET_IFNAME", "IB_DISABLE", "P2P_DISABLE", "DEBUG"),
    "GLOO_": ("SOCKET_IFNAME",),
    "PYTORCH_": ("ALLOC_CONF", "CUDA_ALLOC_CONF"),
    "ONEDNN_": ("MAX_CPU_ISA",),
    "TRITON_": ("INTERPRET",),
    "HF_": ("HUB_OFFLINE",),
    "MOE_LIGHTNING_": ("VERBOSE",),
}
ONLY_WHETHER_SET = ("HF_HOME", "HF_TOKEN", "HF_ENDPOINT", "PYTHONPATH", "HTTPS_PROXY")
LITTLE_DISK_BYTES = 10**9
LOOPBACK_MS = 2000


def run() -> int:
    """Print it.

    Returns:
        0, or 1 if something is wrong.
    """
    problems: list[str] = []
    for title, look in _PARTS.items():
        print(f"{title}:")
        try:
            lines = look(problems)
        except Exception as error:
            lines = [("not known", words(error))]
            # A package that cannot be imported is a problem already.
            if not isinstance(error, ImportError) or not problems:
                problems.append(f"{title}: {words(error)}. Report it, with all of this.")
        width = max(len(name) for name, _ in lines)
        for name, value in lines:
            print(f"  {name:<{width}}  {value}", flush=True)
    print("problems:" if problems else "problems: none found")
    for problem in problems:
        print(f"  - {problem}")
    return int(bool(problems))


def _place(path: str | Path) -> str:
    return str(path).replace(str(Path.home()), "~", 1)


def _package(problems: list[str]) -> Lines:
    folder = Path(__file__).resolve().parent.parent
    from moe_lightning.cli.configs import config_directory

    num_configs = len(list(config_directory().glob("*.yaml")))
    weights = folder / "demo" / "checkpoint" / "model.safetensors"
    if not num_configs or not weights.is_file():
        problems.append(
            "the package is not whole. pip install --force-reinstall --no-deps moe-lightning"
        )
    return [
        ("moe-lightning", f"{__version__} in {_place(folder)}"),
        ("python", f"{platform.python_version()}, {_place(sys.executable)}"),
        ("configs", f"{num_configs}"),
        ("demo checkpoint", "there" if weights.is_file() else "missing"),
    ]


def _machine(problems: list[str]) -> Lines:
    import psutil

    cores = _num_cores()
    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    limit = _cgroup("memory.max")
    if limit.isdecimal() and int(limit) < total:
        total = int(limit)
        available = min(available, total - int(_cgroup("memory.current") or 0))
    free = shutil.disk_usage(".").free
    lines = [
        ("system", f"{platform.platform()}, {platform.machine()}"),
        ("cpu", f"{_cpu_name()}, {cores:g} of {os.cpu_count()} cores"),
        ("memory", f"{available / 1e9:.1f} of {total / 1e9:.1f} GB free"),
        ("working folder", f"{free / 1e9:.1f} GB free in {_place(Path.cwd())}"),
    ]
    if not os.access(".", os.W_OK):
        problems.append(f"nothing can be written in {_place(Path.cwd())}. Use --output_dir DIR")
    elif free < LITTLE_DISK_BYTES:
        problems.append("the disk of the working folder is nearly full. Use --output_dir DIR")
    return lines


def _num_cores() -> float:
    """Cores that this process may use, with the limits of its container."""
    cores = float(len(os.sched_getaffinity(0))) if sys.platform == "linux" else os.cpu_count() or 1
    quota, _, period = _cgroup("cpu.max").partition(" ")
    return min(cores, int(quota) / int(period)) if quota.isdecimal() else cores


def _cgroup(name: str) -> str:
    try:
        return Path("/sys/fs/cgroup", name).read_text().strip()
    except OSError:  # no control groups
        return ""


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2] for line in text.splitlines() if line.startswith("model name")]
    return names[0].strip() if names else platform.machine()


def _torch(problems: list[str]) -> Lines:
    import torch
    from torch import cuda

    threads, cores = torch.get_num_threads(), _num_cores()
    if threads > cores:
        problems.append(
            f"PyTorch computes with {threads} threads on {cores:g} cores, which is slow. "
            f"export OMP_NUM_THREADS={max(1, int(cores))}"
        )
    nccl = cuda.nccl.version() if cuda.is_available() else ()  # type: ignore[no-untyped-call]
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    lines = [
        ("torch", torch.__version__),
        ("CUDA of torch", torch.version.cuda or "none"),
        ("NCCL", ".".join(map(str, nccl)) or "not in use"),
        ("cuDNN", str(cudnn or "none")),
        ("CPU instructions", torch.backends.cpu.get_cpu_capability()),
        ("oneDNN", "there" if has_onednn else "missing"),
        ("CPU threads", str(threads)),
    ]
    for index in range(cuda.device_count()):
        properties = cuda.get_device_properties(index)
        free, total = cuda.mem_get_info(index)
        lines.append(
            (
                f"cuda:{index}",
                f"{properties.name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free, "
                f"compute capability {properties.major}.{properties.minor}",
            )
        )
    if not cuda.device_count():
        lines.append(("GPUs", "none that PyTorch can use"))
        if Path("/proc/driver/nvidia/version").exists():
            problems.append(
                "this machine has an NVIDIA driver, but PyTorch sees no GPU. Look at "
                "CUDA_VISIBLE_DEVICES, and at whether torch is built for CUDA and its version "
                "for this driver (nvidia-smi)."
            )
    return lines


def _distributed(problems: list[str]) -> Lines:
    import torch.distributed as dist

    if not dist.is_available():
        problems.append("this build of torch has no torch.distributed: strategies over ranks fail.")
        return [("torch.distributed", "missing")]
    there = {
        "gloo": dist.is_gloo_available(),
        "nccl": dist.is_nccl_available(),
        "mpi": dist.is_mpi_available(),
    }
    if not there["gloo"]:
        problems.append("this build of torch has no gloo, which ranks need on CPUs and for control")
    rpc = importlib.import_module("torch.distributed.rpc").is_available()
    return [
        *((name, "there" if is_there else "missing") for name, is_there in there.items()),
        ("tensorpipe", "there" if rpc else "missing"),
        ("zmq on the loopback", _loopback(problems)),
    ]


def _loopback(problems: list[str]) -> str:
    """Listens on a free port of this machine, and asks itself."""
    import zmq

    if not zmq.has("curve"):
        problems.append("this libzmq has no CURVE, so that moe_rpc has no keys. Reinstall pyzmq")
    with (
        zmq.Context() as context,
        context.socket(zmq.REP) as server,
        context.socket(zmq.REQ) as client,
    ):
        for socket in (server, client):
            socket.linger = 0
            socket.rcvtimeo = socket.sndtimeo = LOOPBACK_MS
        try:
            port = server.bind_to_random_port("tcp://127.0.0.1")
            client.connect(f"tcp://127.0.0.1:{port}")
            started = time.perf_counter()
            client.send(b"there?")
            server.send(server.recv())
            client.recv()
        except zmq.ZMQError as error:
            problems.append(
                "processes of this machine cannot talk over 127.0.0.1, which moe_rpc and ranks "
                "need. Look for a firewall or a sandbox."
            )
            return f"does not answer: {words(error)}"
    return f"answers in {1000 * (time.perf_counter() - started):.1f} ms"


def _experts(problems: list[str]) -> Lines:
    from moe_lightning.cli.environment_experts import backends_here

    return backends_here(problems)


def _variables(problems: list[str]) -> Lines:
    shown = [begin + name for begin, names in SHOWN.items() for name in names]
    lines = [(name, os.environ[name]) for name in shown if name in os.environ]
    lines += [(name, "set") for name in ONLY_WHETHER_SET if name in os.environ]
    return lines or [("none", "of those that matter")]


_PARTS: dict[str, Callable[[list[str]], Lines]] = {
    "package": _package,
    "machine": _machine,
    "dependencies": dependencies,
    "optional packages": optional_packages,
    "torch": _torch,
    "distributed": _distributed,
    "backends of experts": _experts,
    "variables": _variables,
}
