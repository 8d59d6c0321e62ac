"""What cannot be run on workers is refused, before any weight is read."""

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader
from worker_threads import worker_threads

from moe_lightning import MoELightningModule
from moe_lightning.errors import UsageError, WorkersLostError
from moe_lightning.placement import ExpertPlacement
from moe_lightning.strategies import RPCStrategy
from moe_lightning.tasks import Score

__all__ = ["worker_threads"]


@pytest.fixture
def refused(predict):
    """Predict, and check the error and that nothing has been read."""

    def refused(trainer, module, *words, error_class=UsageError):
        with pytest.raises(error_class) as error:
            predict(trainer, module, Score())
        for word in words:
            assert word in str(error.value), str(error.value)
        assert module.view.bytes_read == 0
        assert module.model is None

    return refused


@pytest.fixture
def module(family_checkpoint):
    return MoELightningModule(str(family_checkpoint("olmoe")))


@pytest.fixture
def addresses(worker_threads, family_checkpoint):
    """Workers of the module's checkpoint."""
    return worker_threads(family_checkpoint("olmoe"), 2)


LOCAL = ["tcp://127.0.0.1:7000"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"workers": LOCAL, "num_workers": 2}, ["trainer.strategy.workers", "num_workers"]),
        ({"workers": []}, ["workers is empty"]),
        ({"num_workers": 0}, ["num_workers=0", "at least 1"]),
        ({"threads": 0}, ["threads=0", "at least 1"]),
        ({"micro_batches": 0}, ["micro_batches=0", "at least 1"]),
        ({"timeout_s": 0}, ["timeout_s=0", "more than 0"]),
        ({"join_timeout_s": -1}, ["join_timeout_s=-1", "more than 0"]),
        ({"transport": "grpc"}, ["transport='grpc'", "zmq", "tensorpipe"]),
        ({"policy": "file"}, ["policy=file", "trainer.strategy.file", "placement.json"]),
        ({"policy": "balanced"}, ["policy=balanced", "trainer.strategy.loads"]),
        ({"replicas": 2}, ["trainer.strategy.replicas", "linear", "balanced"]),
        ({"file": "p", "loads": "l"}, ["trainer.strategy.loads", "file"]),
        ({"policy": "best"}, ["policy='best'", "linear"]),
        ({"dispatch_dtype": "int4"}, ["dispatch_dtype='int4'", "int8"]),
        ({"combine_dtype": "float8"}, ["combine_dtype='float8'", "float16"]),
        ({"workers": ["127.0.0.1:7000"]}, ["trainer.strategy.workers", "tcp://HOST:PORT"]),
        ({"workers": ["tcp://10.0.0.5:7000"]}, ["tcp://10.0.0.5:7000", "--new-keys", "keys"]),
        (
            {"workers": ["tcp://10.0.0.5:7000"], "insecure_network": True},
            ["tcp://10.0.0.5:7000", "--new-keys"],
        ),
        (
            {
                "workers": ["tcp://8.8.8.8:7000"],
                "insecure_network": True,
                "transport": "tensorpipe",
            },
            ["tcp://8.8.8.8:7000", "private"],
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused_at_once(options, words):
    with pytest.raises(UsageError) as error:
        RPCStrategy(**options)
    for word in words:
        assert word in str(error.value)


def test_private_addresses_may_go_without_keys_with_tensorpipe_on_demand_only():
    private = ["tcp://10.0.0.5:7000"]
    RPCStrategy(private, transport="tensorpipe", insecure_network=True)
    RPCStrategy(private, keys="keys")
    with pytest.raises(UsageError, match="--new-keys"):
        RPCStrategy(private, transport="tensorpipe")


@pytest.mark.parametrize(
    ("files", "policy"), [((), "linear"), (("file",), "file"), (("loads",), "balanced")]
)
def test_the_files_that_are_given_say_the_policy(files, policy):
    assert RPCStrategy(**{name: "some.json" for name in files}).options.policy == policy


def test_keys_that_are_not_there_are_refused(module, trainer_with, refused, tmp_path):
    strategy = RPCStrategy(["tcp://10.0.0.5:7000"], keys=tmp_path / "nokeys")
    refused(trainer_with(strategy), module, "nokeys", "--new-keys")


def test_a_worker_that_is_not_there_is_named(module, trainer_with, refused, addresses, tmp_path):
    nobody = f"ipc://{tmp_path}/nobody"
    trainer = trainer_with(RPCStrategy([addresses[0], nobody], join_timeout_s=0.8))
    refused(trainer, module, f"from {nobody} (no connection).", "join_timeout_s")
    predicted = trainer_with(RPCStrategy(addresses)).predict(
        MoELightningModule(str(module.view.path), task=Score()), DataLoader(["To be"])
    )
    assert len(predicted) == 1, "the other one is free again"


def test_another_checkpoint_is_refused(family_checkpoint, trainer_with, refused, addresses):
    other = MoELightningModule(str(family_checkpoint("olmoe", seed=5)))
    trainer = trainer_with(RPCStrategy(addresses))
    refused(trainer, other, addresses[0], "manifest", "the same checkpoint")


WRONG_FILES = {
    "other layers": ({n: ((0,),) * 8 for n in range(4)}, 2, ["0-3", "0-2", "another model"]),
    "other experts": ({n: ((0,),) * 4 for n in range(3)}, 2, ["4 experts", "has 8"]),
    "more slots": ({n: ((2,),) * 8 for n in range(3)}, 3, ["3 slots", "there are 2"]),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_placement_for_something_else_is_refused(
    name, module, tmp_path, trainer_with, refused, addresses
):
    layers, num_slots, words = WRONG_FILES[name]
    file = tmp_path / "p.json"
    ExpertPlacement(num_slots, layers).save(file)
    refused(trainer_with(RPCStrategy(addresses, file=file)), module, str(file), *words)


def test_a_mixed_precision_is_refused(module, trainer_with, refused, addresses):
    trainer = trainer_with(RPCStrategy(addresses), precision="bf16-mixed")
    refused(trainer, module, "bf16-mixed", "--model.dtype")


def test_fit_is_refused(module, trainer_with, addresses):
    trainer = trainer_with(RPCStrategy(addresses), max_steps=1)
    with pytest.raises(UsageError, match="moe_rpc is for inference") as error:
        trainer.fit(module, DataLoader([{"labels": torch.ones(1)}], batch_size=None))
    assert "--trainer.strategy auto" in str(error.value)
    assert module.view.bytes_read == 0


def test_a_training_checkpoint_is_refused(module, tmp_path, trainer_with, addresses):
    single = MoELightningModule(str(module.view.path))
    single.configure_model()
    torch.save(
        {"state_dict": single.state_dict(), "pytorch-lightning_version": L.__version__},
        tmp_path / "some.ckpt",
    )
    module.task = Score()
    with pytest.raises(UsageError, match="--ckpt_path does not work"):
        trainer_with(RPCStrategy(addresses)).predict(
            module, DataLoader(["To be"]), ckpt_path=tmp_path / "some.ckpt", weights_only=True
        )


def test_what_is_on_workers_cannot_be_saved(module, tmp_path, trainer_with, predict, addresses):
    predict(trainer_with(RPCStrategy(addresses)), module, Score())
    for use in (lambda: module.export(tmp_path / "exported"), module.state_dict):
        with pytest.raises(UsageError, match="several devices"):
            use()
    assert not (tmp_path / "exported").exists()


def test_a_local_worker_that_cannot_start_is_told_with_its_words(
    module, trainer_with, refused, tmp_path, monkeypatch
):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho there is no memory >&2\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(script))
    trainer = trainer_with(RPCStrategy(num_workers=2, join_timeout_s=20))
    refused(trainer, module, "exit code 3", "there is no memory", error_class=WorkersLostError)
