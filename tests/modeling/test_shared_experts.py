"""Shared experts are computed while rows are away, and the answer stays the family's."""

import pytest
import torch
from quiet_trainer import quiet_trainer
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from moe_lightning import Embed, MoELightningModule, PlacementStrategy
from moe_lightning.dispatch import PlacedDispatcher
from moe_lightning.modeling.seam import find_moe_layers
from moe_lightning.modeling.shared_experts import SharedExperts, find_shared_experts

PROMPTS = ["ab c", "ab c d ef g", "a"]


class Block(nn.Module):
    """Calls shared experts after its experts, as DeepSeek does, or before, as Qwen2-MoE does."""

    def __init__(self, *, before: bool) -> None:
        super().__init__()
        self.before = before
        self.shared_experts = nn.Linear(3, 3)
        self.calls: list[str] = []
        self.seam = SharedExperts(self, self.shared_experts)

    def forward(self, hidden_BSD):
        rows_TD = hidden_BSD.view(-1, 3)
        early = self.shared_experts(hidden_BSD) if self.before else None
        self.calls.append("rows leave")
        meanwhile = self.seam.ahead(rows_TD)
        if meanwhile is not None:
            self.calls.append("meanwhile")
            meanwhile()
        self.calls.append("rows are back")
        shared = self.shared_experts(hidden_BSD) if early is None else early
        return hidden_BSD + shared


@torch.no_grad()
def test_after_the_first_pass_they_are_computed_while_rows_are_away():
    block = Block(before=False)
    for _ in range(2):
        hidden_BSD = torch.randn(2, 4, 3)
        block.calls.clear()
        out_BSD = block(hidden_BSD)
        want = nn.functional.linear(
            hidden_BSD, block.shared_experts.weight, block.shared_experts.bias
        )
        torch.testing.assert_close(out_BSD, hidden_BSD + want)
    assert block.calls == ["rows leave", "meanwhile", "rows are back"]


def test_activation_checkpointing_repeats_the_first_pass_as_it_was():
    block = Block(before=False)
    hidden_BSD = torch.randn(2, 4, 3, requires_grad=True)
    checkpoint(block, hidden_BSD, use_reentrant=False).sum().backward()
    assert block.calls == 2 * ["rows leave", "rows are back"]


def test_a_block_that_computes_them_before_is_left_alone():
    block = Block(before=True)
    for _ in range(3):
        block(torch.randn(2, 4, 3))
    assert "meanwhile" not in block.calls


@torch.no_grad()
def test_an_answer_for_other_rows_is_not_used():
    block = Block(before=False)
    block(torch.randn(1, 2, 3))
    meanwhile = block.seam.ahead(torch.randn(2, 3))
    meanwhile()
    other_BSD = torch.randn(1, 2, 3)
    torch.testing.assert_close(
        block.shared_experts(other_BSD),
        nn.functional.linear(other_BSD, block.shared_experts.weight, block.shared_experts.bias),
    )


@pytest.mark.parametrize(
    ("family", "overlaps"), [("deepseek_v3", True), ("glm4_moe", True), ("qwen2_moe", False)]
)
def test_families_overlap_and_answer_as_transformers(
    family, overlaps, family_checkpoint, plain_transformers, monkeypatch, tmp_path
):
    used = []
    call = PlacedDispatcher.__call__

    def spy(self, hidden_TD, index_TK, weights_TK, meanwhile=None):
        used.append(meanwhile is not None)
        return call(self, hidden_TD, index_TK, weights_TK, meanwhile)

    monkeypatch.setattr(PlacedDispatcher, "__call__", spy)
    checkpoint = family_checkpoint(family)
    module = MoELightningModule(str(checkpoint), task=Embed())
    trainer = quiet_trainer(tmp_path, strategy=PlacementStrategy(["cpu", "cpu"]))
    batches = trainer.predict(module, DataLoader(PROMPTS, batch_size=1))
    assert find_shared_experts(find_moe_layers(module.model)[0].block) is not None
    num_layers = len(find_moe_layers(module.model))
    assert used == [False] * num_layers + [overlaps] * (2 * num_layers)
    plain = plain_transformers(checkpoint)
    for prompt, batch in zip(PROMPTS, batches, strict=True):
        want = plain.embedding(module.tokenizer(prompt)["input_ids"])
        torch.testing.assert_close(torch.tensor(batch[0]["embedding"]), want, atol=1e-5, rtol=1e-4)
