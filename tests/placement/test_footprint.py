"""Bytes on devices and bytes that travel: by hand, and the sizes of real models."""

from dataclasses import replace

import pytest
import torch
from transformers import Qwen3MoeConfig

from moe_lightning.errors import CheckpointError, UsageError
from moe_lightning.finetune.lora import LoRA, add_adapters
from moe_lightning.modeling.loading import build_on_meta
from moe_lightning.modeling.model_sizes import measure, read_config
from moe_lightning.placement import footprint, traffic
from moe_lightning.placement.cluster import Cluster, in_gb, parse_cluster
from moe_lightning.placement.footprint import LayerSizes, ModelSizes, TensorParallelPlan

# A dense layer, then one with four experts of 20 bytes. 95 bytes of dense weights in all.
SIZES = ModelSizes(
    name="Tiny",
    dtype="float32",
    row_bytes=8,
    layers=(LayerSizes(10), LayerSizes(20, 80, 4)),
    embedding_bytes=30,
    head_bytes=30,
    other_bytes=5,
    top_k=2,
    num_heads=(4, 2),
    tensor_parallel=TensorParallelPlan(whole_bytes=35, num_sums=4),
)
WITH_LORA = replace(SIZES, adapter_bytes=4)
TIED = replace(SIZES, head_bytes=0)


def test_totals() -> None:
    assert (SIZES.num_bytes, SIZES.dense_bytes, SIZES.expert_bytes) == (175, 95, 80)
    assert (SIZES.outside_bytes, SIZES.num_experts) == (65, 4)


@pytest.mark.parametrize(
    ("sizes", "options", "want"),
    [
        (SIZES, {}, 175),
        (SIZES, {"training": True}, 4 * 175),  # weights, gradients, two averages
        (SIZES, {"training": True, "is_mixed": True}, 4 * 175 + 87),  # and half copies
        (SIZES, {"training": True, "is_ddp": True}, 5 * 175),  # and buckets of gradients
        (WITH_LORA, {"training": True}, 175 + 4 * 4),
        (WITH_LORA, {"training": True, "is_ddp": True}, 175 + 5 * 4),
        (WITH_LORA, {}, 175),
    ],
)
def test_a_whole_copy(sizes, options, want) -> None:
    assert footprint.copy_bytes(sizes, **options) == want


@pytest.mark.parametrize(
    ("rooms", "want"),
    [
        ([200], [175]),
        ([200, 200], [95 + 40, 40]),
        ([120, 200], [120, 55]),  # home has 25 left, so the other takes more
        ([120, 200, 30], [120, 27, 28]),
        ([95, 80], [95, 80]),
        ([94, 80], [95, 80]),  # not even the dense layers fit at home
        ([100, 60], [135, 40]),  # too little, so the even share is told
    ],
)
def test_experts_are_spread_over_slots_as_their_room_allows(rooms, want) -> None:
    assert footprint.placed_bytes(SIZES, rooms) == want


def test_workers_hold_whole_experts() -> None:
    assert footprint.rpc_bytes(SIZES, 2) == (95, 40)
    assert footprint.rpc_bytes(SIZES, 3) == (95, 40)  # one of them holds two
    assert footprint.rpc_bytes(SIZES, 9) == (95, 20)


@pytest.mark.parametrize(
    ("sizes", "options", "want"),
    [
        # Half of all; the output embedding and the largest layer are whole.
        (SIZES, {"fsdp": 2}, 48 + 40 + 30 + 100),
        (TIED, {"fsdp": 2}, 33 + 40 + 30 + 100),
        # Eight ranks, four experts: some ranks have one, others none.
        (SIZES, {"fsdp": 8}, 12 + 20 + 30 + 100),
        # Experts stay where they are, but a layer of FSDP is copied to compute with.
        (SIZES, {"fsdp": 2, "ep": 2}, 48 + 40 + 30 + 60),
        (SIZES, {"fsdp": 2, "ep": 2, "shards_dense": False}, 95 + 40),
        # Two experts are shared by two ranks and gathered.
        (SIZES, {"fsdp": 4, "ep": 2, "shards_dense": False}, 95 + 20 + 40),
        (SIZES, {"fsdp": 2, "training": True}, 4 * 88 + 2 * 130),
        (SIZES, {"fsdp": 2, "training": True, "is_mixed": True}, 4 * 88 + 2 * 65),
        (WITH_LORA, {"fsdp": 2, "training": True}, 88 + 4 * 2 + 130),
        (SIZES, {"fsdp": 1, "training": True}, 4 * 175),
    ],
)
def test_shares_of_fsdp_and_expert_parallelism(sizes, options, want) -> None:
    assert footprint.sharded_bytes(sizes, **options) == want


