"""Which parameters train, and that the experts that were not chosen never change."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from moe_lightning.errors import UsageError
from moe_lightning.finetune.kept_rows import KeptRows
from moe_lightning.finetune.trainable import Trainable, choose_experts, freeze_others
from moe_lightning.modeling.expert_rows import expert_rows
from moe_lightning.modeling.seam import find_moe_layers

EIGHT = {1: 8, 2: 8}
IDS = torch.randint(4, 320, (2, 9), generator=torch.Generator().manual_seed(1))


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train()


@pytest.mark.parametrize(
    ("choices", "chosen"),
    [
        (["1:3"], {1: (3,)}),
        (["2:0-2,7", "2:1"], {2: (0, 1, 2, 7)}),
        (["2:*", "1: 0 , 2"], {1: (0, 2), 2: tuple(range(8))}),
        (["*:5"], {1: (5,), 2: (5,)}),
        (["1-2:0-1"], {1: (0, 1), 2: (0, 1)}),
    ],
)
def test_choices(choices, chosen):
    assert choose_experts(choices, EIGHT) == chosen


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (["3"], "'3', which is not LAYER:EXPERTS"),
        (["1:-2"], "which is not LAYER:EXPERTS"),
        (["0:1"], "layer 0 has no experts; the layers with experts are 1, 2"),
        (["1:0-8"], "layer 1 has the experts 0 to 7"),
        (["1:5-3"], "range 5-3 runs backwards"),
        ([], "train_experts is empty"),
    ],
)
def test_bad_choices(choices, message):
    with pytest.raises(UsageError, match=message):
        choose_experts(choices, EIGHT)


def trained_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_what_is_frozen(family_checkpoint):
    path = family_checkpoint("deepseek_v3")
    everything = trained_names(load(path))
    routers = {f"model.layers.{n}.mlp.gate.weight" for n in (1, 2)}
    experts = {f"model.layers.{n}.mlp.experts.{p}" for n in (1, 2) for p in EXPERTS}
    cases = [
        (Trainable(), everything, None),
        (Trainable(freeze_router=True), everything - routers, None),
        (Trainable(train_dense=False), experts, None),
        (Trainable(train_experts=["2:1"]), {n for n in experts if ".2." in n}, {2: (1,)}),
        (
            Trainable(freeze_router=True, train_experts=["2:1"], train_dense=True),
            everything - routers - {n for n in experts if ".1." in n},
            {2: (1,)},
        ),
    ]
    for trainable, names, chosen in cases:
        model = load(path)
        assert freeze_others(model, trainable, EIGHT) == chosen
        assert trained_names(model) == names
    # What an adapter froze stays frozen, and nothing left is an error.
    model = load(path)
    model.requires_grad_(False)
    with pytest.raises(UsageError, match="No parameter is left to train"):
        freeze_others(model, Trainable(train_experts=["1:*"]), EIGHT)
    assert trained_names(model) == set()


EXPERTS = ("gate_up_proj", "down_proj")
OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05, eps=1e-3, weight_decay=0.3),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, weight_decay=0.3),
}


def train(path, name, shards):
    """Three steps; returns the experts' parameters of layer 2 before and after."""
    model = load(path)
    chosen = freeze_others(model, Trainable(train_experts=["2:1,6"]), EIGHT)
    if shards:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in find_moe_layers(model):
            fully_shard(layer.experts, mesh=mesh)
        fully_shard(model, mesh=mesh)
    layers = find_moe_layers(model)
    kept = KeptRows.of(layers, expert_rows(layers, EIGHT), chosen)
    optimizer = OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad])
    optimizer.register_step_post_hook(kept.restore)
    for _ in range(3):
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        kept.hold()
        optimizer.step()
        optimizer.zero_grad()
    whole = {n: p for n, p in model.named_parameters()}
    if shards:
        whole = {n: p.full_tensor() for n, p in whole.items()}
    return {n: p.detach() for n, p in whole.items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_experts_that_were_not_chosen_stay_bitwise_the_same(family_checkpoint, name):
    path = family_checkpoint("deepseek_v3")
    before = {n: p.detach() for n, p in load(path).named_parameters()}
    after = train(path, name, shards=False)
    check(before, after)
    # On three ranks a shard has three rows at most, and the chosen ones are on two of them.
    for found in run_on_ranks(3, train, path, name, True):
        check(before, found)
        torch.testing.assert_close(found, after, rtol=1e-4, atol=1e-5)


def check(before, after):
    for name, value in before.items():
        if name.endswith(tuple(f"layers.2.mlp.experts.{p}" for p in EXPERTS)):
            moved = [e for e in range(8) if not torch.equal(after[name][e], value[e])]
            assert moved == [1, 6], name
        else:
            assert torch.equal(after[name], value), name


def test_gradients_of_kept_rows_count_for_no_norm():
    parameter = torch.nn.Parameter(torch.ones(3, 2))
    parameter.grad = torch.ones(3, 2)
    kept = KeptRows([(parameter, torch.tensor([0, 2]))])
    kept.hold()
    assert parameter.grad.tolist() == [[0, 0], [1, 1], [0, 0]]
    with torch.no_grad():
        parameter.mul_(2)
    kept.restore()
    assert parameter.tolist() == [[1, 1], [2, 2], [1, 1]]
    with torch.no_grad():
        parameter.mul_(2)
    kept.restore()  # nothing is held
    assert parameter.tolist() == [[2, 2], [4, 4], [2, 2]]
