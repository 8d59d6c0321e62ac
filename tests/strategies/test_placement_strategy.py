"""Every family, placed over CPU slots in every way, against unmodified transformers."""

import pytest
import torch

from moe_lightning import MoELightningModule
from moe_lightning.callbacks import RoutingBalance
from moe_lightning.placement import ExpertPlacement, load_loads
from moe_lightning.strategies import PlacementStrategy
from moe_lightning.tasks import Embed, Generate, Score

# The same answers.


@pytest.mark.parametrize("num_slots", [1, 2, 3, 5])
def test_every_family_on_every_number_of_slots(
    family, num_slots, family_checkpoint, check_answers, placed_trainer
):
    path = family_checkpoint(family)
    module = MoELightningModule(str(path))
    trainer = placed_trainer(num_slots)
    check_answers(path, trainer, module)
    sizes = [sum(len(s.expert_ids) for s in module.hosted.shards if s.layer == n) for n in (1, 2)]
    assert sizes == [8, 8]
    layers = {shard.layer for shard in module.hosted.shards}
    assert len(module.hosted.shards) == num_slots * len(layers), "each slot has some of each layer"


def test_every_family_with_six_experts_on_four_slots(
    family, family_checkpoint, check_answers, placed_trainer
):
    path = family_checkpoint(family, num_experts=6)
    module = MoELightningModule(str(path))
    check_answers(path, placed_trainer(4), module)
    of_layer = [len(shard.expert_ids) for shard in module.hosted.shards if shard.layer == 2]
    assert sorted(of_layer) == [1, 1, 2, 2]


@pytest.mark.parametrize("policy", ["round_robin", "balanced", "file"])
def test_every_family_with_every_policy_replicas_and_empty_slots(
    family,
    policy,
    family_checkpoint,
    check_answers,
    policy_options,
    placed_trainer,
    experts_by_slot,
):
    path = family_checkpoint(family)
    module = MoELightningModule(str(path))
    trainer = placed_trainer(5, **policy_options(policy, path))
    check_answers(path, trainer, module)
    placement = trainer.strategy.placement
    replicas = {"round_robin": (0, 0, 0), "balanced": (3, 3, 3), "file": (4, 3, 4)}[policy]
    assert placement.num_replicas == sum(replicas[layer] for layer in placement.layers)
    if policy == "file":
        assert experts_by_slot(module, 1) == {1: (1, 2, 5, 6), 2: (1, 4, 6, 7), 4: (0, 3, 6)}


def test_every_family_when_two_halves_of_a_batch_take_turns(
    family, family_checkpoint, check_answers, placed_trainer, monkeypatch
):
    monkeypatch.setattr("moe_lightning.strategies.placement_strategy.INTERLEAVE_TOKENS", 2)
    path = family_checkpoint(family)
    check_answers(path, placed_trainer(3, interleave=True), MoELightningModule(str(path)))


