"""Peak memory of a rank while a model is loaded, runs, trains, and is saved and exported.

    python scripts/measure_sharded_memory.py --out result.json

Each number is the most memory that a rank has had in a phase, above what it had before the model
was loaded. The bounds: the rank's share, the largest layer gathered, and a constant. Training has
four numbers for each of its weights (weight, gradient and AdamW's two), and two layers gathered;
three are left when it saves.
"""

import argparse
import json
import os
import re
import socket
import sys
import tempfile
from multiprocessing import get_context
from pathlib import Path

CONSTANT_MB = 150  # activations of the small batches here, buffers of gloo and of reading
FILE_MB = 64  # of an exported file; 1 GiB otherwise
RANKS = 2
LAYOUTS = {"fsdp 2": {}, "ep 2": {"ep_size": RANKS}}


def memory_mb(name: str) -> float:
    """A line of /proc/self/status, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{name}:\s+(\d+)", status, re.M)[1]) / 1000


class Phases:
    """Peaks above where it began."""

    def __init__(self) -> None:
        self.before_mb = memory_mb("VmRSS")
        self.peaks_mb: dict[str, float] = {}

    def end(self, name: str) -> None:
        """Note the peak since the last phase ended."""
        self.peaks_mb[name] = memory_mb("VmHWM") - self.before_mb
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew


def run_rank(
    pipe, rank: int, port: int, verb: str, checkpoint: str, options: dict, directory: str
) -> None:
    """One rank of a predict, or of a fit that saves."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0", WORLD_SIZE=str(RANKS),
        LOCAL_WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID=f"memory-{port}",
    )  # fmt: skip
    import logging
    import warnings

    import lightning as L
    import torch
    from torch.utils.data import DataLoader

    from moe_lightning import MoELightningModule, Score, ShardedStrategy

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    shared = {"accelerator": "cpu", "devices": RANKS, "logger": False}
    shared |= {"enable_progress_bar": False, "enable_model_summary": False}
    shared |= {"enable_checkpointing": False}
    phases = Phases()

    class Watch(L.Callback):
        def on_predict_start(self, trainer, module) -> None:
            phases.end("load")

        def on_fit_start(self, trainer, module) -> None:
            phases.end("load to train")

        def on_train_end(self, trainer, module) -> None:
            phases.end("fit")
            trainer.save_checkpoint(f"{directory}/tuned.ckpt")
            phases.end("save")

    def trainer(**more) -> L.Trainer:
        strategy = ShardedStrategy(**options)
        return L.Trainer(strategy=strategy, callbacks=[Watch()], **shared, **more)

    module = MoELightningModule(checkpoint, task=Score())
    if verb == "predict":
        trainer().predict(module, DataLoader(["to be or not to be"] * 8, batch_size=4))
        phases.end("predict")
    else:
        rows = [{"input_ids": torch.arange(4, 68), "labels": torch.arange(4, 68)}] * 8
        trainer(max_steps=2).fit(module, DataLoader(rows, batch_size=2))
    pipe.send(phases.peaks_mb)
    os._exit(0)


def export(pipe, checkpoint: str, directory: str) -> None:
    """One process: export what the ranks saved, in files that are small beside the model."""
    import torch

    from moe_lightning import MoELightningModule
    from moe_lightning.modeling.sharded_export import export_sharded

    torch.set_num_threads(1)
    module = MoELightningModule(checkpoint)
    view, tokenizer = module.view, module.tokenizer
    source, target = Path(directory) / "tuned.ckpt", Path(directory) / "exported"
    phases = Phases()
    export_sharded(
        source, view, tokenizer, target, dtype=torch.float32, shard_bytes=FILE_MB * 10**6
    )
    phases.end("export")
    pipe.send(phases.peaks_mb)


def start(function, *arguments):
    """A process, and the pipe that its answer comes through."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=function, args=(theirs, *arguments), daemon=True).start()
    return ours


def main() -> None:
    """Measure, and print the table with its bounds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    options = parser.parse_args()
    from moe_lightning.demo.random_checkpoint import make_checkpoint

    results = {}
    for name, layout in LAYOUTS.items():
        with tempfile.TemporaryDirectory() as directory, socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
            checkpoint = make_checkpoint(
                Path(directory) / "model", hidden_size=options.hidden, num_layers=options.layers,
                num_experts=options.experts, expert_size=2 * options.hidden, num_heads=8,
                num_kv_heads=2,
            )  # fmt: skip
            probe.close()
            peaks = {}
            for verb in ("predict", "fit"):
                pipes = [
                    start(run_rank, rank, port, verb, str(checkpoint), layout, directory)
                    for rank in range(RANKS)
                ]
                answers = [pipe.recv() for pipe in pipes]
                peaks |= {phase: max(a[phase] for a in answers) for phase in answers[0]}
            peaks |= start(export, str(checkpoint), directory).recv()
            total = sum(f.stat().st_size for f in checkpoint.glob("*.safetensors")) / 1e6
            results[name] = (peaks, total)
    layer = total / options.layers  # the embedding is small beside it
    print(f"{total:.0f} MB of float32 weights in {options.layers} layers of {layer:.0f} MB\n")
    print("| ranks | phase | peak MB of a rank | bound MB | holds |\n|---|---|---|---|---|")
    for name, (peaks, total) in results.items():
        share = total / RANKS
        bounds = {
            "load": share + layer, "predict": share + layer, "load to train": share + layer,
            "fit": 4 * share + 2 * layer, "save": 3 * share + layer, "export": 2 * layer + FILE_MB,
        }  # fmt: skip
        for phase, peak in peaks.items():
            bound = bounds[phase] + CONSTANT_MB
            print(f"| {name} | {phase} | {peak:.0f} | {bound:.0f} | {peak <= bound} |")
    if options.out:
        options.out.write_text(json.dumps(results))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
