"""Ranks of torchrun and SLURM find each other: places from variables, addresses over a store."""

import os
import socket
import threading

import psutil
import pytest

from moe_lightning.errors import UsageError
from moe_lightning.workers.joining import World, world_from_environment
from moe_lightning.workers.place import Place, read_place

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "RANK": "2",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node-0",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_NTASKS": "6",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NNODES": "3",
    "SLURM_JOB_NODELIST": "gpu[07-09]",
    "SLURM_JOB_ID": "1234567",
    "SLURM_JOB_NAME": "predict",
}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def world_of(rank, port, size=3, **changes):
    settings = {"launcher": "SLURM", "local_rank": rank, "is_one_machine": True} | changes
    return World(
        Place(
            rank=rank,
            size=size,
            store_host=settings.pop("store_host", "127.0.0.1"),
            store_port=port,
            hosts_store=rank == 0,
            **settings,
        )
    )


@pytest.fixture
def port():
    return free_port()


@pytest.fixture
def worlds(port):
    """Three worlds of this process as if they were three processes, all in their first launch."""
    made = [world_of(rank, port) for rank in range(3)]
    for world in made:
        world.begin(5)
    return made


# Places.


def test_torchruns_variables():
    assert read_place(TORCHRUN) == Place(
        launcher="torchrun",
        rank=2,
        size=4,
        local_rank=1,
        is_one_machine=False,
        store_host="node-0",
        store_port=29500,
        hosts_store=False,
        attempt=0,
    )


@pytest.mark.parametrize(
    ("changes", "attribute", "value"),
    [
        ({"LOCAL_WORLD_SIZE": "4"}, "is_one_machine", True),
        ({"RANK": "0"}, "hosts_store", False),
        ({"RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "False"}, "hosts_store", True),
        ({"TORCHELASTIC_USE_AGENT_STORE": "False"}, "hosts_store", False),
        ({"TORCHELASTIC_RESTART_COUNT": "2"}, "attempt", 2),
    ],
)
def test_torchruns_variables_vary(changes, attribute, value):
    assert getattr(read_place(TORCHRUN | changes), attribute) == value


def test_slurms_variables():
    assert read_place(SLURM) == Place(
        launcher="SLURM",
        rank=4,
        size=6,
        local_rank=1,
        is_one_machine=False,
        store_host="gpu07",
        store_port=15000 + 4567,
        hosts_store=False,
    )


@pytest.mark.parametrize(
    ("changes", "attribute", "value"),
    [
        ({"SLURM_PROCID": "0"}, "hosts_store", True),
        ({"SLURM_NNODES": "1"}, "is_one_machine", True),
        ({"SLURM_NNODES": "1"}, "store_host", "127.0.0.1"),
        ({"SLURM_STEP_NODELIST": "gpu[08-09]"}, "store_host", "gpu08"),
        ({"SLURM_STEP_NODELIST": "gpu08", "SLURM_STEP_NUM_NODES": "1"}, "is_one_machine", True),
        ({"MASTER_ADDR": "10.0.0.7"}, "store_host", "10.0.0.7"),
        ({"MASTER_PORT": "4321"}, "store_port", 4321),
    ],
)
def test_slurms_variables_vary(changes, attribute, value):
    assert getattr(read_place(SLURM | changes), attribute) == value


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"RANK": "1", "WORLD_SIZE": "2"},  # left over from something else
        SLURM | {"SLURM_JOB_NAME": "interactive"},
        SLURM | {"SLURM_JOB_NAME": "bash"},
    ],
)
def test_a_process_that_nobody_started_with_others_has_no_place(environ):
    assert read_place(environ) is None


def test_torchrun_inside_a_slurm_job_counts():
    assert read_place(SLURM | TORCHRUN).launcher == "torchrun"


@pytest.mark.parametrize(
    ("environ", "word"),
    [
        ({name: value for name, value in TORCHRUN.items() if name != "MASTER_ADDR"}, "MASTER_ADDR"),
        (TORCHRUN | {"WORLD_SIZE": "many"}, "'many'"),
        ({name: value for name, value in SLURM.items() if name != "SLURM_PROCID"}, "SLURM_PROCID"),
    ],
)
def test_variables_that_make_no_sense_are_named(environ, word):
    with pytest.raises(UsageError, match=word):
        read_place(environ)


