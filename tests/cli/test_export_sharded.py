"""From shards to a directory that plain transformers loads."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_lightning import MoELightningModule
from moe_lightning.cli.export import export_checkpoint
from moe_lightning.errors import CheckpointError, UsageError
from moe_lightning.modeling import sharded_export
from moe_lightning.strategies.sharded_checkpoint import save_sharded

PROMPT = torch.tensor([[5, 17, 200, 3, 42, 8]])


def trained(checkpoint, path):
    """A model whose weights are not the checkpoint's, saved as shards."""
    module = MoELightningModule(str(checkpoint), dtype="float32")
    module.configure_model()
    module.hosted.unpack()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    save_sharded(Path(path), module.model, rows=module.hosted.rows, rest={})
    with torch.inference_mode():
        return module, module.model(PROMPT, use_cache=False).logits


def logits_of(directory):
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.inference_mode():
        return model.eval()(PROMPT, use_cache=False).logits


def test_export_is_what_save_pretrained_writes(family, family_checkpoint, tmp_path):
    """Bitwise: nothing is computed."""
    checkpoint = family_checkpoint(family)
    module, logits = trained(checkpoint, tmp_path / "x.ckpt")
    export_checkpoint(
        str(checkpoint), str(tmp_path / "x.ckpt"), str(tmp_path / "out"), dtype="float32"
    )
    module.export(tmp_path / "expected")
    got, want = (load_file(tmp_path / d / "model.safetensors") for d in ("out", "expected"))
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=0)
    # Experts are computed in another order of additions here than there.
    torch.testing.assert_close(logits_of(tmp_path / "out"), logits, rtol=1e-4, atol=1e-5)
    config, expected = (
        json.loads((tmp_path / d / "config.json").read_text()) for d in ("out", "expected")
    )
    assert config == expected
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("To be") == module.tokenizer("To be")


def test_export_of_tied_weights(family_checkpoint, tmp_path):
    checkpoint = shutil.copytree(family_checkpoint("qwen3_moe"), tmp_path / "tied")
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text()) | {"tie_word_embeddings": True}
    (checkpoint / "config.json").write_text(json.dumps(config))
    _, logits = trained(checkpoint, tmp_path / "x.ckpt")
    export_checkpoint(
        str(checkpoint), str(tmp_path / "x.ckpt"), str(tmp_path / "out"), dtype="float32"
    )
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(logits_of(tmp_path / "out"), logits, rtol=1e-4, atol=1e-5)


def test_export_in_another_precision(family_checkpoint, tmp_path):
    checkpoint = family_checkpoint("deepseek_v3")
    trained(checkpoint, tmp_path / "x.ckpt")
    export_checkpoint(
        str(checkpoint), str(tmp_path / "x.ckpt"), str(tmp_path / "out"), dtype="bfloat16"
    )
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    # The family keeps the routers' biases in float32, whatever the rest is.
    kept = {n for n, t in tensors.items() if t.dtype == torch.float32}
    assert kept == {n for n in tensors if n.endswith("e_score_correction_bias")}
    assert {t.dtype for n, t in tensors.items() if n not in kept} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_export_holds_one_layer_at_a_time(family_checkpoint, tmp_path, monkeypatch):
    checkpoint = family_checkpoint("mixtral", num_layers=6)
    _, logits = trained(checkpoint, tmp_path / "x.ckpt")
    layers = []
    real = sharded_export.load

    def counted(parts, **options):
        layers.append({name.split(".")[2] for name in parts if ".layers." in name})
        real(parts, **options)

    files = []
    real_save = sharded_export.save_file

    def saved(tensors, path, **options):
        files.append(sum(t.nbytes for t in tensors.values()))
        real_save(tensors, path, **options)

    monkeypatch.setattr(sharded_export, "load", counted)
    monkeypatch.setattr(sharded_export, "save_file", saved)
    monkeypatch.setattr(sharded_export.export_sharded, "__kwdefaults__", {"shard_bytes": 60_000})
    export_checkpoint(
        str(checkpoint), str(tmp_path / "x.ckpt"), str(tmp_path / "out"), dtype="float32"
    )
    assert sorted(len(found) for found in layers) == [0, 0, 0] + [1] * 6
    assert max(files) <= 60_000
    assert len(files) > 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            assert name in opened.keys()  # noqa: SIM118  # it is no dict
    assert index["metadata"]["total_size"] == sum(files)
    torch.testing.assert_close(logits_of(tmp_path / "out"), logits, rtol=1e-4, atol=1e-5)


def test_export_refuses_another_model_and_a_full_directory(family_checkpoint, tmp_path):
    checkpoint = family_checkpoint("mixtral")
    trained(checkpoint, tmp_path / "x.ckpt")
    out = str(tmp_path / "out")
    with pytest.raises(CheckpointError, match="checkpoint that fit started from"):
        export_checkpoint(str(family_checkpoint("qwen3_moe")), str(tmp_path / "x.ckpt"), out)
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="holds a checkpoint already"):
        export_checkpoint(str(checkpoint), str(tmp_path / "x.ckpt"), out)
    with pytest.raises(UsageError, match="no such file"):
        export_checkpoint(str(checkpoint), str(tmp_path / "y.ckpt"), out)


def test_how_to_generate_is_kept(tmp_path, family_checkpoint):
    source = shutil.copytree(family_checkpoint("qwen3_moe"), tmp_path / "source")
    settings = {"repetition_penalty": 1.2, "eos_token_id": 3}
    (source / "generation_config.json").write_text(json.dumps(settings))
    module = MoELightningModule(str(source))
    module.configure_model()
    save_sharded(tmp_path / "x.ckpt", module.model, rows=module.hosted.rows, rest={})
    export_checkpoint(str(source), str(tmp_path / "x.ckpt"), str(tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings.items() <= written.items()
