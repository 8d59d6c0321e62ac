"""Balancing by bias: updates by hand, ranks equal to one process, and what is not counted."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from transformers import AutoModelForCausalLM

from moe_lightning.collectives import RankGroup
from moe_lightning.errors import UsageError
from moe_lightning.finetune.balancing import BiasBalancing
from moe_lightning.finetune.losses import language_model_losses
from moe_lightning.finetune.router_watch import RouterPass, RouterWatch
from moe_lightning.modeling.seam import find_moe_layers

IDS = torch.randint(4, 320, (4, 9), generator=torch.Generator().manual_seed(1))


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train()


def biases(model):
    return {n: b.clone() for n, b in model.named_buffers() if n.endswith("correction_bias")}


def test_update_by_hand(family_checkpoint):
    """Expert 0 of 8 gets 5 rows, expert 3 gets 3, and the padding none; the mean is 1."""
    model = load(family_checkpoint("deepseek_v3"))
    before = biases(model)
    balancing = BiasBalancing(model, rate=0.5)
    for gate in (layer.router for layer in find_moe_layers(model)):
        # As moving a model to a device does: another tensor.
        gate.e_score_correction_bias = gate.e_score_correction_bias.clone()
    index_TK = torch.tensor([[0, 3], [0, 3], [0, 3], [0, 0], [6, 7]])
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    for layer in (1, 2):
        balancing.count([RouterPass(layer, torch.zeros(5, 8), index_TK)], mask)
    load_ratio = balancing.update(RankGroup())
    # Signs: -1 for 0 and 3, +1 for the six without rows; their mean is 0.5.
    step = 0.5 * (torch.tensor([-1.0, 1, 1, -1, 1, 1, 1, 1]) - 0.5)
    assert load_ratio == 5.0
    for name, bias in biases(model).items():
        torch.testing.assert_close(bias, before[name] + step, rtol=0, atol=1e-7)
    assert len(before) == 2
    # Nothing was counted since: an even load of zero moves nothing.
    after = biases(model)
    balancing.update(RankGroup())
    assert all(torch.equal(after[name], bias) for name, bias in biases(model).items())


def train(path, rows, num_steps, ranks, rate=0.01):
    """Steps of two micro-batches; an eval forward and activation checkpointing must not count."""
    model = load(path)
    model.activation_checkpointing_enable()
    watch, balancing = RouterWatch(model), BiasBalancing(model, rate=rate)
    ratios = []
    for _ in range(num_steps):
        for micro_batch in rows:
            batch = {"input_ids": IDS[micro_batch], "labels": IDS[micro_batch]}
            losses = language_model_losses(model, batch, ranks=ranks, routers=watch)
            losses.share.backward()
            balancing.count(losses.passes)
            with torch.no_grad():
                language_model_losses(model.eval(), batch, ranks=ranks)
            model.train()
        ratios.append(balancing.update(ranks))
        model.zero_grad()
    return biases(model), ratios


def train_rank(path, rows_of_rank):
    return train(path, rows_of_rank[dist.get_rank()], 3, RankGroup(dist.group.WORLD))


def by_hand(path, num_steps, rate=0.01):
    """The same over transformers' own routers, all rows at once."""
    model = load(path)
    seen = {}
    for name, module in model.named_modules():
        if name.endswith(".gate"):
            module.register_forward_hook(lambda m, a, out, name=name: seen.update({name: out[2]}))
    for _ in range(num_steps):
        with torch.no_grad():
            model(IDS, use_cache=False)
        for name, index_TK in seen.items():
            counts = [int((index_TK == expert).sum()) for expert in range(8)]
            mean = sum(counts) / 8
            signs = [(mean > count) - (mean < count) for count in counts]
            step = [rate * (sign - sum(signs) / 8) for sign in signs]
            model.get_submodule(name).e_score_correction_bias += torch.tensor(step)
    return biases(model)


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_ranks_count_together_and_only_training_forwards(family_checkpoint, family):
    path = family_checkpoint(family)
    wanted = by_hand(path, 3)
    one, ratios = train(path, [[0, 1], [2, 3]], 3, RankGroup())
    torch.testing.assert_close(one, wanted, rtol=0, atol=1e-7)  # rounding of the sums
    for found, found_ratios in run_on_ranks(2, train_rank, path, [[[0], [3]], [[2], [1]]]):
        torch.testing.assert_close(found, one, rtol=0, atol=0)
        assert found_ratios == ratios


def test_bias_is_saved_with_the_model(family_checkpoint, tmp_path):
    model = load(family_checkpoint("deepseek_v3"))
    for _, bias in model.named_buffers():
        bias += 1
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(biases(load(tmp_path)), biases(model), rtol=0, atol=0)
    assert biases(model).keys() <= model.state_dict().keys()


def test_family_without_a_bias_and_a_bad_rate(family_checkpoint):
    model = load(family_checkpoint("mixtral"))
    with pytest.raises(UsageError, match=r"MixtralTopKRouter of MixtralForCausalLM has no buffer"):
        BiasBalancing(model, rate=0.001)
    with pytest.raises(UsageError, match="bias_update_rate is -1"):
        BiasBalancing(model, rate=-1)
