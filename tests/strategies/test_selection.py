"""``moe_auto``: the rules, what a trainer becomes of them, and that its answers stay the same."""

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from quiet_trainer import quiet_trainer
from ranks import run_on_ranks
from torch.utils.data import DataLoader

from moe_lightning import MoELightningModule
from moe_lightning.errors import UsageError
from moe_lightning.modeling.model_sizes import measure, read_config
from moe_lightning.placement.cluster import Cluster
from moe_lightning.placement.estimates import estimate
from moe_lightning.placement.footprint import LayerSizes, ModelSizes, TensorParallelPlan
from moe_lightning.strategies import MoEStrategy, PlacementStrategy, RPCStrategy
from moe_lightning.strategies import surroundings as surroundings_of_trainer
from moe_lightning.strategies.selection import select
from moe_lightning.strategies.sharded_strategy import ShardedStrategy
from moe_lightning.strategies.surroundings import look_around
from moe_lightning.tasks import Generate

GB = 10**9
CPU = torch.device("cpu")
PROMPTS = ["To be", "or not to be, that is the question", "é", "in", "the"]


def model(num_layers=48, dense=0.05, experts=1.2, num_experts=128, heads=(32, 4), **settings):
    """By default some 61 GB, 58 of them experts, as Qwen3-30B-A3B in bfloat16."""
    layer = LayerSizes(int(dense * GB), int(experts * GB), num_experts)
    return ModelSizes(
        name="Model",
        dtype="bfloat16",
        row_bytes=4096,
        layers=(layer,) * num_layers,
        embedding_bytes=int(0.6 * GB),
        head_bytes=int(0.6 * GB),
        other_bytes=0,
        top_k=8,
        num_heads=heads,
        tensor_parallel=TensorParallelPlan(0, 2 * num_layers),
        **settings,
    )


QWEN = model()
HUGE = model(num_layers=58, dense=0.6, experts=22.0, num_experts=256)  # some 1.3 TB
MIXTRAL = model(num_layers=32, dense=0.1, experts=2.7, num_experts=8)  # some 90 GB, 8 experts
MOSTLY_DENSE = model(num_layers=20, dense=1.0, experts=0.5, num_experts=8)
LORA = model(adapter_bytes=GB)


def gpus(per_node, gigabytes, num_nodes=1, host=0):
    return Cluster(num_nodes, per_node, gigabytes * GB, "cuda", host * GB)


def copies(num_ranks):
    return {"fsdp_size": 1, "dp_replicate_size": num_ranks, "dense": "replicated"}


INFERENCE = {
    "fits on one GPU": (QWEN, gpus(1, 80), None, "auto", {}),
    "fits on one of several": (QWEN, gpus(4, 80), None, "auto", {}),
    "fits on the GPUs together": (
        *(QWEN, gpus(3, 24), None, "moe_placement"),
        {"slots": ["cuda:0", "cuda:1", "cuda:2"]},
    ),
    "ten percent are kept free": (
        *(QWEN, gpus(2, 66), None, "moe_placement"),
        {"slots": ["cuda:0", "cuda:1"]},
    ),
    "one GPU and the host's memory": (
        *(QWEN, gpus(1, 40, host=64), None, "moe_placement"),
        {"slots": ["cuda:0", "cpu"]},
    ),
    "two GPUs and the host's memory": (
        *(QWEN, gpus(2, 16, host=64), None, "moe_placement"),
        {"slots": ["cuda:0", "cuda:1", "cpu"]},
    ),
    "the host is not used if the GPUs are enough": (
        *(QWEN, gpus(2, 40, host=500), None, "moe_placement"),
        {"slots": ["cuda:0", "cuda:1"]},
    ),
    "more GPUs than one process drives": (
        HUGE,
        gpus(16, 141),
        None,
        "moe_rpc",
        {"num_workers": 15},
    ),
    "a CPU": (QWEN, Cluster(1, 1, 128 * GB, "cpu"), None, "auto", {}),
    "two machines, one of which cannot hold the experts": (
        QWEN,
        gpus(1, 48, num_nodes=2),
        None,
        "moe_fsdp",
        {},
    ),
    "three machines": (QWEN, gpus(1, 48, num_nodes=3), None, "moe_rpc", {}),
    "two machines of eight": (HUGE, gpus(8, 141, num_nodes=2), None, "moe_rpc", {}),
    "ranks with room for a copy": (QWEN, gpus(4, 80), True, "moe_fsdp", copies(4)),
    "ranks of several machines with room for a copy": (
        QWEN,
        gpus(2, 80, 2),
        True,
        "moe_fsdp",
        copies(4),
    ),
    "ranks of one machine that share": (QWEN, gpus(4, 24), True, "moe_ep", {}),
    "more ranks than experts": (MIXTRAL, gpus(16, 24), True, "moe_ep", {"ep_size": 8}),
    "ranks for which the dense layers are too large": (
        *(MOSTLY_DENSE, gpus(4, 20), True, "moe_ep"),
        {"dense": "sharded"},
    ),
    "ranks of a CPU": (QWEN, Cluster(1, 4, 24 * GB, "cpu"), True, "moe_ep", {}),
}


