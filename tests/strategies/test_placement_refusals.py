"""What cannot be placed is refused before any weight is read."""

import json

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from moe_lightning import MoELightningModule
from moe_lightning.errors import UsageError
from moe_lightning.placement import ExpertPlacement
from moe_lightning.strategies import PlacementStrategy
from moe_lightning.tasks import Score


@pytest.fixture
def refused(predict):
    """Predict, and check the error and that nothing has been read."""

    def refused(trainer, module, *words):
        with pytest.raises(UsageError) as error:
            predict(trainer, module, Score())
        for word in words:
            assert word in str(error.value), str(error.value)
        assert module.view.bytes_read == 0
        assert module.model is None

    return refused


@pytest.mark.parametrize("name", ["cuda:9", "gpu", "banana", "", "cpu:x", "meta", "mps"])
def test_a_device_that_is_not_there_is_named(name, family_checkpoint, trainer_with, refused):
    module = MoELightningModule(str(family_checkpoint("olmoe")))
    trainer = trainer_with(PlacementStrategy(["cpu", name]))
    refused(trainer, module, "trainer.strategy.slots", repr(name), "cpu")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"slots": []}, ["slots is empty"]),
        ({"slots": ()}, ["slots is empty"]),
        ({"slots": "cuda:0"}, ["slots='cuda:0'", "[cuda:0]", "auto"]),
        ({"slots": ["cpu"], "threads": 0}, ["threads=0", "at least 1"]),
        ({"policy": "file"}, ["policy=file", "trainer.strategy.file", "placement.json"]),
        ({"policy": "balanced"}, ["policy=balanced", "trainer.strategy.loads"]),
        ({"policy": "linear", "file": "p.json"}, ["trainer.strategy.file", "linear"]),
        ({"policy": "round_robin", "loads": "l.json"}, ["trainer.strategy.loads", "round_robin"]),
        ({"replicas": 2}, ["trainer.strategy.replicas", "linear", "balanced"]),
        ({"policy": "balanced", "loads": "l", "replicas": -1}, ["replicas=-1", "negative"]),
        ({"policy": "best"}, ["policy='best'", "linear", "round_robin", "balanced", "file"]),
        ({"file": "p", "loads": "l"}, ["trainer.strategy.loads", "file"]),
        ({"policy": "file", "file": "p", "loads": "l"}, ["trainer.strategy.loads", "file"]),
    ],
)
def test_options_that_do_not_go_together_are_refused_at_once(options, words):
    with pytest.raises(UsageError) as error:
        PlacementStrategy(**options)
    for word in words:
        assert word in str(error.value)


WRONG_FILES = {
    "other layers": ({n: ((0,),) * 8 for n in range(4)}, 2, ["0-3", "0-2", "another model"]),
    "other experts": ({n: ((0,),) * 4 for n in range(3)}, 2, ["4 experts", "has 8"]),
    "more slots": ({n: ((4,),) * 8 for n in range(3)}, 5, ["5 slots", "there are 2"]),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_placement_for_something_else_is_refused(
    name, family_checkpoint, tmp_path, placed_trainer, refused
):
    layers, num_slots, words = WRONG_FILES[name]
    file = tmp_path / "p.json"
    ExpertPlacement(num_slots, layers).save(file)
    module = MoELightningModule(str(family_checkpoint("olmoe")))
    refused(placed_trainer(2, policy="file", file=file), module, str(file), *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["not JSON"]),
        ("[]", ["list"]),
        ('{"layers": {}}', ["format"]),
        (
            '{"format": "moe_lightning expert placement", "version": 1, "num_slots": 2, '
            '"layers": {"0": [0, 1, "x"]}}',
            ["layer 0, expert 2", "'x'"],
        ),
    ],
)
def test_a_malformed_placement_is_refused(
    text, words, family_checkpoint, tmp_path, placed_trainer, refused
):
    file = tmp_path / "p.json"
    file.write_text(text)
    module = MoELightningModule(str(family_checkpoint("olmoe")))
    refused(placed_trainer(2, policy="file", file=file), module, "p.json", *words)