def test_experts_that_cannot_be_shared_evenly_are_so_over_the_layers() -> None:
    uneven = replace(SIZES, layers=(LayerSizes(0, 50, 5), LayerSizes(0, 50, 5)))
    assert footprint.rpc_bytes(uneven, 2) == (65, 50)  # 3 and 2 of them, then 2 and 3
    assert footprint.sharded_bytes(uneven, fsdp=2, ep=2, shards_dense=False) == 65 + 50


def test_parts_of_tensor_parallelism() -> None:
    assert footprint.tensor_parallel_bytes(SIZES, 2) == 30 + 5 + (110 + 30) // 2
    assert footprint.tensor_parallel_bytes(SIZES, 2, training=True) == 4 * 105
    assert footprint.tensor_parallel_bytes(WITH_LORA, 2, training=True) == 105 + 4 * 2


def test_the_fullest_pipeline_stage() -> None:
    assert footprint.pipeline_bytes(SIZES, 1) == 175
    assert footprint.pipeline_bytes(SIZES, 2) == 100 + 30 + 5
    # Its logits come from the input embedding.
    assert footprint.pipeline_bytes(TIED, 2) == 100 + 30 + 5


# Bytes that travel.


def test_what_goes_with_a_row() -> None:
    # There: 8 bytes, two experts and two float32 weights; back: 8 bytes.
    assert traffic.row_to_slot(SIZES) == 8 + 2 * 8 + 2 * 4 + 8
    assert traffic.row_to_worker(SIZES) == 8 + 2 * 2 + 2 * 4 + 8
    assert traffic.row_to_rank(SIZES) == 32 + 8  # 8 + 2 * 4 + 2 * 4, in steps of 16


def test_a_row_goes_once_to_each_slot_that_has_experts_for_it() -> None:
    # Half of the layers have experts.
    assert traffic.placement_traffic(SIZES, [0.9, 0.5, 0.25]) == 0.75 * 40 / 2
    assert traffic.rpc_traffic(SIZES, [0.5, 0.25], 11) == (0.75 * 28 + 2 * 44 / 11) / 2
    assert traffic.exchange_traffic(SIZES, [0.8, 0.7]) == 1.5 / 2 * 40 / 2
    assert traffic.exchange_traffic(SIZES, [0.8, 0.7], training=True) == 1.5 * 40 / 2
    assert traffic.placement_traffic(SIZES, [1.0]) == 0


def test_fsdp_gathers_the_weights_of_a_step() -> None:
    # 10 + 20 of dense layers, 80 of experts and the embedding's 30, half of which come from the
    # other rank; over two layers and ten tokens. The head and the last norm stay.
    assert traffic.weight_traffic(SIZES, 10, fsdp=2) == 140 / 2 / 10 / 2
    assert traffic.weight_traffic(TIED, 10, fsdp=2) == 110 / 2 / 10 / 2
    step = 3 * 140 + 2 * 35
    assert traffic.weight_traffic(SIZES, 10, fsdp=2, training=True) == step / 2 / 10 / 2
    step = 2 * 140 + 35
    assert traffic.weight_traffic(WITH_LORA, 10, fsdp=2, training=True) == step / 2 / 10 / 2
    assert traffic.weight_traffic(SIZES, 10, fsdp=2, ep=2) == 60 / 2 / 10 / 2
    assert traffic.weight_traffic(SIZES, 10, fsdp=2, ep=2, shards_dense=False) == 0
    # Of four experts three ranks gather six, with two of zeros.
    alone = replace(TIED, layers=(LayerSizes(0, 80, 4),))
    assert traffic.weight_traffic(alone, 10, fsdp=3) == pytest.approx(6 * 20 * 2 / 3 / 10)


def test_fsdp_of_a_published_model_moves_what_is_known_of_it() -> None:
    # Qwen3-30B-A3B's experts in bfloat16 on 8 GPUs: 152 GB for a step, whatever its tokens.
    layer = LayerSizes(0, 128 * 3 * 2048 * 768 * 2, 128)
    sizes = replace(SIZES, layers=(layer,) * 48, embedding_bytes=0, head_bytes=0, other_bytes=0)
    step = 48 * traffic.weight_traffic(sizes, 1, fsdp=8, training=True)
    assert step / 1e9 == pytest.approx(152.2, abs=0.1)


def test_sums_over_ranks() -> None:
    assert traffic.gradient_traffic(SIZES, 10, 2) == 2 * 175 / 2 / 10 / 2
    assert traffic.gradient_traffic(WITH_LORA, 10, 2) == 2 * 4 / 2 / 10 / 2
    # Four sums of 8 bytes, to the ring and back; 3 logits of float32 for the one embedding's rows.
    assert traffic.tensor_parallel_traffic(SIZES, 2, makes_logits=False) == 4 * 2 * 8 / 2
    assert traffic.tensor_parallel_traffic(SIZES, 2, makes_logits=True) == (4 * 2 * 8 + 3 * 4) / 2
    assert traffic.tensor_parallel_traffic(SIZES, 1, makes_logits=True) == 0
    assert traffic.pipeline_traffic(SIZES, 2) == 2 * 8 / 2


