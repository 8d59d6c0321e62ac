"""Models over ranks: this package against the shortest Lightning script over transformers.

    python scripts/bench_sharded.py --out result.json

Every contestant has two processes of its own that stay; they take turns, round by round, on the
same rows. A time is that of rank 0, which waits for the other. The baseline is
``scripts/baseline_lightning.py``: batches of a fixed number of rows in input order. "Ours" plans
batches of similar length from the same rows, as the command line does; "same batches" gets the
baseline's.
"""

import argparse
import json
import os
import platform
import resource
import socket
import statistics
import sys
import tempfile
import time
import traceback
from multiprocessing import get_context
from pathlib import Path

RANKS = 2
BATCH_ROWS, TRAIN_ROWS, TRAIN_TOKENS, TRAIN_STEPS = 16, 4, 128, 4
SHARED = {"accelerator": "cpu", "devices": RANKS, "logger": False, "enable_checkpointing": False}
SHARED |= {"enable_progress_bar": False, "enable_model_summary": False}
CONTESTANTS = {
    "fsdp: baseline": ("baseline", {"fsdp_size": RANKS}),
    "fsdp: ours": ("ours", {}),
    "fsdp: ours, same batches": ("same", {}),
    "ep: baseline": ("baseline", {"fsdp_size": RANKS, "ep_size": RANKS}),
    "ep: ours": ("ours", {"ep_size": RANKS}),
    "ep: ours, same batches": ("same", {"ep_size": RANKS}),
    "ep: ours, 2 chunks": ("ours", {"ep_size": RANKS, "overlap_chunks": 2}),
    "ddp": ("ddp", {}),
}
AGAINST = {"fsdp": "fsdp: baseline", "ep": "ep: baseline"}


class Contestant:
    """One of them, in a process of each rank."""

    def __init__(self, name: str, checkpoint: str, rows: int, new_tokens: int) -> None:
        import torch

        self.kind, self.options = CONTESTANTS[name]
        self.checkpoint, self.new_tokens = checkpoint, new_tokens
        generator = torch.Generator().manual_seed(0)
        lengths = torch.empty(rows).log_normal_(3.4, 0.6, generator=generator).clamp(4, 160).int()
        words = ["to", "be", "or", "not", "the", "king", "is", "here", "my", "lord"]
        self.prompts = [
            " ".join(words[int(i)] for i in torch.randint(10, (n,), generator=generator))
            for n in lengths.tolist()
        ]
        self.made: dict[str, object] = {}

    def trainer(self, **options):
        import lightning as L
        from baseline_lightning import OnRanks

        from moe_lightning import ShardedStrategy

        strategies = {
            "ours": lambda: ShardedStrategy(**self.options),
            "same": lambda: ShardedStrategy(**self.options),
            "baseline": lambda: OnRanks(RANKS),
            "ddp": lambda: "ddp",
        }
        return L.Trainer(strategy=strategies[self.kind](), **SHARED, **options)

    def module(self, task: str):
        if task in self.made:
            return self.made[task]
        if self.kind == "baseline":
            from baseline_lightning import Baseline

            module = Baseline(
                self.checkpoint, task=task, max_new_tokens=self.new_tokens, **self.options
            )
        else:
            import torch

            from moe_lightning import Generate, MoELightningModule, Score
            from moe_lightning.finetune.fine_tuning import RouterBalance

            generate = Generate(max_new_tokens=self.new_tokens, ignore_eos=True)
            module = MoELightningModule(
                self.checkpoint,
                task=generate if task == "generate" else Score(),
                optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-4),
                router_balance=RouterBalance(aux_loss_weight=0.0),  # the baseline has none
                batch_budget_tokens=100_000,
            )
        self.made[task] = module
        return module

    def predict(self, task: str) -> dict:
        """Answer all prompts; seconds, and the scores of this rank's rows."""
        import lightning as L
        from torch.utils.data import DataLoader

        if self.kind in ("baseline", "same"):
            data = {"dataloaders": DataLoader(self.prompts, batch_size=BATCH_ROWS)}
        else:
            from moe_lightning import PromptData

            with tempfile.NamedTemporaryFile("w", suffix=".jsonl", delete=False) as file:
                for number, prompt in enumerate(self.prompts):
                    file.write(json.dumps({"id": number, "prompt": prompt}) + "\n")
            data = {"datamodule": PromptData(file.name, max_batch_tokens=4096)}
        trainer, module = self.trainer(), self.module(task)
        assert isinstance(module, L.LightningModule)
        started = time.perf_counter()
        batches = trainer.predict(module, **data)
        elapsed_s = time.perf_counter() - started
        scores = []
        if task == "score":
            rows = [row for batch in batches for row in batch]
            scores = [row["logprob"] if isinstance(row, dict) else row for row in rows]
        return {"seconds": elapsed_s, "scores": scores, "peak_mb": peak_mb()}

    def fit(self) -> dict:
        """A few steps; median seconds of a step after the first."""
        import lightning as L
        import torch
        from torch.utils.data import DataLoader

        class Clock(L.Callback):
            def __init__(self) -> None:
                self.at_s, self.losses = [], []

            def on_train_batch_end(self, trainer, module, outputs, *_) -> None:
                self.at_s.append(time.perf_counter())
                self.losses.append(float(outputs["loss"]))

        generator = torch.Generator().manual_seed(1)
        count = TRAIN_STEPS * TRAIN_ROWS * RANKS
        rows = torch.randint(4, 2000, (count, TRAIN_TOKENS), generator=generator)
        data = [{"input_ids": row, "labels": row} for row in rows]
        clock = Clock()
        trainer = self.trainer(max_steps=TRAIN_STEPS, callbacks=[clock])
        trainer.fit(self.module("fit"), DataLoader(data, batch_size=TRAIN_ROWS))
        steps = [b - a for a, b in zip(clock.at_s, clock.at_s[1:], strict=False)]
        return {"seconds": statistics.median(steps), "losses": clock.losses, "peak_mb": peak_mb()}