def test_the_world_of_a_process_is_one_object(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    world = world_from_environment()
    assert world is world_from_environment()
    assert (world.rank, world.size) == (2, 4)


def test_a_world_of_one_process_is_none(monkeypatch):
    for name, value in (TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1"}).items():
        monkeypatch.setenv(name, value)
    assert world_from_environment() is None


# Meeting.


def test_addresses_come_in_the_order_of_ranks(worlds):
    master, first, second = worlds
    second.publish("tcp://127.0.0.1:2222")
    threading.Timer(0.3, first.publish, ["tcp://127.0.0.1:1111"]).start()
    assert master.collect(5, keys=False) == ["tcp://127.0.0.1:1111", "tcp://127.0.0.1:2222"]


def test_the_next_launch_does_not_see_the_addresses_of_the_last(worlds):
    master, first, second = worlds
    first.publish("tcp://127.0.0.1:1111")
    second.publish("tcp://127.0.0.1:2222")
    master.collect(5, keys=False)
    master.end()
    for world in worlds:
        world.begin(5)
    first.publish("tcp://127.0.0.1:3333")
    with pytest.raises(UsageError, match="rank 2 of 3 did not come"):
        master.collect(0.3, keys=False)
    second.publish("tcp://127.0.0.1:4444")
    assert master.collect(5, keys=False) == ["tcp://127.0.0.1:3333", "tcp://127.0.0.1:4444"]


def test_ranks_that_do_not_come_are_named_in_time(worlds):
    with pytest.raises(UsageError, match="ranks 1, 2 of 3 did not come within 0 s") as error:
        worlds[0].collect(0.3, keys=False)
    assert "srun" in str(error.value)
    assert "join_timeout_s" in str(error.value)


def test_a_rank_that_cannot_serve_says_why_at_once(worlds):
    master, first, _ = worlds
    first.publish_failure("there is no such checkpoint: /models/x")
    with pytest.raises(UsageError, match="rank 1 cannot serve: there is no such checkpoint"):
        master.collect(60, keys=False)


@pytest.mark.parametrize(
    "said", ["tcp://10.0.0.5:7000", "tcp://nonsense", "", "\xff\x00", "x" * 1_000_000, "ipc://"]
)
def test_what_the_store_holds_is_checked(worlds, said):
    master, first, second = worlds
    first.store(5).set("moe_rpc/0/1/1", said)
    second.publish("tcp://127.0.0.1:2222")
    with pytest.raises(UsageError, match="the address of rank 1") as error:
        master.collect(5, keys=False)
    assert len(str(error.value)) < 5000


def test_addresses_beyond_the_machine_are_taken_with_keys(worlds):
    master, first, second = worlds
    first.publish("tcp://10.0.0.5:7000")
    second.publish("tcp://node-7:7000")
    assert master.collect(5, keys=True) == ["tcp://10.0.0.5:7000", "tcp://node-7:7000"]


def test_workers_learn_that_the_launch_is_over(worlds):
    master, first, second = worlds
    assert not first.is_over()
    master.end()
    assert first.is_over()
    assert second.is_over()
    for world in worlds:
        world.begin(5)
    assert not first.is_over()


def test_a_master_that_is_gone_is_over_and_says_nothing(port, capfd):
    store_of_master = world_of(0, port)
    store_of_master.begin(5)
    worker = world_of(1, port)
    worker.begin(5)
    assert not worker.is_over()
    # As when its process ends.
    store_of_master._leash.close()
    store_of_master._store = None
    assert _soon(worker.is_over)
    assert capfd.readouterr().err == ""


def _soon(what, timeout_s=5):
    stop = threading.Event()
    for _ in range(int(timeout_s / 0.05)):
        if what():
            return True
        stop.wait(0.05)
    return False


def test_a_worker_may_be_there_before_the_master(port):
    worker = world_of(1, port, size=2)
    master = world_of(0, port, size=2)
    threading.Timer(0.5, master.begin, [5]).start()
    worker.begin(5)
    worker.publish("tcp://127.0.0.1:1111")
    assert master.collect(5, keys=False) == ["tcp://127.0.0.1:1111"]


def test_the_store_listens_on_the_masters_address_only(worlds, port):
    listening = [
        connection.laddr
        for connection in psutil.Process(os.getpid()).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    ]
    assert [address.ip for address in listening] == ["127.0.0.1"]


def test_a_store_that_nobody_opens_is_named_in_time(port, capfd):
    with pytest.raises(UsageError, match=f"127.0.0.1:{port}") as error:
        world_of(1, port).begin(0.3)
    assert "rank 0" in str(error.value)
    assert capfd.readouterr().err == ""  # torch's own client would print pages


def test_a_port_that_is_taken_is_named(port):
    with socket.create_server(("127.0.0.1", port)), pytest.raises(UsageError) as error:
        world_of(0, port).begin(1)
    assert f"127.0.0.1:{port}" in str(error.value)
    assert "MASTER_PORT" in str(error.value)


def test_a_host_that_is_not_known_is_named(port):
    with pytest.raises(UsageError, match=r"nowhere\.invalid"):
        world_of(0, port, store_host="nowhere.invalid").begin(1)


def test_a_master_of_several_machines_does_not_hide_on_loopback(port):
    with pytest.raises(UsageError, match="MASTER_ADDR"):
        world_of(0, port, is_one_machine=False, store_host="localhost").begin(1)


# Own address.


def test_on_one_machine_it_is_loopback(port):
    assert world_of(1, port, store_host="192.0.2.77").own_host() == "127.0.0.1"


def test_on_several_it_is_the_one_that_leads_to_the_master(port):
    world = world_of(1, port, is_one_machine=False, store_host="127.0.0.1")
    assert world.own_host() == "127.0.0.1"
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            if address.family == socket.AF_INET:
                here = world_of(1, port, is_one_machine=False, store_host=address.address)
                assert here.own_host() == address.address
