"""Losses of several ranks' rows against transformers' own losses of all rows in one process."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from torch import nn
from transformers import AutoModelForCausalLM

from moe_lightning.collectives import RankGroup
from moe_lightning.errors import UsageError
from moe_lightning.finetune.losses import aux_loss_weight_of, language_model_losses
from moe_lightning.finetune.router_watch import RouterWatch

WITH_AUX = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe")
SAME = {"rtol": 1e-5, "atol": 1e-6}  # float32 sums in another order


def load(path):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.train()


def make_batch(num_rows=4, *, padded=True):
    """Rows of different lengths; the last one has no targets."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(4, 320, (num_rows, 10), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(num_rows):
        mask[row, 10 - 2 * row :] = 0 if row else 1
    if not padded:
        mask[:] = 1
    labels = ids.masked_fill(mask == 0, -100)
    labels[-1] = -100
    batch = {"input_ids": ids, "labels": labels}
    return batch | {"attention_mask": mask} if padded else batch


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("family", WITH_AUX)
def test_one_process_has_the_losses_of_transformers(family_checkpoint, family, padded):
    path, batch = family_checkpoint(family), make_batch(padded=padded)
    plain = load(path)
    output = plain(**batch, output_router_logits=True, use_cache=False)
    # transformers adds the auxiliary loss with the config's own weight.
    aux_weight = plain.router_aux_loss_coef
    output.loss.backward()

    ours = load(path)
    losses = language_model_losses(
        ours, batch, ranks=RankGroup(), routers=RouterWatch(ours), aux_loss_weight=aux_weight
    )
    losses.share.backward()
    assert aux_loss_weight_of(ours, None) == aux_weight != 0
    torch.testing.assert_close(losses.aux, output.aux_loss.detach(), **SAME)
    torch.testing.assert_close(losses.share, output.loss, **SAME)
    wanted = output.loss - aux_weight * output.aux_loss
    torch.testing.assert_close(losses.next_token, wanted.detach(), **SAME)
    torch.testing.assert_close(gradients(ours), gradients(plain), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_z_loss_is_the_mean_of_the_squared_logsumexp(family_checkpoint, family):
    path, batch = family_checkpoint(family), make_batch()
    model = load(path)
    seen = []
    for module in model.modules():
        if type(module).__name__.endswith(("TopKRouter", "TopkRouter")):
            module.register_forward_hook(lambda m, a, out: seen.append(out[0].detach()))
    losses = language_model_losses(
        model, batch, ranks=RankGroup(), routers=RouterWatch(model), z_loss_weight=0.5
    )
    real = batch["attention_mask"].flatten() == 1
    wanted = torch.stack([torch.logsumexp(s[real].double(), 1) ** 2 for s in seen]).mean()
    assert len(seen) == (3 if family == "mixtral" else 2)
    torch.testing.assert_close(losses.z.double(), wanted, **SAME)
    torch.testing.assert_close(losses.share, losses.next_token + 0.5 * losses.z, **SAME)
    assert losses.aux is None


def ranks_losses(path, rows_of_rank, weights):
    """What each rank computes: values, and gradients averaged over the ranks."""
    rank, size = dist.get_rank(), dist.get_world_size()
    rows = rows_of_rank[rank]
    batch = {name: values[rows] for name, values in make_batch().items()}
    model = load(path)
    watch = RouterWatch(model) if any(weights) else None
    losses = language_model_losses(
        model,
        batch,
        ranks=RankGroup(dist.group.WORLD),
        routers=watch,
        aux_loss_weight=weights[0],
        z_loss_weight=weights[1],
    )
    losses.share.backward()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(parameter.grad)
        parameter.grad /= size
    values = [losses.next_token, losses.num_targets, losses.aux, losses.z]
    return values, gradients(model)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("has_weights", [True, False])
def test_two_ranks_have_the_losses_and_gradients_of_one(family_checkpoint, family, has_weights):
    """Rank 0 has three rows of very unequal length, rank 1 the row without targets."""
    path = family_checkpoint(family)
    weights = (0.0 if family == "deepseek_v3" else 0.3, 0.1) if has_weights else (0.0, 0.0)
    model, batch = load(path), make_batch()
    watch = RouterWatch(model) if has_weights else None
    one = language_model_losses(
        model,
        batch,
        ranks=RankGroup(),
        routers=watch,
        aux_loss_weight=weights[0],
        z_loss_weight=weights[1],
    )
    one.share.backward()
    wanted = [one.next_token, one.num_targets, one.aux, one.z]
    plain = load(path)
    torch.testing.assert_close(one.next_token, plain(**batch).loss.detach(), **SAME)
    for rows in ([[0, 1, 2], [3]], [[1, 3], [0, 2]]):
        for values, grads in run_on_ranks(2, ranks_losses, path, rows, weights):
            torch.testing.assert_close(values, wanted, **SAME)
            for name, grad in gradients(model).items():
                torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-6)


def test_no_targets_at_all_give_zero_and_zero_gradients(family_checkpoint):
    model, batch = load(family_checkpoint("mixtral")), make_batch()
    batch["labels"][:] = -100
    losses = language_model_losses(model, batch, ranks=RankGroup())
    losses.share.backward()
    assert (
        float(losses.share.detach()) == float(losses.next_token) == float(losses.num_targets) == 0
    )
    assert all(not grad.any() for grad in gradients(model).values())


def test_weight_of_a_family_without_the_loss(family_checkpoint):
    model = load(family_checkpoint("deepseek_v3"))
    assert aux_loss_weight_of(model, None) == aux_loss_weight_of(model, 0.0) == 0
    with pytest.raises(UsageError, match="family deepseek_v3 has no load-balancing loss"):
        aux_loss_weight_of(model, 0.01)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_activation_checkpointing_changes_no_loss_and_no_gradient(family_checkpoint, family):
    path, batch = family_checkpoint(family), make_batch()
    weight = 0.0 if family == "deepseek_v3" else 0.3
    results = []
    for is_on in (False, True):
        model = load(path)
        if is_on:
            model.activation_checkpointing_enable(
                activation_checkpointing_kwargs={"use_reentrant": False}
            )
        watch = RouterWatch(model)
        num_forwards = count_forwards(model)
        losses = language_model_losses(
            model,
            batch,
            ranks=RankGroup(),
            routers=watch,
            aux_loss_weight=weight,
            z_loss_weight=0.1,
        )
        losses.share.backward()
        num_routers = 2 if family == "deepseek_v3" else 3
        assert len(losses.passes) == num_routers
        # Else the test would say nothing: layers do run again.
        assert len(num_forwards) == (2 if is_on else 1) * num_routers
        results.append((losses.share.detach(), gradients(model)))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def count_forwards(model: nn.Module) -> list[None]:
    seen: list[None] = []
    for module in model.modules():
        if type(module).__name__.endswith("Experts"):
            module.register_forward_pre_hook(lambda *_: seen.append(None))
    return seen