def peak_mb() -> float:
    """Most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def serve(pipe, rank: int, port: int, name: str, arguments: tuple) -> None:
    """A process of a contestant: answers what it is asked until the pipe closes."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0", WORLD_SIZE=str(RANKS),
        LOCAL_WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID=f"bench-{port}", OMP_NUM_THREADS="1",
    )  # fmt: skip
    import logging
    import warnings

    import torch

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    contestant = Contestant(name, *arguments)
    while True:
        try:
            what = pipe.recv()
        except EOFError:
            os._exit(0)  # the groups of ranks that are idle need no farewell
        try:
            answer = contestant.fit() if what == "fit" else contestant.predict(what)
        except BaseException:
            answer = {"error": traceback.format_exc()}
        pipe.send(answer)


def start(name: str, arguments: tuple) -> list:
    """Start a contestant's processes; the pipes to them."""
    context = get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes = []
    for rank in range(RANKS):
        ours, theirs = context.Pipe()
        context.Process(
            target=serve, args=(theirs, rank, port, name, arguments), daemon=True
        ).start()
        theirs.close()
        pipes.append(ours)
    return pipes


def ask(pipes: list, what: str) -> dict:
    """What rank 0 says of a turn; scores are those of all ranks."""
    for pipe in pipes:
        pipe.send(what)
    answers = [pipe.recv() for pipe in pipes]
    for answer in answers:
        if "error" in answer:
            raise SystemExit(answer["error"])
    answers[0]["scores"] = sorted(s for answer in answers for s in answer.get("scores", []))
    answers[0]["peak_mb"] = max(answer["peak_mb"] for answer in answers)
    losses = zip(*(answer.get("losses", []) for answer in answers), strict=True)
    answers[0]["losses"] = [statistics.mean(of_ranks) for of_ranks in losses]
    return answers[0]


def main() -> None:
    """Run all contestants in turns, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=64, help="a multiple of 32")
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--only", nargs="*", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--tasks", nargs="*", default=["score", "generate", "fit"])
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    options = parser.parse_args()
    from moe_lightning.demo.random_checkpoint import make_checkpoint

    with tempfile.TemporaryDirectory() as directory:
        checkpoint = make_checkpoint(
            Path(directory) / "model", hidden_size=options.hidden, num_layers=options.layers,
            num_experts=options.experts, expert_size=2 * options.hidden, num_heads=8,
            top_k=4, num_kv_heads=2,
        )  # fmt: skip
        size_mb = sum(f.stat().st_size for f in checkpoint.glob("*.safetensors")) / 1e6
        arguments = (str(checkpoint), options.rows, options.new_tokens)
        results = run(options, arguments)
    import torch
    import transformers

    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    machine += f", torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"\n{machine}; {RANKS} ranks of one thread; random Qwen3-MoE, {size_mb:.0f} MB\n")
    print(markdown(results))
    if options.out:
        options.out.write_text(json.dumps({"size_mb": size_mb, "results": results}, indent=1))


def run(options: argparse.Namespace, arguments: tuple) -> dict:
    """Seconds of every turn, by task and contestant, after one turn to warm up."""
    results: dict = {}
    for task in options.tasks:
        names = [n for n in options.only if runs(n, task)]
        teams = {name: start(name, arguments) for name in names}
        results[task] = {name: {"seconds": [], "peak_mb": 0.0} for name in names}
        for turn in range(options.rounds + 1):
            for name in names:
                answer = ask(teams[name], task)
                found = results[task][name]
                found["peak_mb"] = answer["peak_mb"]
                if turn == 0:
                    found["scores"], found["losses"] = answer["scores"], answer.get("losses", [])
                else:
                    found["seconds"].append(answer["seconds"])
                print(f"{task} {turn} {name}: {answer['seconds']:.2f} s", file=sys.stderr)
        for pipes in teams.values():
            for pipe in pipes:
                pipe.close()
        compare(results[task])
    return results


def runs(name: str, task: str) -> bool:
    """Batches are only ours to choose in predict; ddp's decoding is that of one device."""
    return not (("same" in name and task == "fit") or (name == "ddp" and task == "generate"))


def compare(found: dict) -> None:
    """All contestants must give the same scores, and the same losses in every step."""
    base, *others = found.values()
    for other in others:
        pairs = list(zip(base["scores"], other["scores"], strict=True))
        pairs += zip(base["losses"], other["losses"], strict=True)
        other["largest_difference"] = max((abs(a - b) for a, b in pairs), default=0.0)
        assert other["largest_difference"] < 1e-2, "other scores or losses than the baseline's"


def markdown(results: dict) -> str:
    """The table."""
    lines = ["| task | contestant | seconds, median | spread | x baseline | peak MB a rank |"]
    lines.append("|---|---|---|---|---|---|")
    for task, found in results.items():
        for name, result in found.items():
            median = statistics.median(result["seconds"])
            base = found.get(AGAINST.get(name.partition(":")[0], "fsdp: baseline"))
            ratio = statistics.median(base["seconds"]) / median if base else float("nan")
            spread = f"{min(result['seconds']):.2f}-{max(result['seconds']):.2f}"
            cells = (
                task,
                name,
                f"{median:.2f}",
                spread,
                f"{ratio:.2f}",
                f"{result['peak_mb']:.0f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
