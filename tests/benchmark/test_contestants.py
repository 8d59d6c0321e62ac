"""Who takes part."""

import pytest

from moe_lightning import MoELightningModule
from moe_lightning.benchmark import contestants
from moe_lightning.errors import UsageError
from moe_lightning.modeling.model_sizes import measure
from moe_lightning.placement.cluster import parse_cluster

EVERYBODY = [
    *("transformers", "single", "placement", "rpc zmq", "rpc tensorpipe"),
    *("fsdp", "ep", "tp", "pp", "ddp", "DataParallel", "vllm"),
]


@pytest.fixture(scope="module")
def sizes():
    import torch

    config = MoELightningModule("demo").view.config
    return measure(config, dtype=torch.float32, experts_backend="auto", device_type="cpu")


def find(sizes, devices, **options):
    cluster = parse_cluster(devices, kind="cpu")
    return {each.name: each for each in contestants(sizes, cluster, **options)}


def test_all_strategies_and_peers_are_in_the_table(sizes):
    found = find(sizes, "2x4GiB")
    assert list(found) == EVERYBODY
    assert [name for name, each in found.items() if each.why_not] == ["DataParallel", "vllm"]
    assert found["placement"].options["slots"] == ["cpu", "cpu"]


def test_who_cannot_run_says_why(sizes):
    assert "heads" in find(sizes, "3x4GiB")["tp"].why_not
    assert "layers" in find(sizes, "9x4GiB")["pp"].why_not
    assert "one device" in find(sizes, "4GiB")["fsdp"].why_not
    assert "too much" in find(sizes, "2x20MiB")["single"].why_not


def test_only_some(sizes):
    assert list(find(sizes, "2x4GiB", only=["ep"])) == ["single", "ep"]
    with pytest.raises(UsageError, match=r"no 'eq' among .*placement"):
        find(sizes, "2x4GiB", only=["eq"])


def test_vllm_of_another_python(sizes):
    assert not find(sizes, "2x4GiB", vllm_python="/opt/vllm/bin/python")["vllm"].why_not
