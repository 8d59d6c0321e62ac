"""Plain transformers, without Lightning, with this package's exchange of rows."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from moe_lightning.errors import CheckpointError
from moe_lightning.modeling import ep_plugin

EXACT = {"rtol": 1e-5, "atol": 1e-5}  # float32; sums over ranks are in another order


def batch(rank):
    """Ids of a rank's batch; batches are of different lengths."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(4, 320, (1 + rank % 2, 3 + rank), generator=generator)


def loss_of(logits):
    return (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum()


def from_plain_transformers(path, settings, is_uneven, experts_implementation):
    """Logits of this rank's batch, and the whole gradients of all parameters."""
    config = DistributedConfig(ep_implementation=ep_plugin.EP_IMPLEMENTATION, **settings)
    if is_uneven:
        config.ep_plan = ep_plugin.uneven_ep_plan(AutoConfig.from_pretrained(path))
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        distributed_config=config,
        experts_implementation=experts_implementation,
    )
    data_rank = dist.get_rank() // config.tp_size
    logits = model(batch(data_rank), use_cache=False).logits
    loss_of(logits).backward()
    counts = [m.num_experts for m in model.modules() if hasattr(m, "_is_expert_parallel")]
    grads = {name: whole(p.grad) for name, p in model.named_parameters()}
    return logits.detach(), counts, grads


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def check(path, num_ranks, settings, *, counts, is_uneven=False, implementation="grouped_mm"):
    results = run_on_ranks(
        num_ranks, from_plain_transformers, path, settings, is_uneven, implementation
    )
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, experts_implementation="eager"
    )
    tp_size = settings.get("tp_size", 1)
    num_data_ranks = num_ranks // tp_size
    for rank in range(num_data_ranks):
        logits = model(batch(rank), use_cache=False).logits
        (loss_of(logits) / num_data_ranks).backward()
        for same in range(tp_size):
            torch.testing.assert_close(results[rank * tp_size + same][0], logits.detach(), **EXACT)
    assert [set(result[1]) for result in results] == [{count} for count in counts]
    for _, _, grads in results:
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(grads[name], parameter.grad, msg=name, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_two_ranks(family_checkpoint, implementation):
    settings = {"fsdp_size": 2, "ep_size": 2}
    path = family_checkpoint("qwen3_moe")
    check(path, 2, settings, counts=[4, 4], implementation=implementation)


def test_seven_experts_on_four_ranks(family_checkpoint):
    path = family_checkpoint("qwen3_moe", num_experts=7)
    check(path, 4, {"fsdp_size": 4, "ep_size": 4}, counts=[2, 2, 2, 1], is_uneven=True)


def test_no_rank_may_be_without_experts(family_checkpoint):
    path = family_checkpoint("qwen3_moe", num_experts=6)
    for message in run_on_ranks(4, _refused, path):
        assert message.startswith("6 experts in equal slices leave none for the last of 4 ranks")


def _refused(path):
    with pytest.raises(CheckpointError) as caught:
        from_plain_transformers(path, {"fsdp_size": 4, "ep_size": 4}, True, "grouped_mm")
    return str(caught.value)


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_three_experts_a_rank_and_two_copies(family_checkpoint, family):
    """efsdp 2: each expert's parameters are shared by two ranks."""
    path = family_checkpoint(family, num_experts=5)
    check(path, 4, {"fsdp_size": 4, "ep_size": 2}, counts=[3, 2, 3, 2], is_uneven=True)


def test_tensor_parallel_ranks_share_their_rows(family_checkpoint):
    settings = {"fsdp_size": 2, "tp_size": 2, "ep_size": 4}
    check(family_checkpoint("qwen3_moe"), 4, settings, counts=[2, 2, 2, 2])


def test_slices_of_all_experts():
    def slices(num_experts, num_slots):
        return [
            list(ep_plugin.slice_of(num_experts, slot=slot, num_slots=num_slots))
            for slot in range(num_slots)
        ]

    assert slices(4, 2) == [[0, 1], [2, 3]]
    assert slices(6, 4) == [[0, 1], [2, 3], [4, 5], []]
    assert slices(5, 4) == [[0, 1], [2, 3], [4], []]
    assert slices(2, 4) == [[0], [1], [], []]
