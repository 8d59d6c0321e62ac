"""Who runs the trainer's function and who serves experts; the real torchrun is in tests/cli."""

import threading

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from quiet_trainer import quiet_trainer
from torch.utils.data import DataLoader

from moe_lightning import MoELightningModule, RPCStrategy
from moe_lightning.errors import CheckpointError, UsageError, WorkersLostError
from moe_lightning.strategies import rpc_launcher
from moe_lightning.strategies.rpc_launcher import RPCLauncher
from moe_lightning.workers.joining import World
from moe_lightning.workers.place import Place


class FakeWorld(World):
    """A world that meets nobody, and keeps what it was told."""

    def __init__(self, rank, size=3, *, is_one_machine=True, local_rank=None, over=False):
        local_rank = rank if local_rank is None else local_rank
        place = Place("torchrun", rank, size, local_rank, is_one_machine, "127.0.0.1", 1, False)
        super().__init__(place)
        self.told = []
        self.over = over

    def begin(self, timeout_s):
        self.told.append("begin")

    def end(self):
        self.told.append("end")

    def is_over(self):
        return self.over

    def publish(self, address):
        self.told.append(address)

    def publish_failure(self, reason):
        self.told.append(f"failure: {reason}")


@pytest.fixture
def start(monkeypatch, tmp_path):
    """A trainer in a world: ``start(world, serve, **options)``; ``serve`` stands for a worker."""
    monkeypatch.setattr(rank_zero_only, "rank", 0)

    def start(world, serve=None, **options):
        monkeypatch.setattr(rpc_launcher, "world_from_environment", lambda: world)
        monkeypatch.setattr(rpc_launcher, "serve_experts", serve)
        return quiet_trainer(tmp_path, strategy=RPCStrategy(**options))

    return start


@pytest.fixture
def served():
    """A stand-in for a worker, and what it was called with."""
    calls = []

    def serve(options, *, on_listening, is_wanted):
        calls.append(options)
        host = options.listen.removeprefix("tcp://").rpartition(":")[0].replace("*", "0.0.0.0")
        on_listening(f"tcp://{host}:4567")
        return 0

    serve.calls = calls
    return serve


def predict(trainer, module=None):
    module = MoELightningModule("demo") if module is None else module
    return trainer.predict(module, DataLoader(["To be"]))


def test_without_others_the_function_is_just_called(start):
    launcher = start(None).strategy.launcher
    assert isinstance(launcher, RPCLauncher)
    assert launcher.is_interactive_compatible
    trainer = L.Trainer.__new__(L.Trainer)
    trainer.state = type("State", (), {"fn": TrainerFn.PREDICTING})
    assert launcher.launch(lambda *a, **k: (a, k), 1, trainer=trainer, b=2) == ((1,), {"b": 2})


def test_rank_0_runs_the_function_between_begin_and_end(start, monkeypatch):
    world = FakeWorld(0)
    trainer = start(world)
    monkeypatch.setattr(trainer, "_predict_impl", lambda *a: world.told.append("ran") or ["rows"])
    assert predict(trainer) == ["rows"]
    assert world.told == ["begin", "ran", "end"]
    assert rank_zero_only.rank == 0


def test_workers_are_let_go_when_the_function_fails(start, monkeypatch):
    world = FakeWorld(0)
    trainer = start(world)

    def fail(*_):
        raise CheckpointError("bad weights")

    monkeypatch.setattr(trainer, "_predict_impl", fail)
    with pytest.raises(CheckpointError, match="bad weights"):
        predict(trainer)
    assert world.told == ["begin", "end"]


def test_other_ranks_serve_and_have_no_rows(start, served, monkeypatch):
    world = FakeWorld(2)
    trainer = start(world, served, threads=3)
    monkeypatch.setattr(trainer, "_predict_impl", lambda *_: pytest.fail("this is no master"))
    assert predict(trainer, MoELightningModule("some/dir")) == []
    assert world.told == ["begin", "tcp://127.0.0.1:4567"]
    (options,) = served.calls
    assert (options.checkpoint, options.threads) == ("some/dir", 3)
    assert (options.listen, options.keys, options.device) == ("tcp://127.0.0.1:0", None, "cpu")
    assert options.ends_with_master
    assert not options.parent_pipe
    assert rank_zero_only.rank == 2
    assert trainer.state.status == TrainerStatus.FINISHED
    assert not trainer.predicting
    # An SPMD script goes on to its next call.
    assert predict(trainer) == []
    assert world.told[2:] == ["begin", "tcp://127.0.0.1:4567"]


def test_the_module_of_the_last_call_is_remembered(start, served):
    trainer = start(FakeWorld(1), served)
    predict(trainer, MoELightningModule("some/dir"))
    assert trainer.predict(dataloaders=DataLoader(["To be"])) == []
    assert [options.checkpoint for options in served.calls] == ["some/dir"] * 2