@pytest.mark.parametrize("backend", ["auto", "reference", "grouped_mm", "cpu_packed"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_every_exact_backend_under_a_placement(
    family, backend, family_checkpoint, check_answers, policy_options, placed_trainer
):
    path = family_checkpoint(family)
    module = MoELightningModule(str(path), experts_backend=backend)
    check_answers(path, placed_trainer(5, **policy_options("file", path)), module)


@pytest.mark.parametrize("backend", ["cpu_half", "cpu_int8"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_backend_that_is_not_exact_errs_as_it_does_on_one_device(
    family,
    backend,
    family_checkpoint,
    answers,
    policy_options,
    placed_trainer,
    trainer_with,
    predict,
):
    path = family_checkpoint(family)
    placed_rows, single_rows = (
        predict(trainer, MoELightningModule(str(path), experts_backend=backend), Score())
        for trainer in (
            placed_trainer(5, **policy_options("file", path)),
            trainer_with("auto"),
        )
    )
    logprobs, _, _ = answers(path)
    errors = []
    for placed, single, want in zip(placed_rows, single_rows, logprobs, strict=True):
        # A row is rounded the same way wherever it is; the sum is fp32 in another order.
        assert placed["logprob"] == pytest.approx(single["logprob"], abs=1e-4)
        errors.append(abs(placed["logprob"] - want) / placed["num_tokens"])
    assert max(errors) > 1e-5, "it has not been used"
    if backend == "cpu_half":  # a relative error of 4e-4 per product, logits of about 3
        assert max(errors) < 2e-3


@pytest.mark.parametrize("num_slots", [2, 3])
def test_the_answers_do_not_depend_on_the_batch_size(
    num_slots, family_checkpoint, answers, placed_trainer, predict
):
    """One token at a time, and rows that take the places of finished ones."""
    path = family_checkpoint("qwen3_moe")
    _, _, tokens = answers(path)
    for budget in (1, 40):
        module = MoELightningModule(str(path), batch_budget_tokens=budget)
        task = Generate(max_new_tokens=len(max(tokens, key=len)))
        rows = predict(placed_trainer(num_slots), module, task)
        assert [row["token_ids"] for row in rows] == tokens


def test_two_runs_are_bitwise_equal(family_checkpoint, policy_options, placed_trainer, predict):
    path = family_checkpoint("mixtral")
    options = policy_options("file", path)
    first, second = (
        predict(placed_trainer(5, **options), MoELightningModule(str(path)), Embed())
        for _ in range(2)
    )
    assert first == second


# Ways to ask for it.


@pytest.mark.parametrize("num_devices", [1, 2, 3])
def test_by_name_the_trainers_devices_are_the_slots(
    num_devices, family_checkpoint, check_answers, trainer_with, experts_by_slot
):
    path = family_checkpoint("olmoe")
    trainer = trainer_with("moe_placement", devices=num_devices)
    assert isinstance(trainer.strategy, PlacementStrategy)
    module = MoELightningModule(str(path))
    check_answers(path, trainer, module)
    assert trainer.strategy.placement.num_slots == num_devices
    assert list(experts_by_slot(module, 1)) == list(range(num_devices))
    assert (trainer.world_size, trainer.is_global_zero) == (1, True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="auto is then every GPU")
def test_auto_without_a_gpu_is_two_slots_on_the_cpu(family_checkpoint, check_answers, trainer_with):
    path = family_checkpoint("olmoe")
    trainer = trainer_with(PlacementStrategy("auto"))
    check_answers(path, trainer, MoELightningModule(str(path)))
    assert trainer.strategy.devices == [torch.device("cpu")] * 2


@pytest.mark.parametrize(
    ("files", "policy"), [((), "linear"), (("file",), "file"), (("loads",), "balanced")]
)
def test_the_files_that_are_given_say_the_policy(files, policy):
    options = PlacementStrategy(["cpu"], **{name: "some.json" for name in files}).options
    assert options.policy == policy


def test_a_placement_for_fewer_slots_leaves_the_others_empty(
    family_checkpoint, check_answers, tmp_path, placed_trainer, experts_by_slot
):
    path = family_checkpoint("mixtral")
    ExpertPlacement(2, {layer: ((1,), (0, 1)) * 4 for layer in range(3)}).save(tmp_path / "p.json")
    module = MoELightningModule(str(path))
    options = {"policy": "file", "file": tmp_path / "p.json"}
    check_answers(path, placed_trainer(4, **options), module)
    assert experts_by_slot(module, 1) == {0: (1, 3, 5, 7), 1: tuple(range(8))}


def test_the_balance_of_a_run_is_what_the_next_is_placed_by(
    family_checkpoint, check_answers, tmp_path, placed_trainer, predict
):
    path = family_checkpoint("qwen3_moe")
    trainer = placed_trainer(3)
    trainer.callbacks.append(RoutingBalance())
    prompts = ["To be", "or not to be, that is the question"]
    predict(trainer, MoELightningModule(str(path)), Score(), prompts)
    file = tmp_path / "routing_balance.json"
    tokenizer = MoELightningModule(str(path)).tokenizer
    num_tokens = sum(len(tokenizer(prompt).input_ids) for prompt in prompts)
    # Every token has two experts; padding and what the package tries out have none.
    assert [sum(loads) for loads in load_loads(file).values()] == [2 * num_tokens] * 3
    options = {"policy": "balanced", "loads": file, "replicas": 2}
    check_answers(path, placed_trainer(3, **options), MoELightningModule(str(path)))
