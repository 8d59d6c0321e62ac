"""A model loaded in shares: some experts here, the others elsewhere, packed layer by layer."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_moe import modeling_qwen3_moe

import moe_lightning
from moe_lightning.errors import CheckpointError
from moe_lightning.modeling import filling
from moe_lightning.modeling.checkpoint import open_checkpoint
from moe_lightning.modeling.loading import load_experts, load_model
from moe_lightning.modeling.seam import EXPERTS_IMPLEMENTATION, find_moe_layers

CPU = torch.device("cpu")
SHARES = ([0, 3, 5], [1, 2], [], [4, 6, 7])


def load(view, *, experts=None, on_layer=None, dtype=torch.float32):
    return load_model(
        view, device=CPU, dtype=dtype, experts=experts, on_layer=on_layer, show_progress=False
    )


def load_share(view, experts, *, on_layer=None, dtype=torch.float32):
    return load_experts(
        view, device=CPU, dtype=dtype, experts=experts, on_layer=on_layer, show_progress=False
    )


def is_of_experts(name):
    """Whether a name on disk is of routed experts, in any of the families."""
    is_fused = name.endswith(("input_linear.weight", "output_linear.weight"))
    return (".experts." in name or is_fused) and "shared" not in name and "norm" not in name


def expert_bytes(view, layers, num_chosen):
    """Bytes on disk of some of the 8 experts, which are of one size, of each of some layers."""
    names = [n for n in view.tensors if any(f".layers.{i}." in n for i in layers)]
    infos = [view.tensors[name] for name in names if is_of_experts(name)]
    return sum(info.end - info.start for info in infos) * num_chosen // 8


def edit_tensors(path, out, change):
    """A copy of a checkpoint of one file, its tensors changed."""
    shutil.copytree(path, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def fused_checkpoint(family_checkpoint, plain_transformers, tmp_path_factory):
    """A family's checkpoint in the model's own names: all experts of a layer in one tensor."""

    def make(family):
        def fuse(tensors):
            tensors.clear()
            tensors |= plain_transformers(family_checkpoint(family)).model.state_dict()

        out = tmp_path_factory.mktemp("fused") / family
        return edit_tensors(family_checkpoint(family), out, fuse)

    return make


def check_shares(path, plain):
    """Load SHARES of every layer, the first with the model; compare with the whole, bitwise."""
    whole = {layer.layer: layer for layer in find_moe_layers(plain)}
    view = open_checkpoint(path)
    model = load(view, experts=dict.fromkeys(whole, SHARES[0]))
    assert view.bytes_read == view.num_bytes - expert_bytes(view, whole, 5)
    loads = [{layer.layer: layer.experts for layer in find_moe_layers(model)}]
    for ids in SHARES[1:]:
        num_read = view.bytes_read
        loads.append(load_share(view, dict.fromkeys(whole, ids)))
        assert view.bytes_read - num_read == expert_bytes(view, whole, len(ids))
    for ids, modules in zip(SHARES, loads, strict=True):
        assert modules.keys() == (whole.keys() if ids else set())
        for index, experts in modules.items():
            assert type(experts) is type(whole[index].experts)
            assert not experts.training
            assert experts.num_experts == len(ids)
            want = dict(whole[index].experts.named_parameters())
            got = dict(experts.named_parameters())
            assert got.keys() == want.keys()
            for name, parameter in got.items():
                assert parameter.dtype == want[name].dtype, name
                assert torch.equal(parameter, want[name][ids]), (index, name)
    # What is not of the experts is there once, with the first share.
    names = {f"{layer.name}.{n}" for layer in whole.values() for n in layer.experts.state_dict()}
    want = plain.state_dict()
    for name, tensor in model.state_dict().items():
        assert name in names or torch.equal(tensor, want[name]), name


def test_shares_of_experts_make_up_the_whole(family, family_checkpoint, plain_transformers):
    path = family_checkpoint(family)
    check_shares(path, plain_transformers(path).model)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_shares_of_a_fused_checkpoint(
    family, fused_checkpoint, family_checkpoint, plain_transformers
):
    path = fused_checkpoint(family)
    assert not any(".experts.0." in name for name in open_checkpoint(path).tensors)
    check_shares(path, plain_transformers(family_checkpoint(family)).model)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "granitemoe"])
def test_every_tensor_alone_in_flight(family, monkeypatch, family_checkpoint, plain_transformers):
    """As for tensors that are larger than what may be in flight at once."""
    parts = []
    convert = filling.convert_and_load_state_dict_in_model

    def record(model, tensors, load_config):
        missing = set(model.state_dict())
        info, index = convert(model, tensors, load_config)
        parts.append(missing - info.missing_keys)
        return info, index

    monkeypatch.setattr(filling, "PART_BYTES", 1)
    monkeypatch.setattr(filling, "convert_and_load_state_dict_in_model", record)
    path = family_checkpoint(family)
    check_shares(path, plain_transformers(path).model)
    assert parts
    assert all(len(part) == 1 for part in parts)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_shares_in_half_precision(family, family_checkpoint):
    path = family_checkpoint(family)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    modules = load_share(open_checkpoint(path), {0: [6, 1], 2: [3]}, dtype=torch.bfloat16)
    layers = find_moe_layers(plain)
    for index, ids in {0: [6, 1], 2: [3]}.items():
        for name, parameter in modules[index].named_parameters():
            want = getattr(layers[index].experts, name)
            assert parameter.dtype == want.dtype
            assert torch.equal(parameter, want[ids])


def test_a_layer_may_have_no_experts_here(family, family_checkpoint, plain_transformers):
    path = family_checkpoint(family)
    view = open_checkpoint(path)
    model = load(view, experts={1: []}, dtype=torch.bfloat16)
    assert view.bytes_read == view.num_bytes - expert_bytes(view, [1], 8)
    empty = next(layer for layer in find_moe_layers(model) if layer.layer == 1)
    whole = plain_transformers(path).model.get_submodule(empty.name)
    assert empty.num_experts == 0
    for name, parameter in empty.experts.named_parameters():
        assert parameter.shape == (0, *getattr(whole, name).shape[1:])
        assert parameter.device == CPU
        assert parameter.dtype == torch.bfloat16


def test_empty_experts_keep_the_dtype_that_the_family_insists_on(monkeypatch, family_checkpoint):
    family_class = modeling_qwen3_moe.Qwen3MoeForCausalLM
    monkeypatch.setattr(family_class, "_keep_in_fp32_modules_strict", {"down_proj"})
    model = load(
        open_checkpoint(family_checkpoint("qwen3_moe")), experts={0: []}, dtype=torch.bfloat16
    )
    for layer in find_moe_layers(model):
        assert layer.experts.gate_up_proj.dtype == torch.bfloat16
        assert layer.experts.down_proj.dtype == torch.float32


def test_a_share_computes_with_the_familys_own_forward(
    family, family_checkpoint, plain_transformers
):
    """Also beside a model whose experts are computed by us: the config is its own."""
    path = family_checkpoint(family)
    view = open_checkpoint(path)
    load(view).set_experts_implementation(EXPERTS_IMPLEMENTATION)
    ids = [1, 4, 6]
    module = load_share(view, {1: ids})[1]
    layers = find_moe_layers(plain_transformers(path).model)
    whole = next(layer.experts for layer in layers if layer.layer == 1)
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(9, 32, generator=generator)
    local_TK = torch.rand(9, 3, generator=generator).argsort(1)[:, :2]
    weights_TK = torch.rand(9, 2, generator=generator)
    with torch.inference_mode():
        got_TD = type(module).forward.__wrapped__(module, hidden_TD, local_TK, weights_TK)
        want_TD = whole(hidden_TD, torch.tensor(ids)[local_TK], weights_TK)
    # The same rows in the same products in the same order.
    assert torch.equal(got_TD, want_TD)
    assert want_TD.abs().sum() > 0


def test_what_is_not_of_one_expert_is_loaded_too(monkeypatch, family_checkpoint, tmp_path):
    """Muse Spark has a norm after its experts."""
    experts_class = modeling_qwen3_moe.Qwen3MoeExperts
    make = experts_class.__init__

    def make_with_norm(self, config):
        make(self, config)
        self.post_expert_norm = nn.RMSNorm(config.hidden_size)

    monkeypatch.setattr(experts_class, "__init__", make_with_norm)
    norms = {
        f"model.layers.{i}.mlp.experts.post_expert_norm.weight": torch.full((32,), i + 0.5)
        for i in range(3)
    }
    path = edit_tensors(
        family_checkpoint("qwen3_moe"), tmp_path / "normed", lambda tensors: tensors.update(norms)
    )
    view = open_checkpoint(path)
    modules = load_share(view, {0: [], 1: [5], 2: [7, 2]})
    assert {i: m.post_expert_norm.weight[0].item() for i, m in modules.items()} == {1: 1.5, 2: 2.5}
    assert view.bytes_read == expert_bytes(view, [1], 1) + expert_bytes(view, [2], 2) + 2 * 32 * 4


@pytest.mark.parametrize("shard_bytes", [50_000, 1 << 30])
def test_each_layer_is_announced_when_its_experts_are_filled(
    family, shard_bytes, family_checkpoint, plain_transformers
):
    view = open_checkpoint(family_checkpoint(family, shard_bytes=shard_bytes))
    plain = find_moe_layers(plain_transformers(family_checkpoint(family)).model)
    of_layer = [
        sum(info.end - info.start for name, info in view.tensors.items() if f".layers.{i}." in name)
        for i in range(3)
    ]
    announced = []

    def on_layer(layer):
        announced.append(layer)
        whole = plain[len(announced) - 1]
        assert (layer.layer, layer.name) == (whole.layer, whole.name)
        for name, parameter in layer.experts.named_parameters():
            assert torch.equal(parameter, getattr(whole.experts, name)), name
        assert view.bytes_read <= view.num_bytes - sum(of_layer[layer.layer + 1 :])

    model = load(view, on_layer=on_layer)
    assert announced == find_moe_layers(model)
    assert view.bytes_read == view.num_bytes


def test_layers_of_a_share_are_announced_too(family_checkpoint):
    view = open_checkpoint(family_checkpoint("qwen3_moe"))
    announced = []

    def on_layer(layer):
        announced.append((layer.layer, layer.num_experts, view.bytes_read))

    load_share(view, {2: [1, 2, 3], 0: [4], 1: []}, on_layer=on_layer)
    first, second = expert_bytes(view, [0], 1), expert_bytes(view, [2], 3)
    assert announced == [(0, 1, first), (2, 3, first + second)]


@pytest.mark.parametrize("way", ["data", "parameter"])
def test_weights_may_be_taken_away_as_they_come(way, family, family_checkpoint):
    """Nothing then initialises, moves or misses the parameters that are left."""

    def take(layer):
        for name, parameter in list(layer.experts.named_parameters()):
            left = torch.full((), math.nan).expand(parameter.shape)
            if way == "data":
                parameter.data = left
            else:
                setattr(layer.experts, name, nn.Parameter(left))

    model = load(open_checkpoint(family_checkpoint(family)), experts={1: []}, on_layer=take)
    for layer in find_moe_layers(model):
        for parameter in layer.experts.parameters():
            assert parameter.isnan().all()
            assert set(parameter.stride()) == {0}
            assert parameter.shape[0] == (0 if layer.layer == 1 else 8)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({1: [8]}, r"experts \[8\] of layer 1"),
        ({0: [], 2: [1, 1]}, r"experts \[1, 1\] of layer 2"),
        ({3: [0]}, r"layers \[3\] have no experts"),
        ({-1: []}, r"layers \[-1\] have no experts"),
    ],
)
def test_shares_of_what_does_not_exist(experts, message, family_checkpoint):
    view = open_checkpoint(family_checkpoint("mixtral"))
    with pytest.raises(ValueError, match=message):
        load_share(view, experts)
    assert view.bytes_read == 0


def test_a_share_of_nothing(family_checkpoint):
    view = open_checkpoint(family_checkpoint("mixtral"))
    assert load_share(view, {}) == {}
    assert load_share(view, {0: [], 2: []}) == {}
    assert view.bytes_read == 0


@pytest.mark.parametrize("ending", ["experts.5.w2.weight", "w2.weight", "weight"])
def test_a_share_whose_tensors_are_missing(ending, family_checkpoint, tmp_path):
    def remove(tensors):
        doomed = [n for n in tensors if ".layers.1.block_sparse_moe.experts." in n]
        for name in doomed:
            if name.endswith(ending):
                del tensors[name]

    path = edit_tensors(family_checkpoint("mixtral"), tmp_path / "lacking", remove)
    with pytest.raises(CheckpointError, match=r"down_proj"):
        load_share(open_checkpoint(path), {0: [2], 1: [5, 6]})


def test_loading_leaves_the_views_config_alone(family_checkpoint):
    view = open_checkpoint(family_checkpoint("qwen3_moe", dtype="bfloat16"))
    before = json.loads(view.config.to_json_string(use_diff=False))
    load(view).set_experts_implementation(EXPERTS_IMPLEMENTATION)
    assert json.loads(view.config.to_json_string(use_diff=False)) == before


PEAK = """
import json, math, sys
from pathlib import Path
import torch
from moe_lightning.modeling.checkpoint import open_checkpoint
from moe_lightning.modeling.loading import load_experts, load_model

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[key].split()[0]) * 1024

