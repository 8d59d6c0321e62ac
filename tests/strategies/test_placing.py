"""From sizes, devices and options to a placement that fits; nothing is loaded."""

import json

import pytest
import torch
from transformers import Qwen3MoeConfig

from moe_lightning.errors import UsageError
from moe_lightning.modeling.loading import build_on_meta
from moe_lightning.placement import ExpertPlacement
from moe_lightning.strategies.placing import PlacementOptions, SlotRoom, choose_placement

# Two layers of 8 experts. An expert is 3 matrices of 1024 x 1024: 12,582,912 bytes in fp32.
EXPERT_BYTES = 12_582_912
NUM_EXPERTS = 16
RESERVE_BYTES = 300 * 2**20


@pytest.fixture(scope="module")
def config():
    return Qwen3MoeConfig(
        vocab_size=1000,
        hidden_size=1024,
        moe_intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=128,
        num_experts=8,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
    )


# Embeddings and head 2 * 1000 * 1024; the final norm 1024; per layer four attention matrices of
# 1024 x 1024, norms of heads 2 * 128, the router 8 * 1024, two norms 2 * 1024.
DENSE_BYTES = 4 * (2 * 1000 * 1024 + 1024 + 2 * (4 * 1024**2 + 256 + 8 * 1024 + 2 * 1024))


@pytest.fixture
def place(config):
    """The placement for devices of so many free bytes beyond what is kept."""

    def place(devices, free, *, dtype=torch.float32, backend="auto", **options):
        return choose_placement(
            build_on_meta(config, dtype=dtype),
            [
                SlotRoom(f"{number}:{name}", name, torch.device(name).type, backend)
                for number, name in enumerate(devices)
            ],
            PlacementOptions(**options),
            free_bytes={name: num_bytes + RESERVE_BYTES for name, num_bytes in free.items()},
            home=devices[0],
        )

    return place


def counts(placement):
    """Experts of each slot, over all layers."""
    return [
        sum(len(experts) for experts in placement.experts_by_layer(slot).values())
        for slot in range(placement.num_slots)
    ]


def test_with_room_the_policy_decides(place):
    assert place(["cpu", "cpu"], {"cpu": 10**12}).slots[1] == ((0,),) * 4 + ((1,),) * 4
    placement = place(["cpu"] * 3, {"cpu": 10**12}, policy="round_robin")
    assert placement.slots[0] == tuple((e % 3,) for e in range(8))


def test_a_small_device_gets_what_it_has_room_for(place):
    free = {"cuda:0": DENSE_BYTES + 4 * EXPERT_BYTES, "cpu": 10**12}
    assert counts(place(["cuda:0", "cpu"], free)) == [4, 12]


def test_the_dense_layers_may_fill_the_first_device(place):
    free = {"cuda:0": DENSE_BYTES, "cpu": NUM_EXPERTS * EXPERT_BYTES}
    assert counts(place(["cuda:0", "cpu"], free)) == [0, 16]


@pytest.mark.parametrize("policy", ["linear", "round_robin"])
def test_one_byte_too_little_is_refused_with_the_numbers(place, policy):
    needed = DENSE_BYTES + NUM_EXPERTS * EXPERT_BYTES
    assert counts(place(["cpu"], {"cpu": needed}, policy=policy)) == [16]
    with pytest.raises(UsageError) as error:
        place(["cpu"], {"cpu": needed - 1}, policy=policy)
    message = str(error.value)
    # 16 experts of 12.58 MB; what is left for them beside the dense layers is one byte less.
    assert "0.201 GB" in message
    assert "0.013 GB" in message
    assert "--model.dtype bfloat16" in message


def test_a_file_that_does_not_fit_is_refused_with_a_table(place, tmp_path):
    file = tmp_path / "placement.json"
    ExpertPlacement(2, {layer: ((1,),) * 7 + ((0,),) for layer in range(2)}).save(file)
    options = {"policy": "file", "file": file}
    free = {"cuda:0": DENSE_BYTES + 2 * EXPERT_BYTES, "cpu": 14 * EXPERT_BYTES}
    assert counts(place(["cuda:0", "cpu"], free, **options)) == [2, 14]
    with pytest.raises(UsageError) as error:
        place(["cuda:0", "cpu"], free | {"cpu": 12 * EXPERT_BYTES}, **options)
    # On the host 14 * 12.58 MB; there are 12 * 12.58 MB and the 314.57 MB that are kept free.
    assert "cpu         0.176      0.466  1:cpu  ◀ 0.025 GB too much" in str(error.value)


@pytest.mark.parametrize(
    ("backend", "dtype", "devices", "num_bytes"),
    [
        ("auto", torch.float32, ["cpu", "cpu"], 4),
        ("auto", torch.bfloat16, ["cpu", "cpu"], 2),
        ("cpu_half", torch.float32, ["cpu", "cpu"], 2),
        ("cpu_int8", torch.float32, ["cpu", "cpu"], 1),
        # Not on a GPU: room for the larger of the two kinds is asked for.
        ("cpu_int8", torch.bfloat16, ["cuda:0", "cpu"], 2),
    ],
)
def test_the_backend_and_the_dtype_decide_what_an_expert_takes(
    place, backend, dtype, devices, num_bytes
):
    expert_bytes = EXPERT_BYTES // 4 * num_bytes
    dense_bytes = DENSE_BYTES // 4 * dtype.itemsize
    free = {"cuda:0": dense_bytes + 16 * expert_bytes, "cpu": dense_bytes + 16 * expert_bytes}
    settings = {"backend": backend, "dtype": dtype}
    if devices[0] == "cpu":
        assert sum(counts(place(devices, free, **settings))) == 16
        with pytest.raises(UsageError, match="GB"):
            place(devices, {"cpu": free["cpu"] - 2 * expert_bytes}, **settings)
    else:
        few = {"cuda:0": dense_bytes + 5 * expert_bytes, "cpu": 10 * expert_bytes}
        with pytest.raises(UsageError, match="GB"):
            place(devices, few, **settings)


def test_slots_of_one_device_share_its_room(place):
    free = {"cuda:0": DENSE_BYTES + 6 * EXPERT_BYTES, "cpu": 10 * EXPERT_BYTES}
    placement = place(["cuda:0", "cpu", "cuda:0", "cpu"], free)
    on_gpu, on_cpu = counts(placement)[0::2], counts(placement)[1::2]
    assert (sum(on_gpu), sum(on_cpu)) == (6, 10)


def test_balanced_by_a_file_of_loads_with_replicas(place, tmp_path):
    file = tmp_path / "loads.json"
    file.write_text(json.dumps({"loads": {"0": [90, 1, 1, 1, 1, 1, 1, 1], "1": [1] * 7 + [90]}}))
    placement = place(["cpu"] * 3, {"cpu": 10**12}, policy="balanced", loads=file, replicas=2)
    # The busy expert of each layer is on every slot.
    assert placement.slots[0][0] == placement.slots[1][7] == (0, 1, 2)
    assert counts(placement) in ([7, 7, 6], [7, 6, 7], [6, 7, 7])


def test_an_unknown_policy_is_refused_with_the_known_ones():
    with pytest.raises(UsageError) as error:
        PlacementOptions("best").check()
    for word in ("best", "linear", "round_robin", "balanced", "file"):
        assert word in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"policy": "round_robin"},
        {"policy": "balanced", "loads": "l.json"},
        {"policy": "balanced", "loads": "l.json", "replicas": 3},
        {"policy": "file", "file": "p.json"},
    ],
)
def test_options_that_go_together(options):
    PlacementOptions(**options).check()
