"""Names to devices that are there, and how much room is on them."""

from types import SimpleNamespace

import pytest
import torch

from moe_lightning import devices
from moe_lightning.devices import free_bytes, parse_devices
from moe_lightning.errors import UsageError

CPU = torch.device("cpu")
GB = 10**9


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def host(monkeypatch, tmp_path):
    """A host with so many bytes available, and the files of its control group."""

    def host(available, **files):
        memory = SimpleNamespace(available=available)
        monkeypatch.setattr(devices.psutil, "virtual_memory", lambda: memory)
        monkeypatch.setattr(devices, "CGROUP", tmp_path)
        for name, text in files.items():
            (tmp_path / f"memory.{name}").write_text(text)

    return host


def test_devices_by_name_in_order_and_as_often_as_named(two_gpus):
    names = ["cuda:1", "cpu", "cuda:0", "cpu", "cuda:1"]
    assert [str(device) for device in parse_devices(names)] == names


@pytest.mark.parametrize(
    ("name", "device"),
    [("cuda", "cuda:0"), (" cpu ", "cpu"), ("cpu:0", "cpu"), (torch.device("cuda:1"), "cuda:1")],
)
def test_other_ways_to_write_a_device(two_gpus, name, device):
    assert [str(d) for d in parse_devices([name])] == [device]


@pytest.mark.parametrize("name", ["cuda:2", "gpu", "banana", "", "0", "meta", "cuda:-1", "cuda:x"])
def test_a_device_that_is_not_there_is_named_with_those_that_are(two_gpus, name):
    with pytest.raises(UsageError) as error:
        parse_devices(["cpu", name])
    message = str(error.value)
    assert repr(name) in message
    assert "trainer.strategy.slots" in message
    assert "cpu, cuda:0, cuda:1" in message


def test_the_room_of_a_host_without_a_limit(host):
    host(7 * GB)
    assert free_bytes(CPU) == 7 * GB
    host(7 * GB, max="max\n", current="123\n", stat="")
    assert free_bytes(CPU) == 7 * GB


def test_the_limit_of_a_container_counts_and_its_file_cache_does_not(host):
    stat = "anon 1000000000\nactive_file 5\ninactive_file 500000000\n"
    host(64 * GB, max=f"{4 * GB}\n", current=f"{3 * GB}\n", stat=stat)
    # 4 GB allowed, 3 GB used, of which the kernel gives up half a GB when asked.
    assert free_bytes(CPU) == 3 * GB // 2


def test_a_limit_above_what_the_host_has_changes_nothing(host):
    host(2 * GB, max=f"{100 * GB}", current="0", stat="")
    assert free_bytes(CPU) == 2 * GB


def test_this_host_has_room():
    assert 0 < free_bytes(CPU) < 2**50


def test_the_room_of_a_gpu_is_what_it_says(monkeypatch):
    room = {"cuda:1": (5 * GB, 80 * GB)}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: room[str(device)])
    assert free_bytes(torch.device("cuda:1")) == 5 * GB