# Devices in words.


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("80GiB", (1, 1, 80 * 2**30)),
        ("4x80GiB", (1, 4, 80 * 2**30)),
        ("2x8x80GB", (2, 8, 80 * 10**9)),
        ("2 x 0.5 TB", (1, 2, 5 * 10**11)),
    ],
)
def test_devices_as_users_write_them(text, want) -> None:
    cluster = parse_cluster(text)
    assert (cluster.num_nodes, cluster.devices_per_node, cluster.device_bytes) == want


@pytest.mark.parametrize(
    "text", ["", "4", "4x", "x80GiB", "4x80", "4x80gib", "1x2x3x80GiB", "0x80GiB", "0GiB", "4x-1GB"]
)
def test_devices_that_are_not_understood(text) -> None:
    with pytest.raises(UsageError, match="4x80GiB"):
        parse_cluster(text)


def test_numbers_and_devices_for_people() -> None:
    assert [in_gb(n) for n in (0, 999, 1500, 2_500_000, 61.1e9)] == [
        *("0 B", "999 B", "1.5 KB", "2.5 MB", "61.1 GB")
    ]
    assert str(Cluster(1, 1, 2 * 10**9, "cpu")) == "a CPU with 2.0 GB in one machine"
    assert str(Cluster(2, 8, 80 * 10**9)) == "16 GPUs of 80.0 GB in 2 machines"


# Real models.


@pytest.mark.parametrize("tie", [False, True])
def test_measured_sizes_are_those_of_the_loaded_model(
    family, tie, family_checkpoint, plain_transformers
) -> None:
    path = family_checkpoint(family, tie=tie)
    model = plain_transformers(path).model
    sizes = measure(read_config(str(path)), dtype=torch.float32)
    by_name = {name: 4 * p.numel() for name, p in model.named_parameters()}
    assert sizes.num_bytes == sum(by_name.values())
    for index, layer in enumerate(sizes.layers):
        here = {n: b for n, b in by_name.items() if n.startswith(f"model.layers.{index}.")}
        assert layer.num_bytes == sum(here.values())
        assert layer.expert_bytes == sum(b for n, b in here.items() if ".experts." in n)
    assert sizes.embedding_bytes == 4 * model.get_input_embeddings().weight.numel()
    assert sizes.head_bytes == (0 if tie else sizes.embedding_bytes)
    assert (sizes.num_experts, sizes.top_k, sizes.row_bytes) == (8, 2, 4 * 32)


def test_backends_for_inference_pack_experts() -> None:
    # Small experts would be padded.
    config = Qwen3MoeConfig(
        hidden_size=1024, moe_intermediate_size=512, num_hidden_layers=2, num_experts=4
    )
    plain = measure(config, dtype=torch.float32)
    half = measure(config, dtype=torch.float32, experts_backend="cpu_half")
    assert half.expert_bytes == plain.expert_bytes // 2
    assert half.dense_bytes == plain.dense_bytes
    # A GPU has no such backend.
    on_gpu = measure(config, dtype=torch.float32, experts_backend="cpu_half", device_type="cuda")
    assert on_gpu.expert_bytes == plain.expert_bytes


def test_adapters_are_counted(family_checkpoint) -> None:
    config = read_config(str(family_checkpoint("qwen3_moe")))
    sizes = measure(config, dtype=torch.float32, lora_rank=3)
    # q and o: 32 x 32, k and v: 16 x 32; experts: 48 x 32 and 32 x 24. Three layers.
    attention = 2 * (32 + 32) + 2 * (16 + 32)
    experts = 8 * ((48 + 32) + (32 + 24))
    assert sizes.adapter_bytes == 4 * 3 * 3 * (attention + experts)
    assert not sizes.trains_all


def test_adapters_of_every_family_are_counted_as_they_are_added(family, family_checkpoint) -> None:
    config = read_config(str(family_checkpoint(family)))
    model = build_on_meta(config)
    add_adapters(model, LoRA(rank=4))
    added = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    assert measure(config, dtype=torch.float32, lora_rank=4).adapter_bytes == added


def test_config_json_alone_is_enough(family_checkpoint, tmp_path) -> None:
    path = family_checkpoint("olmoe")
    (tmp_path / "config.json").write_bytes((path / "config.json").read_bytes())
    alone, whole = (measure(read_config(str(p)), dtype=torch.float32) for p in (tmp_path, path))
    assert alone == whole


def test_a_directory_without_a_config_is_refused(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(str(tmp_path))
    with pytest.raises(CheckpointError, match="no/such/thing"):
        read_config("no/such/thing")
