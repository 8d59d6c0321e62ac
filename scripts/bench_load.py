"""Peak memory and speed of loading a checkpoint, beside plain transformers in the same run.

    python scripts/bench_load.py --size 2GB
    python scripts/bench_load.py --checkpoint DIR --json

Each load runs in a process of its own. Its peak is the kernel's high-water mark (VmHWM, reset after
the imports) above what the imports took.
The bound is: weights + the largest tensor of the model + a slack of 200 MB.

With a backend's name, the model is loaded for inference: each layer's experts are packed before
the next layer is read, the dense layers at the end. Bounds: after loading, 1.1 times the packed
experts + the dense part + 300 MB; at the peak, these weights + one layer + the largest tensor + the
slack.
"three_slots" puts the experts on three slots of the CPU, packed for oneDNN.

Exit code 1: a bound of ours is broken.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PACKING = ("cpu_packed", "cpu_half", "cpu_int8", "three_slots")
LOADERS = ("moe_lightning", "transformers", *PACKING)
AFTER_SLACK = 300 * 10**6
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_bytes(text: str) -> int:
    """``2GB`` is 2 * 10^9 bytes."""
    unit = text[-2:].upper()
    try:
        return int(float(text[:-2]) * _UNITS[unit])
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r}: write a size such as 64MB or 2GB") from None


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=parse_bytes, default="2GB", help="of the made checkpoint")
    parser.add_argument("--checkpoint", type=Path, help="measure this one instead")
    parser.add_argument("--family", default="qwen3_moe", help="of the made checkpoint")
    parser.add_argument("--slack", type=parse_bytes, default="200MB", help="of the bound")
    parser.add_argument("--only", choices=LOADERS, help="measure one of them")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--load", choices=LOADERS, help=argparse.SUPPRESS)
    return parser.parse_args()


def make(path: Path, *, family: str, num_bytes: int) -> None:
    from moe_lightning.demo.random_checkpoint import make_checkpoint

    # Eight layers: the largest tensor is about a twelfth of the weights.
    make_checkpoint(path, family=family, num_layers=8, target_params=str(num_bytes // 4))


def load(loader: str, path: Path) -> dict[str, Any]:
    """Load in this process; the parent reads the result from stdout."""
    import torch
    from transformers import AutoModelForCausalLM

    from moe_lightning.modeling.checkpoint import open_checkpoint
    from moe_lightning.modeling.loading import load_model

    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at what is in use now
    baseline_bytes, _ = _memory()
    start_s = time.perf_counter()
    if loader == "moe_lightning":
        model = load_model(
            open_checkpoint(path),
            device=torch.device("cpu"),
            dtype=torch.float32,
            show_progress=False,
        )
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    # Mapped weights are not read before they are used, so both loaders use every one of them once.
    # Row by row: a reduction over a whole tensor may take memory of its own.
    sum(float(row.sum()) for p in model.parameters() for row in p.detach())
    load_s = time.perf_counter() - start_s
    in_use_bytes, peak_bytes = _memory()
    sizes = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
    largest = max(sizes, key=sizes.__getitem__)
    return {
        "loader": loader,
        "weight_bytes": sum(sizes.values()),
        "largest_tensor": largest,
        "largest_tensor_bytes": sizes[largest],
        "baseline_bytes": baseline_bytes,
        "peak_bytes": peak_bytes - baseline_bytes,
        "after_bytes": in_use_bytes - baseline_bytes,
        "load_s": load_s,
    }


def load_packed(loader: str, path: Path) -> dict[str, Any]:
    """Load for inference in this process; the parent reads the result from stdout."""
    import torch

    from moe_lightning.dispatch import RoutingLog
    from moe_lightning.experts.backends import bytes_of_experts
    from moe_lightning.modeling.checkpoint import open_checkpoint
    from moe_lightning.modeling.loading import build_on_meta
    from moe_lightning.modeling.seam import find_moe_layers
    from moe_lightning.strategies import HostingOptions, PlacementStrategy, host_on_one_device

    Path("/proc/self/clear_refs").write_text("5")
    baseline_bytes, _ = _memory()
    view = open_checkpoint(path)
    backend: Any = "cpu_packed" if loader == "three_slots" else loader
    start_s = time.perf_counter()
    options = HostingOptions(
        dtype=torch.float32, experts_backend=backend, log=RoutingLog(), packs_while_loading=True
    )
    if loader == "three_slots":
        hosted = PlacementStrategy(["cpu"] * 3).host(view, options)
    else:
        hosted = host_on_one_device(view, torch.device("cpu"), options)
    hosted.pack()
    load_s = time.perf_counter() - start_s
    in_use_bytes, peak_bytes = _memory()
    whole = build_on_meta(view.config)
    layers = [layer.experts for layer in find_moe_layers(whole)]
    in_experts = [sum(4 * p.numel() for p in experts.parameters()) for experts in layers]
    packed_bytes = sum(bytes_of_experts(backend, experts, "cpu") for experts in layers)
    dense_bytes = sum(4 * p.numel() for p in whole.parameters()) - sum(in_experts)
    sizes = {name: 4 * p.numel() for name, p in whole.named_parameters()}
    largest = max(sizes, key=sizes.__getitem__)
    return {
        "loader": loader,
        "weight_bytes": packed_bytes + dense_bytes,
        "packed_bytes": packed_bytes,
        "dense_bytes": dense_bytes,
        "layer_bytes": max(in_experts),
        "largest_tensor": largest,
        "largest_tensor_bytes": sizes[largest],
        "baseline_bytes": baseline_bytes,
        "peak_bytes": peak_bytes - baseline_bytes,
        "after_bytes": in_use_bytes - baseline_bytes,
        "load_s": load_s,
    }


def _memory() -> tuple[int, int]:
    """Bytes in use now, and at most since the high-water mark was reset."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(status[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))  # type: ignore


