"""What one would write without this package: Lightning over transformers' own distribution.

    torchrun --nproc-per-node 2 scripts/baseline_lightning.py --checkpoint DIR --fsdp 2 [--ep 2]

Scores the demo prompts and prints one line a rank. ``scripts/bench_sharded.py`` measures this
module against MoELightningModule; it is kept as short as it can be, without being wrong.
"""

import argparse

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig


class Baseline(L.LightningModule):
    """A checkpoint that transformers shares out over the ranks.

    Args:
        checkpoint: A Hugging Face directory.
        task: ``score`` or ``generate``.
        max_new_tokens: For ``generate``.
        sizes: Of the mesh, as transformers' DistributedConfig names them.
    """

    def __init__(
        self,
        checkpoint: str,
        *,
        task: str = "score",
        max_new_tokens: int = 16,
        **sizes: int,
    ) -> None:
        super().__init__()
        self.checkpoint, self.task, self.sizes = checkpoint, task, sizes
        self.max_new_tokens = max_new_tokens
        self.model = None
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.tokenizer.padding_side = "left" if task == "generate" else "right"

    def configure_model(self) -> None:
        if self.model is None:
            self.model = AutoModelForCausalLM.from_pretrained(
                self.checkpoint,
                dtype=torch.float32,
                distributed_config=DistributedConfig(**self.sizes),
            )

    def predict_step(self, prompts: list[str], batch_idx: int) -> list[object]:
        batch = self.tokenizer(prompts, return_tensors="pt", padding=True).to(self.device)
        if self.task == "generate":
            length = {"max_new_tokens": self.max_new_tokens, "min_new_tokens": self.max_new_tokens}
            out = self.model.generate(**batch, **length, do_sample=False, synced_gpus=True)
            return [row.tolist() for row in out[:, batch["input_ids"].shape[1] :]]
        logits = self.model(**batch, use_cache=False).logits[:, :-1].float()
        target = batch["input_ids"][:, 1:]
        found = logits.gather(2, target[..., None]).squeeze(2) - logits.logsumexp(2)
        return (found * batch["attention_mask"][:, 1:]).sum(1).tolist()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch, use_cache=False).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class OnRanks(ModelParallelStrategy):
    """Lets transformers make the mesh."""

    def __init__(self, num_ranks: int) -> None:
        super().__init__(data_parallel_size=num_ranks, tensor_parallel_size=1)


def main() -> None:
    """Score the demo's prompts."""
    from moe_lightning.data.readers import open_source
    from moe_lightning.demo import prompts_path

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--fsdp", type=int, default=2)
    parser.add_argument("--ep", type=int, default=1)
    options = parser.parse_args()
    prompts = [record.prompt or "" for record in open_source(str(prompts_path())).scan()]
    module = Baseline(options.checkpoint, fsdp_size=options.fsdp, ep_size=options.ep)
    trainer = L.Trainer(
        accelerator="auto",
        devices=options.fsdp,
        strategy=OnRanks(options.fsdp),
        logger=False,
        enable_checkpointing=False,
    )
    # As many batches on each rank: others hang.
    even = prompts[: len(prompts) // (8 * options.fsdp) * 8 * options.fsdp]
    loader = torch.utils.data.DataLoader(even, batch_size=8)
    answers = trainer.predict(module, loader)
    print(f"rank {trainer.global_rank}: {sum(map(len, answers))} rows")


if __name__ == "__main__":
    main()