def test_loads_of_another_model_are_refused(family_checkpoint, tmp_path, placed_trainer, refused):
    file = tmp_path / "loads.json"
    file.write_text(json.dumps({"loads": {"0": [1, 2], "1": [1, 2], "2": [1, 2]}}))
    module = MoELightningModule(str(family_checkpoint("olmoe")))
    trainer = placed_trainer(2, policy="balanced", loads=file)
    refused(trainer, module, "loads of 2 experts in layer 0", "the model has 8")


@pytest.mark.parametrize("policy", ["linear", "round_robin", "balanced", "file"])
def test_a_device_that_is_too_small_is_refused_with_its_numbers(
    policy, family_checkpoint, policy_options, monkeypatch, placed_trainer, refused
):
    # The host has 0.3 GB and the package keeps 300 MiB, 0.315 GB, of every device free.
    monkeypatch.setattr(
        "moe_lightning.strategies.placement_strategy.free_bytes", lambda device: 300_000_000
    )
    path = family_checkpoint("olmoe")
    module = MoELightningModule(str(path))
    trainer = placed_trainer(5, **policy_options(policy, path))
    refused(trainer, module, "not fit", " GB", "--model.dtype bfloat16")


def test_an_accelerator_that_is_not_the_first_slots_is_refused(
    family_checkpoint, monkeypatch, trainer_with, refused
):
    monkeypatch.setattr("moe_lightning.devices._devices_there", lambda: ["cpu", "cuda:0"])
    module = MoELightningModule(str(family_checkpoint("olmoe")))
    trainer = trainer_with(PlacementStrategy(["cuda:0", "cpu"]))
    refused(trainer, module, "cuda:0", "--trainer.accelerator gpu")


def test_fit_is_refused(family_checkpoint, trainer_with):
    module = MoELightningModule(str(family_checkpoint("olmoe")))
    trainer = trainer_with(PlacementStrategy(["cpu"] * 2), max_steps=1)
    with pytest.raises(UsageError, match="moe_placement is for inference") as error:
        trainer.fit(module, DataLoader([{"labels": torch.ones(1)}], batch_size=None))
    assert "--trainer.strategy auto" in str(error.value)
    assert module.view.bytes_read == 0


def test_what_is_placed_cannot_be_saved(family_checkpoint, tmp_path, placed_trainer, predict):
    module = MoELightningModule(str(family_checkpoint("olmoe")))
    predict(placed_trainer(2), module, Score())
    for use in (lambda: module.export(tmp_path / "exported"), module.state_dict):
        with pytest.raises(UsageError, match="several devices"):
            use()
    assert not (tmp_path / "exported").exists()


def test_on_one_slot_it_can_still_be_saved(
    family_checkpoint, tmp_path, plain_transformers, placed_trainer, predict
):
    path = family_checkpoint("olmoe")
    module = MoELightningModule(str(path))
    predict(placed_trainer(1), module, Score())
    module.export(tmp_path / "exported")
    want = plain_transformers(path).model.state_dict()
    got = plain_transformers(tmp_path / "exported").model.state_dict()
    assert want.keys() == got.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_training_checkpoint_is_refused(family_checkpoint, tmp_path, placed_trainer):
    module = MoELightningModule(str(family_checkpoint("olmoe")), task=Score())
    single = MoELightningModule(str(family_checkpoint("olmoe")))
    single.configure_model()
    torch.save(
        {"state_dict": single.state_dict(), "pytorch-lightning_version": L.__version__},
        tmp_path / "some.ckpt",
    )
    with pytest.raises(UsageError, match="--ckpt_path does not work") as error:
        placed_trainer(2).predict(
            module, DataLoader(["To be"]), ckpt_path=tmp_path / "some.ckpt", weights_only=True
        )
    assert "moe_lightning export" in str(error.value)