@pytest.mark.parametrize("name", INFERENCE)
def test_rules_for_inference(name) -> None:
    sizes, cluster, has_ranks, strategy, options = INFERENCE[name]
    choice = select(sizes, cluster, has_ranks=has_ranks)
    assert (choice.name, choice.estimate.options) == (strategy, options)
    assert choice.estimate.device_bytes <= cluster.room_bytes


TRAINING = {
    "one GPU": (LORA, gpus(1, 80), "auto", {}),
    "several GPUs, though one would do": (LORA, gpus(4, 80), "moe_fsdp", {"ep_size": 4}),
    "all weights": (QWEN, gpus(8, 80), "moe_fsdp", {"ep_size": 8}),
    "two machines": (QWEN, gpus(8, 80, num_nodes=2), "moe_fsdp", {"ep_size": 8}),
    "machines with one GPU each": (QWEN, gpus(1, 80, num_nodes=8), "moe_fsdp", {}),
    "an odd number of GPUs": (QWEN, gpus(7, 80), "moe_fsdp", {"ep_size": 7}),
    "more GPUs than experts": (MIXTRAL, gpus(12, 80), "moe_fsdp", {"ep_size": 6}),
    "few experts": (MOSTLY_DENSE, gpus(8, 80), "moe_fsdp", {}),
    "processes of a CPU": (QWEN, Cluster(1, 2, 200 * GB, "cpu"), "moe_fsdp", {"ep_size": 2}),
}


@pytest.mark.parametrize("name", TRAINING)
def test_rules_for_training(name) -> None:
    sizes, cluster, strategy, options = TRAINING[name]
    choice = select(sizes, cluster, training=True)
    assert (choice.name, choice.estimate.options) == (strategy, options)


def test_three_lines_say_what_was_found_the_rule_and_the_choice_with_numbers() -> None:
    found, rule, chosen = select(QWEN, gpus(3, 24)).reasons
    assert "61.2 GB" in found
    assert "57.6 GB of them in 48 x 128 experts" in found
    assert "3 GPUs of 24.0 GB in one machine" in found
    assert "inference" in rule
    assert "placement" in rule
    assert '--trainer.strategy moe_placement --trainer.strategy.slots "[cuda:0,' in chosen
    assert "21.6 GB on the fullest device, which has room for 21.6 GB (10% kept free)" in chosen
    assert not any("\n" in line for line in (found, rule, chosen))


def test_experts_go_where_there_is_room() -> None:
    # An even third of the experts, 19.2 GB, beside 3.6 GB of dense layers is too much for home.
    assert select(QWEN, gpus(3, 24)).estimate.device_bytes == int(21.6 * GB)


@pytest.mark.parametrize(
    ("sizes", "cluster", "training", "words"),
    [
        (QWEN, gpus(1, 24), False, ["61.2 GB", "21.6 GB", "cpu_int8", "torchrun", "moe_rpc"]),
        (QWEN, gpus(2, 24), False, ["moe_placement", "torchrun"]),
        (QWEN, Cluster(1, 1, 32 * GB, "cpu"), False, ["cpu_half", "28.8 GB"]),
        (QWEN, gpus(1, 80), True, ["244.8 GB", "--model.lora", "--trainer.devices"]),
        (QWEN, gpus(2, 80), True, ["moe_fsdp", "--model.lora"]),
        (HUGE, gpus(8, 80), None, ["moe_ep", "moe_fsdp"]),
    ],
)
def test_if_nothing_fits_numbers_and_remedies_are_said(sizes, cluster, training, words) -> None:
    with pytest.raises(UsageError) as caught:
        select(
            sizes, cluster, training=bool(training), has_ranks=True if training is None else None
        )
    for word in ["Nothing fits", *words]:
        assert word in str(caught.value), caught.value


