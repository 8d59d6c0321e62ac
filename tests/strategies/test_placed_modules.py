"""A placed module's life: predicting again, other strategies, validation, threads, saving."""

import gc
import threading

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from moe_lightning import MoELightningModule
from moe_lightning.errors import UsageError
from moe_lightning.strategies import PlacementStrategy
from moe_lightning.tasks import Score

# A module's life.


def test_a_module_is_placed_once_under_one_strategy_and_again_under_another(
    family_checkpoint, check_answers, placed_trainer, trainer_with
):
    path = family_checkpoint("qwen3_moe")
    module = MoELightningModule(str(path))
    check_answers(path, placed_trainer(3), module)
    model, num_read = module.model, module.view.bytes_read
    check_answers(path, placed_trainer(3), module)
    assert module.model is model
    assert module.view.bytes_read == num_read
    check_answers(path, placed_trainer(2), module)
    assert module.hosted.placement.num_slots == 2
    check_answers(path, trainer_with("auto"), module)
    assert module.hosted.placement is None


def test_weights_of_its_own_are_not_lost_to_another_strategy(
    family_checkpoint, placed_trainer, predict, trainer_with
):
    module = MoELightningModule(str(family_checkpoint("qwen3_moe")))
    predict(trainer_with("auto"), module, Score(), ["To be"])
    module.load_state_dict(module.state_dict())
    with pytest.raises(UsageError, match=r"no longer the checkpoint's.*Export"):
        predict(placed_trainer(2), module, Score(), ["To be"])


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_precision_of_the_trainer_means_the_same_on_every_slot(
    precision, backend, family_checkpoint, trainer_with, predict
):
    path = str(family_checkpoint("qwen3_moe"))
    prompts = ["To be", "To be or not"]
    scores = [
        [
            row["logprob"]
            for row in predict(
                trainer_with(strategy, precision=precision),
                MoELightningModule(path, experts_backend=backend),
                Score(),
                prompts,
            )
        ]
        for strategy in ("auto", PlacementStrategy(["cpu"] * 3), PlacementStrategy(["cpu"]))
    ]
    # One bfloat16 rounding of an expert's partial sum, in scores of about 40.
    assert scores[1] == pytest.approx(scores[0], abs=0.05)
    assert scores[2] == scores[0]


def test_without_inference_mode(family_checkpoint, check_answers, trainer_with):
    path = family_checkpoint("gpt_oss")
    strategy = PlacementStrategy(["cpu"] * 3)
    trainer = trainer_with(strategy, inference_mode=False)
    check_answers(path, trainer, MoELightningModule(str(path)))


@pytest.mark.parametrize("num_slots", [1, 3])
def test_validate_gives_the_loss_of_one_device(
    num_slots, family_checkpoint, random_ids, trainer_with
):
    path = family_checkpoint("qwen2_moe")
    ids = torch.tensor([random_ids(12, seed) for seed in range(2)])
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(12).expand(2, 12)}
    losses = [
        trainer_with(strategy).validate(
            MoELightningModule(str(path)), DataLoader([batch], batch_size=None), verbose=False
        )[0]["val_loss"]
        for strategy in ("auto", PlacementStrategy(["cpu"] * num_slots))
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_the_process_has_its_threads_back_after_a_run_good_or_bad(
    family_checkpoint, tmp_path, placed_trainer, trainer_with, predict
):
    before = torch.get_num_threads()
    path = family_checkpoint("olmoe")
    seen = []

    class Watch(L.Callback):
        def on_predict_start(self, trainer, pl_module):
            seen.append(torch.get_num_threads())

    torch.set_num_threads(6)
    try:
        for strategy in (
            PlacementStrategy(["cpu"]),
            PlacementStrategy(["cpu"], threads=1),
            PlacementStrategy(["cpu"] * 2),
            PlacementStrategy(["cpu"] * 4),
            PlacementStrategy(["cpu"] * 7),
            PlacementStrategy(["cpu"] * 2, threads=5),
        ):
            trainer = trainer_with(strategy)
            trainer.callbacks.append(Watch())
            predict(trainer, MoELightningModule(str(path)), Score(), ["To be"])
            assert torch.get_num_threads() == 6
        # Slots share what there is; a number asked for is a number got.
        assert seen == [6, 1, 3, 1, 1, 5]
        trainer = placed_trainer(2, policy="file", file=tmp_path / "nope.json")
        with pytest.raises(UsageError):
            predict(trainer, MoELightningModule(str(path)), Score())
        assert torch.get_num_threads() == 6
    finally:
        torch.set_num_threads(before)


def test_a_module_that_is_gone_leaves_no_threads(family_checkpoint, placed_trainer, predict):
    path = family_checkpoint("olmoe")
    before = set(threading.enumerate())
    trainer, module = placed_trainer(3), MoELightningModule(str(path))
    predict(trainer, module, Score(), ["To be"])
    workers = set(threading.enumerate()) - before
    assert len(workers) == 2
    del trainer, module
    gc.collect()
    for worker in workers:
        worker.join(20)
        assert not worker.is_alive()
