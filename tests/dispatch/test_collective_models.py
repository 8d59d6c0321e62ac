"""Whole models over ranks through the seam, without a strategy: dense layers are on every rank."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from sampling import sampled
from transformers import AutoModelForCausalLM

from moe_lightning.dispatch import CollectiveDispatcher, RoutingLog
from moe_lightning.experts import ExpertShard
from moe_lightning.modeling.checkpoint import open_checkpoint
from moe_lightning.modeling.loading import build_on_meta, load_model
from moe_lightning.modeling.seam import attach, find_moe_layers

# float32; sums over ranks are in another order. Gradients go up to 10.
EXACT = {"rtol": 1e-4, "atol": 1e-4}
SIX_ON_FOUR = {0: [5, 0], 1: [2], 2: [], 3: [1, 4, 3, 0]}


def batch(rank):
    """A batch of its own length for each rank; all of rank 1's rows are padding."""
    generator = torch.Generator().manual_seed(rank)
    ids_BS = torch.randint(4, 320, (2, 4 + rank), generator=generator)
    mask_BS = torch.ones_like(ids_BS) if rank != 1 else torch.zeros_like(ids_BS)
    return ids_BS, mask_BS


def loss_of(logits, mask_BS):
    factors = torch.linspace(-1, 1, logits.numel()).view_as(logits)
    return (logits * factors * mask_BS[..., None]).sum()


def train_a_step(path, is_checkpointed):
    """Logits of this rank's batch, and the gradients of this rank's parameters."""
    ids = SIX_ON_FOUR[dist.get_rank()]
    shards = {}

    def on_layer(layer):
        shards[layer.layer] = ExpertShard(
            layer.experts, layer=layer.layer, expert_ids=ids, backend="grouped_mm"
        )

    with open_checkpoint(path) as view:
        moe_layers = [layer.layer for layer in find_moe_layers(build_on_meta(view.config))]
        model = load_model(
            view,
            device=torch.device("cpu"),
            dtype=torch.float32,
            experts=dict.fromkeys(moe_layers, ids),
            on_layer=on_layer,
            show_progress=False,
        )
    padding = attach(
        model,
        lambda layer: CollectiveDispatcher(
            shards[layer.layer],
            num_experts=6,
            experts_of_slot=SIX_ON_FOUR,
            group=dist.group.WORLD,
            log=RoutingLog(),
        ),
    )
    model.requires_grad_(True)
    if is_checkpointed:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids_BS, mask_BS = batch(dist.get_rank())
    with padding.over(mask_BS):
        logits = model(ids_BS, use_cache=False).logits
        loss_of(logits, mask_BS).backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("family", sampled(["qwen2_moe", "deepseek_v3", "gpt_oss"], "deepseek_v3"))
def test_training_step_of_six_experts_on_four_ranks(family, is_checkpointed, family_checkpoint):
    """Shared experts before and after the routed ones, and biases; rank 2 has no experts."""
    path = family_checkpoint(family, num_experts=6)
    results = run_on_ranks(4, train_a_step, path, is_checkpointed)
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, experts_implementation="eager"
    )
    expected = {}
    for rank in (0, 2, 3):
        ids_BS, mask_BS = batch(rank)
        logits = model(ids_BS, use_cache=False).logits
        torch.testing.assert_close(results[rank][0], logits.detach(), **EXACT)
        model.zero_grad()
        loss_of(logits, mask_BS).backward()
        for name, parameter in model.named_parameters():
            grad = results[rank][1][name]
            if ".experts." in name:
                expected[name] = expected.get(name, 0) + parameter.grad
            elif parameter.grad is not None:
                torch.testing.assert_close(
                    grad, parameter.grad, msg=lambda m, name=name: f"{name}: {m}", **EXACT
                )
    for name, whole in expected.items():
        total = torch.zeros_like(whole)
        for rank, ids in SIX_ON_FOUR.items():
            total.index_add_(0, torch.tensor(ids, dtype=torch.int64), results[rank][1][name])
        torch.testing.assert_close(total, whole, msg=lambda m, name=name: f"{name}: {m}", **EXACT)
    assert expected, "no experts were compared"