def test_a_worker_stays_until_the_launch_is_over(start):
    world = FakeWorld(1)

    def serve(options, *, on_listening, is_wanted):
        assert is_wanted()
        world.over = True
        waited = threading.Event()
        for _ in range(50):
            if not is_wanted():
                return 0
            waited.wait(0.1)
        raise AssertionError("nobody told the worker to leave")

    assert predict(start(world, serve)) == []


def test_a_worker_that_cannot_serve_tells_the_master_why(start):
    world = FakeWorld(1)

    def serve(*_, **__):
        raise CheckpointError("no such directory")

    with pytest.raises(CheckpointError, match="no such directory"):
        predict(start(world, serve))
    assert world.told == ["begin", "failure: no such directory"]


def test_a_worker_that_is_told_to_leave_leaves_with_0(start):
    def serve(*_, **__):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as leaving:
        predict(start(FakeWorld(1), serve))
    assert leaving.value.code == 0


def test_a_master_that_fell_silent_is_an_error_with_exit_code_6(start):
    with pytest.raises(WorkersLostError, match="rank 0") as error:
        predict(start(FakeWorld(1), lambda *_, **__: 6))
    assert error.value.exit_code == 6


def test_a_master_that_ended_otherwise_is_none(start):
    assert predict(start(FakeWorld(1, over=True), lambda *_, **__: 6)) == []


def test_each_rank_has_a_gpu_of_its_own(start, served, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for local_rank in (1, 2, 3):
        trainer = start(FakeWorld(5, 6, local_rank=local_rank), served)
        trainer.strategy.parallel_devices = [torch.device("cuda:0")]
        predict(trainer)
    assert [options.device for options in served.calls] == ["cuda:1", "cuda:0", "cuda:1"]


# Addresses.


def test_beyond_one_machine_a_worker_listens_on_its_own_address(start, served, tmp_path):
    world = FakeWorld(1, is_one_machine=False)
    world.own_host = lambda: "10.0.0.7"
    predict(start(world, served, keys=tmp_path))
    assert served.calls[0].listen == "tcp://10.0.0.7:0"
    assert served.calls[0].keys == str(tmp_path)
    assert world.told[-1] == "tcp://10.0.0.7:4567"


def test_an_ipv6_address_has_brackets(start, served, tmp_path):
    world = FakeWorld(1, is_one_machine=False)
    world.own_host = lambda: "fd00::7"
    predict(start(world, served, keys=tmp_path))
    assert served.calls[0].listen == "tcp://[fd00::7]:0"


def test_beyond_one_machine_keys_are_needed_and_the_master_hears_of_it(start, served):
    world = FakeWorld(1, is_one_machine=False)
    world.own_host = lambda: "10.0.0.7"
    with pytest.raises(UsageError, match="--new-keys"):
        predict(start(world, served))
    assert not served.calls
    assert "--new-keys" in world.told[-1]


def test_a_given_port_is_shared_out_two_by_two(start, served, tmp_path):
    for local_rank, port in ((0, 7000), (1, 7002), (3, 7006)):
        world = FakeWorld(4, 5, is_one_machine=False, local_rank=local_rank)
        world.own_host = lambda: "10.0.0.7"
        predict(start(world, served, keys=tmp_path, listen="tcp://*:7000"))
        assert served.calls[-1].listen == f"tcp://*:{port}"
        # The master cannot dial "all interfaces".
        assert world.told[-1] == "tcp://10.0.0.7:4567"


# Refusals, on all ranks and before anything.


@pytest.mark.parametrize("rank", [None, 0, 1])
def test_fit_is_refused(rank, start):
    world = None if rank is None else FakeWorld(rank)
    trainer = start(world)
    with pytest.raises(UsageError, match="moe_rpc is for inference"):
        trainer.fit(MoELightningModule("demo"), DataLoader(["To be"]))
    assert world is None or world.told == []


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "options", [{"workers": ["tcp://127.0.0.1:7000"]}, {"num_workers": 3}, {"num_workers": 1}]
)
def test_workers_of_their_own_are_refused(rank, options, start):
    world = FakeWorld(rank)
    with pytest.raises(UsageError, match="ranks 1 to 2 of torchrun") as error:
        predict(start(world, **options))
    assert next(iter(options)) in str(error.value)
    assert world.told == []


def test_the_right_number_of_workers_is_not_refused(start, served):
    assert predict(start(FakeWorld(1), served, num_workers=2)) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_module_without_a_checkpoint_is_refused(rank, start):
    class Other(L.LightningModule):
        pass

    world = FakeWorld(rank)
    with pytest.raises(UsageError, match="Other has no checkpoint"):
        predict(start(world), Other())
    assert world.told == []