def pack(layer):
    for p in layer.experts.parameters():
        sizes.append(p.numel() * p.element_size())
        p.data = torch.full((), math.nan).expand(p.shape)

view = open_checkpoint(sys.argv[1])
sizes = []
options = {"device": torch.device("cpu"), "dtype": torch.float32, "show_progress": False}
load_experts(view, experts={0: [0]}, **options)  # imports
Path("/proc/self/clear_refs").write_text("5")
start = status("VmRSS")
if sys.argv[2] == "model":
    load_model(view, on_layer=pack, **options)
else:
    load_experts(view, experts={i: range(16) for i in range(8)}, on_layer=pack, **options)
print(json.dumps({"experts": sum(sizes), "largest": max(sizes), "peak": status("VmHWM") - start}))
"""


@pytest.mark.parametrize("what", ["model", "experts"])
@pytest.mark.parametrize(
    ("family", "dtype"), [("qwen3_moe", "float32"), ("granitemoe", "bfloat16")]
)
def test_peak_memory_of_packing_is_a_layer(what, family, dtype, family_checkpoint):
    """Packed to nothing here: what remains is the peak of loading one layer."""
    sizes = {"num_layers": 8, "num_experts": 16, "hidden_size": 512, "expert_size": 512}
    path = family_checkpoint(family, dtype=dtype, **sizes)
    environment = os.environ | {"PYTHONPATH": str(Path(moe_lightning.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(path), what],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    layer_bytes = 16 * 3 * 512 * 512 * 4
    assert result["experts"] == 8 * layer_bytes
    assert result["largest"] == layer_bytes * 2 / 3
    # 400 MB of experts; the slack is for the dense part and read buffers, and less than two layers.
    assert result["peak"] <= layer_bytes + result["largest"] + 64e6, result