def test_the_table_says_why_not() -> None:
    rows = estimate(QWEN, gpus(3, 24))
    assert rows["tp"].why_not == "3 ranks do not divide 32 heads of attention"
    assert rows["single"].why_not == "39.6 GB too much"
    # A third of 48 x 128 experts, though not of every layer's.
    assert rows["ep"].why_not == "1.2 GB too much"
    assert rows["pp"].fits
    assert estimate(QWEN, gpus(64, 24))["pp"].why_not == "more ranks than the 48 layers"
    training = estimate(QWEN, gpus(3, 24), training=True)
    assert not {"placement", "rpc", "pp", "sharded ep"} & set(training)


# What is there.


def test_a_process_that_is_alone_has_the_whole_cpu(monkeypatch) -> None:
    monkeypatch.setattr(surroundings_of_trainer, "free_bytes", lambda device: 600)
    monkeypatch.setattr(surroundings_of_trainer, "_total_bytes", lambda device: 1000)
    assert look_around([CPU] * 3, num_nodes=1, training=False) == Cluster(1, 1, 600, "cpu")
    assert look_around([CPU], num_nodes=1, training=True) == Cluster(1, 1, 600, "cpu")
    # Ranks must agree, so they go by what does not change.
    assert look_around([CPU] * 2, num_nodes=1, training=True) == Cluster(1, 2, 500, "cpu")


@pytest.mark.parametrize(
    ("variables", "want"),
    [
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, Cluster(1, 4, 250, "cpu")),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, Cluster(2, 2, 500, "cpu")),
    ],
)
def test_ranks_of_torchrun_share_their_machine(monkeypatch, variables, want) -> None:
    monkeypatch.setattr(surroundings_of_trainer, "_total_bytes", lambda device: 1000)
    place = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost"}
    for name, value in {**place, "MASTER_PORT": "29500", **variables}.items():
        monkeypatch.setenv(name, value)
    assert look_around([CPU], num_nodes=1, training=False) == want