def run_self(*options: str) -> str:
    """This script in a fresh process: nothing of ours is in its memory."""
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, __file__, *options],
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode != 0:
        sys.exit(f"bench_load {' '.join(options)} failed:\n{done.stderr}")
    return done.stdout


def measure(args: argparse.Namespace, path: Path) -> list[dict[str, Any]]:
    results = []
    for loader in [args.only] if args.only else LOADERS:
        result = json.loads(run_self("--load", loader, "--checkpoint", str(path)).splitlines()[-1])
        result["bound_bytes"] = result["weight_bytes"] + result["largest_tensor_bytes"] + args.slack
        is_within = True
        if loader in PACKING:
            result["bound_bytes"] += result["layer_bytes"]
            result["after_bound_bytes"] = (
                1.1 * result["packed_bytes"] + result["dense_bytes"] + AFTER_SLACK
            )
            is_within = result["after_bytes"] <= result["after_bound_bytes"]
        result["is_within_bound"] = is_within and result["peak_bytes"] <= result["bound_bytes"]
        result["gb_per_s"] = result["weight_bytes"] / result["load_s"] / 1e9
        results.append(result)
    return results


def report(results: list[dict[str, Any]]) -> None:
    from importlib.metadata import version

    def mb(result: dict[str, Any], key: str) -> str:
        return f"{result[key] / 1e6:,.0f} MB"

    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, {versions}")
    for result in results:
        verdict = "PASS" if result["is_within_bound"] else "FAIL"
        print(
            f"\n{result['loader']}\n"
            f"  weights         {mb(result, 'weight_bytes')}\n"
            f"  largest tensor  {mb(result, 'largest_tensor_bytes')} "
            f"({result['largest_tensor']})\n"
            f"  imports         {mb(result, 'baseline_bytes')}\n"
            f"  peak above them {mb(result, 'peak_bytes')}, at most "
            f"{mb(result, 'bound_bytes')}\n"
            f"  after loading   {mb(result, 'after_bytes')}"
            + (f", at most {mb(result, 'after_bound_bytes')}" if "packed_bytes" in result else "")
            + f"\n  time            {result['load_s']:.2f} s, {result['gb_per_s']:.2f} GB/s\n"
            f"  {verdict}"
        )


def main() -> int:
    args = parse_args()
    if args.make:
        make(args.make, family=args.family, num_bytes=args.size)
        return 0
    if args.load:
        loading = load_packed if args.load in PACKING else load
        print(json.dumps(loading(args.load, args.checkpoint)))
        return 0
    with tempfile.TemporaryDirectory(prefix="bench_load_") as directory:
        path = args.checkpoint or Path(directory) / "checkpoint"
        if not args.checkpoint:
            size = f"{args.size // 1000}KB"
            run_self("--make", str(path), "--family", args.family, "--size", size)
        results = measure(args, path)
    if args.json:
        print(json.dumps({"loads": results}, indent=2))
    else:
        report(results)
    is_ours_good = all(r["is_within_bound"] for r in results if r["loader"] != "transformers")
    return 0 if is_ours_good else 1


if __name__ == "__main__":
    sys.exit(main())
