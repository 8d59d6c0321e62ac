"""Every family's experts go through the seam, and the model computes what it did before."""

import pytest
import torch
from transformers import AutoConfig

from moe_lightning.dispatch import LocalDispatcher
from moe_lightning.errors import CheckpointError
from moe_lightning.modeling.loading import build_on_meta
from moe_lightning.modeling.seam import attach, dispatcher_of, find_moe_layers

# fp32 sums in another order; logits are of order 1.
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def test_logits_equal_transformers(
    family, backend, family_checkpoint, plain_transformers, loaded_runner, random_ids
):
    path = family_checkpoint(family)
    plain, runner = plain_transformers(path), loaded_runner(path, backend)
    rows = [random_ids(length) for length in (60, 17, 1)]
    for side in ("left", "right"):
        with torch.inference_mode():
            logits_BSV = runner.logits(runner.pad(rows, side=side))
        for got_SV, ids in zip(logits_BSV, rows, strict=True):
            got_SV = got_SV[-len(ids) :] if side == "left" else got_SV[: len(ids)]
            torch.testing.assert_close(got_SV, plain.logits(ids), **TOLERANCE)


def test_every_experts_module_is_found_with_its_router(family, family_checkpoint, loaded_runner):
    model = loaded_runner(family_checkpoint(family)).model
    layers = find_moe_layers(model)
    experts = [m for m in model.modules() if type(m).__name__.endswith("Experts")]
    assert [layer.experts for layer in layers] == experts
    has_dense_layer = family in ("deepseek_v2", "deepseek_v3", "glm4_moe")
    assert [layer.layer for layer in layers] == [0, 1, 2][has_dense_layer:]
    for layer in layers:
        assert layer.num_experts == 8
        assert isinstance(dispatcher_of(layer), LocalDispatcher)
        assert dispatcher_of(layer).layer == layer.layer
        shapes = []
        hook = layer.router.register_forward_hook(
            lambda _, __, out, shapes=shapes: shapes.append([tuple(o.shape) for o in out])
        )
        with torch.inference_mode():
            model(torch.tensor([[5, 6, 7]]))
        hook.remove()
        assert shapes == [[(3, 8), (3, 2), (3, 2)]]


def test_padding_never_travels(family_checkpoint, loaded_runner, random_ids):
    runner = loaded_runner(family_checkpoint("qwen3_moe"))
    log = dispatcher_of(find_moe_layers(runner.model)[0]).log
    traces = []
    log.subscribe(traces.append)
    rows = [random_ids(9), random_ids(4)]
    with torch.inference_mode():
        runner.logits(runner.pad(rows, side="left"))
        runner.logits(runner.pad(rows[:1], side="left"))
    log.unsubscribe(traces.append)
    assert [trace.index_TK.shape for trace in traces] == [(13, 2)] * 3 + [(9, 2)] * 3
    assert runner.padding.real_rows_R is None


def test_attached_dispatchers_stay_out_of_the_module_tree(family_checkpoint, loaded_runner):
    path = family_checkpoint("qwen3_moe")
    on_meta = build_on_meta(AutoConfig.from_pretrained(path))
    assert list(loaded_runner(path).model.state_dict()) == list(on_meta.state_dict())


def _tiny(family, **settings):
    config = AutoConfig.for_model(family, **settings)
    for name in ("num_hidden_layers", "n_layers"):
        if hasattr(config, name):
            setattr(config, name, 2)
    return config


@pytest.mark.parametrize(
    ("family", "settings", "names"),
    [
        ("llama4_text", {}, ("Llama4ForCausalLM", "Llama4TextExperts")),
        ("dbrx", {"attn_config": {"rope_theta": 1e4}}, ("DbrxForCausalLM", "DbrxExperts")),
        ("jetmoe", {}, ("JetMoeForCausalLM", "JetMoeParallelExperts")),
    ],
)
def test_experts_outside_the_contract_are_named(family, settings, names):
    model = build_on_meta(_tiny(family, **settings))
    with pytest.raises(CheckpointError) as caught:
        find_moe_layers(model)
    assert all(name in str(caught.value) for name in names)
    assert "contract" in str(caught.value)


def test_only_experts_are_blamed():
    """The family is called JetMoe, so all its classes have "moe" in their names."""
    with pytest.raises(CheckpointError) as caught:
        find_moe_layers(build_on_meta(_tiny("jetmoe")))
    assert "Norm" not in str(caught.value)
    assert "RotaryEmbedding" not in str(caught.value)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_dense_model_is_refused_by_name(family):
    model = build_on_meta(_tiny(family))
    with pytest.raises(CheckpointError, match=rf"{type(model).__name__} is a dense model"):
        attach(model, lambda layer: pytest.fail(f"dispatcher for {layer.name}"))