@pytest.mark.parametrize(
    ("variables", "want"),
    [
        ({"SLURM_NNODES": "1"}, Cluster(1, 4, 250, "cpu")),
        ({"SLURM_NNODES": "2"}, Cluster(2, 2, 500, "cpu")),
        ({"SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "2"}, Cluster(2, 2, 500, "cpu")),
    ],
)
def test_ranks_of_slurm_share_their_machine(monkeypatch, variables, want) -> None:
    monkeypatch.setattr(surroundings_of_trainer, "_total_bytes", lambda device: 1000)
    place = {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
    for name, value in {**place, "SLURM_JOB_NODELIST": "a[1-2]", **variables}.items():
        monkeypatch.setenv(name, value)
    assert look_around([CPU], num_nodes=1, training=False) == want


# Trainers.


@pytest.fixture(scope="module")
def checkpoint(family_checkpoint):
    return str(family_checkpoint("qwen3_moe", num_experts=6))


def new_module(checkpoint):
    return MoELightningModule(checkpoint, task=Generate(max_new_tokens=5), dtype="float32")


def predict(trainer, checkpoint, module=None):
    module = module or new_module(checkpoint)
    batches = trainer.predict(module, DataLoader(PROMPTS, batch_size=2))
    return {row["id"]: row["token_ids"] for batch in batches for row in batch}


@pytest.fixture
def want(checkpoint, tmp_path):
    return predict(quiet_trainer(tmp_path), checkpoint)


def test_the_name_becomes_a_single_device(checkpoint, tmp_path, want, capfd) -> None:
    trainer = quiet_trainer(tmp_path, strategy="moe_auto", devices="auto")
    assert predict(trainer, checkpoint) == want
    assert isinstance(trainer.strategy, SingleDeviceStrategy)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("moe_auto: ")]
    assert len(lines) == 3


def set_cluster(monkeypatch, cluster):
    monkeypatch.setattr("moe_lightning.strategies.choosing.look_around", lambda *_, **__: cluster)


def test_the_name_becomes_a_placement(checkpoint, tmp_path, want, monkeypatch) -> None:
    set_cluster(monkeypatch, Cluster(1, 2, 200_000, "cpu"))
    trainer = quiet_trainer(tmp_path, strategy="moe_auto", devices=2)
    assert predict(trainer, checkpoint) == want
    assert isinstance(trainer.strategy, PlacementStrategy)
    assert trainer.strategy.placement.num_slots == 2
    assert predict(trainer, checkpoint) == want  # the choice stays


def test_the_name_becomes_workers(checkpoint, tmp_path, want, monkeypatch) -> None:
    set_cluster(monkeypatch, Cluster(1, 3, 200_000, "cpu"))
    monkeypatch.setattr("moe_lightning.placement.estimates.FEW_DEVICES", 2)
    trainer = quiet_trainer(tmp_path, strategy="moe_auto", devices=3)
    assert predict(trainer, checkpoint) == want
    assert isinstance(trainer.strategy, RPCStrategy)
    assert trainer.strategy.num_workers == 2


def test_select_gives_a_strategy_for_a_trainer(checkpoint, tmp_path, want, capfd) -> None:
    strategy = MoEStrategy.select(checkpoint, devices=[CPU])
    assert len(capfd.readouterr().err.splitlines()) == 3
    assert isinstance(strategy, SingleDeviceStrategy)
    assert predict(quiet_trainer(tmp_path, strategy=strategy), checkpoint) == want
    chosen = MoEStrategy.select(checkpoint, devices=[CPU] * 2, training=True)
    assert isinstance(chosen, ShardedStrategy)
    assert chosen.given_sizes["ep"] == 2


def test_too_little_memory_is_said_before_anything_is_read(
    checkpoint, tmp_path, monkeypatch
) -> None:
    set_cluster(monkeypatch, Cluster(1, 1, 1000, "cpu"))
    module = MoELightningModule(checkpoint)
    with pytest.raises(UsageError, match="Nothing fits"):
        quiet_trainer(tmp_path, strategy="moe_auto").predict(module, DataLoader(PROMPTS))
    assert module.model is None
    assert module.view.bytes_read == 0


def test_other_modules_are_refused(tmp_path) -> None:
    with pytest.raises(UsageError, match="LightningModule has none"):
        quiet_trainer(tmp_path, strategy="moe_auto").predict(
            L.LightningModule(), DataLoader(PROMPTS)
        )


def test_several_machines_without_a_launcher_are_refused(checkpoint, tmp_path) -> None:
    trainer = quiet_trainer(tmp_path, strategy="moe_auto", num_nodes=2)
    with pytest.raises(UsageError, match="torchrun"):
        trainer.predict(MoELightningModule(checkpoint), DataLoader(PROMPTS))


def predict_on_rank(checkpoint, directory, machine_bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(surroundings_of_trainer, "_total_bytes", lambda device: machine_bytes)
        trainer = quiet_trainer(directory, strategy="moe_auto")
        module = new_module(checkpoint)
        rows = predict(trainer, checkpoint, module)
    num_bytes = sum(p.numel() * p.element_size() for p in module.model.parameters())
    return str(trainer.strategy.sizes), trainer.world_size, rows, num_bytes


@pytest.mark.parametrize(("machine_bytes", "mesh"), [(10**9, "dp_replicate 2"), (500_000, "ep 2")])
def test_ranks_choose_alike(checkpoint, tmp_path, want, machine_bytes, mesh) -> None:
    results = run_on_ranks(2, predict_on_rank, checkpoint, str(tmp_path), machine_bytes)
    sizes = measure(read_config(checkpoint), dtype=torch.float32)
    row = {"dp_replicate 2": "copies", "ep 2": "ep"}[mesh]
    planned = estimate(sizes, Cluster(1, 2, machine_bytes // 2, "cpu"))[row].device_bytes
    for found, world_size, _, num_bytes in results:
        assert mesh in found
        assert world_size == 2
        assert num_bytes == planned  # three of six experts each, under ep
    rows = [row for _, _, rows, _ in results for row in rows.items()]
    assert dict(rows) == want
