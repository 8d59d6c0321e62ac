import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_checkpoints import build_on_meta, save_tiny

from moe_lightning.errors import CheckpointError
from moe_lightning.modeling.checkpoint import open_checkpoint
from moe_lightning.modeling.preflight import check_model, check_values
from moe_lightning.modeling.safetensors_header import parse_header

Damage = Callable[[Path], None]
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sound")
    save_tiny("mixtral", root / "mixtral")
    save_tiny("qwen3_moe", root / "qwen3")
    save_tiny("gpt_oss", root / "gpt_oss")
    save_tiny("qwen3_moe", root / "sharded", max_shard_size="60KB")
    return {path.name: path for path in root.iterdir()}


def open_and_check(path: Path) -> None:
    with open_checkpoint(path) as view:
        check_model(view, build_on_meta(view.config))
        check_values(view)


def text(name: str, content: str) -> Damage:
    return lambda path: void((path / name).write_text(content))


def void(_: object) -> None:
    return None


def config(**changes: Any) -> Damage:
    return json_file("config.json", lambda value: value.update(changes))


def json_file(name: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(path: Path) -> None:
        value = json.loads((path / name).read_text())
        change(value)
        (path / name).write_text(json.dumps(value))

    return damage


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(path: Path) -> None:
        values = load_file(path / SINGLE)
        change(values)
        save_file(values, path / SINGLE)

    return damage


def header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change the header and leave the data as it is."""

    def damage(path: Path) -> None:
        content = (path / SINGLE).read_bytes()
        length = int.from_bytes(content[:8], "little")
        entries = json.loads(content[8 : 8 + length])
        change(entries)
        write_header(path, json.dumps(entries).encode(), content[8 + length :])

    return damage


def write_header(path: Path, text: bytes, data: bytes) -> None:
    (path / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + data)


def content(change: Callable[[bytes], bytes]) -> Damage:
    return lambda path: void((path / SINGLE).write_bytes(change((path / SINGLE).read_bytes())))


def only(*names: str) -> Damage:
    """Keep config.json and these files (empty if they are new)."""

    def damage(path: Path) -> None:
        for file in path.iterdir():
            if file.name not in ("config.json", *names):
                file.unlink()
        for name in names:
            (path / name).touch()

    return damage


def first_shard(path: Path) -> Path:
    return sorted(path.glob("*.safetensors"))[0]


def duplicate_key(path: Path) -> None:
    content = (path / SINGLE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + length].rstrip()
    again = b',"lm_head.weight":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    write_header(path, text[:-1] + again, content[8 + length :])


def dangling_link(path: Path) -> None:
    (path / SINGLE).unlink()
    (path / SINGLE).symlink_to("../../blobs/0123")


def fifo(path: Path) -> None:
    (path / SINGLE).unlink()
    os.mkfifo(path / SINGLE)


def directory(path: Path) -> None:
    (path / "config.json").unlink()
    (path / "config.json").mkdir()


def lose_from_shard(path: Path) -> None:
    values = load_file(first_shard(path))
    values.pop(sorted(values)[0])
    save_file(values, first_shard(path))


def add_to_shard(path: Path) -> None:
    save_file({**load_file(first_shard(path)), "stray": torch.ones(2)}, first_shard(path))


def packed(values: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    values[name] = values[name].to(torch.uint8)


def transpose(name: str) -> Damage:
    return tensors(lambda values: values.update({name: values[name].mT.contiguous()}))


def poison(name: str, value: float) -> Damage:
    return tensors(lambda values: values[name].view(-1)[5].fill_(value))


def quantized(path: Path) -> None:
    config(quantization_config={"quant_method": "mxfp4"})(path)
    tensors(packed)(path)


def lose(part: str) -> Damage:
    return tensors(lambda values: [values.pop(name) for name in list(values) if part in name])


def last_entry(entries: dict[str, Any]) -> dict[str, Any]:
    names = [name for name in entries if name != "__metadata__"]
    return entries[max(names, key=lambda name: entries[name]["data_offsets"][1])]


def at(name: str, key: str, value: object) -> Damage:
    return header(lambda entries: entries[name].update({key: value}))


def shift_first(entries: dict[str, Any], num_bytes: int) -> None:
    names = [name for name in entries if name != "__metadata__"]
    names.sort(key=lambda name: entries[name]["data_offsets"])
    for name in names[1:]:
        start, end = entries[name]["data_offsets"]
        entries[name]["data_offsets"] = [start + num_bytes, end + num_bytes]


HEAD = "lm_head.weight"
# which checkpoint, what happens to it, and what the message must say
FILES: dict[str, tuple[str, Damage, list[str]]] = {
    "no config": (
        "qwen3",
        lambda path: (path / "config.json").unlink(),
        ["config.json", "no such file", "Download"],
    ),
    "config cut off": ("qwen3", text("config.json", '{"model_type": "qw'), ["config.json", "JSON"]),
    "config is a list": ("qwen3", text("config.json", "[1]"), ["config.json", "list", "Download"]),
    "config is LFS": ("qwen3", text("config.json", LFS), ["config.json", "git lfs pull"]),
    "config is HTML": (
        "qwen3",
        text("config.json", "\n<!DOCTYPE html>"),
        ["config.json", "HTML page", "Download"],
    ),
    "config too deep": ("qwen3", text("config.json", '{"a":' * 99999), ["config.json", "JSON"]),
    "config is no text": (
        "qwen3",
        lambda path: void((path / "config.json").write_bytes(b"\xff\xfe\x00{")),
        ["config.json", "not valid JSON"],
    ),
    "config is a directory": ("qwen3", directory, ["config.json", "no regular file"]),
    "generation config is LFS": (
        "qwen3",
        text("generation_config.json", LFS),
        ["generation_config.json", "git lfs pull"],
    ),
    "no model_type": ("qwen3", text("config.json", "{}"), ["config.json", "model_type"]),
    "unknown model_type": (
        "qwen3",
        config(model_type="qwen33_moe"),
        ["config.json", "'qwen33_moe'", "spelling"],
    ),
    "remote code": (
        "qwen3",
        config(model_type="secret", auto_map={"AutoConfig": "evil.Config"}),
        ["config.json", "remote code", "never run", "part of transformers"],
    ),
    "config of impossible values": (
        "gpt_oss",
        config(num_hidden_layers=5),
        ["config.json", "num_hidden_layers", "layer_types"],
    ),
    "no weights": ("qwen3", only(), ["no weights", "Download"]),
    "pickle only": (
        "qwen3",
        only("pytorch_model.bin"),
        ["pytorch_model.bin", "pickle", "Convert it to safetensors"],
    ),
    "pt only": ("qwen3", only("model.pt"), ["model.pt", "pickle", "save_pretrained"]),
    "GGUF only": ("qwen3", only("model-q4.gguf"), ["model-q4.gguf", "original safetensors"]),
    "training checkpoint": (
        "qwen3",
        only("__0_0.distcp"),
        ["__0_0.distcp", "moe_lightning export"],
    ),
    "adapter": (
        "qwen3",
        only("adapter_model.safetensors", "adapter_config.json"),
        ["adapter_config.json", "merge_and_unload"],
    ),
    "quantized": ("qwen3", quantized, ["quantized", "'mxfp4'", "q_proj", SINGLE, "unquantized"]),
    "weights named elsewhere": (
        "qwen3",
        config(transformers_weights="../x.safetensors"),
        ["config.json", "transformers_weights", "Rename"],
    ),
    "shards without index": (
        "sharded",
        lambda path: (path / INDEX).unlink(),
        ["model-00001-of", INDEX, "Download the index"],
    ),
    "index and single file": (
        "sharded",
        lambda path: void((path / SINGLE).touch()),
        [SINGLE, INDEX, "two sets", "Delete"],
    ),
    "index is no JSON": ("sharded", text(INDEX, "{,"), [INDEX, "not valid JSON"]),
    "index is LFS": ("sharded", text(INDEX, LFS), [INDEX, "git lfs pull"]),
    "index without weight_map": ("sharded", text(INDEX, "{}"), [INDEX, "weight_map", "Download"]),
    "index escapes": (
        "sharded",
        json_file(INDEX, lambda v: v["weight_map"].update({HEAD: "../../../etc/passwd"})),
        [INDEX, HEAD, "'../../../etc/passwd'", "own directory"],
    ),
    "index of absolute path": (
        "sharded",
        json_file(INDEX, lambda v: v["weight_map"].update({HEAD: "/etc/passwd"})),
        [INDEX, HEAD, "'/etc/passwd'", "own directory"],
    ),
    "index of a pickle": (
        "sharded",
        json_file(INDEX, lambda v: v["weight_map"].update({HEAD: "model-1.bin"})),
        [INDEX, HEAD, "'model-1.bin'", "Convert it to safetensors"],
    ),
    "index of a number": (
        "sharded",
        json_file(INDEX, lambda v: v["weight_map"].update({HEAD: 3})),
        [INDEX, HEAD, "own directory"],
    ),
    "shard missing": (
        "sharded",
        lambda path: first_shard(path).unlink(),
        ["lacks 1 of", "model-00001-of", "Download the missing files"],
    ),
    "shard lost a tensor": (
        "sharded",
        lose_from_shard,
        ["model-00001-of", "lacks 1", "both again"],
    ),
    "shard got a tensor": ("sharded", add_to_shard, ["model-00001-of", "'stray'", "both again"]),
    "file is LFS": ("qwen3", text(SINGLE, LFS), [SINGLE, "git-LFS pointer", "git lfs pull"]),
    "file is HTML": (
        "qwen3",
        text(SINGLE, "<html><body>404"),
        [SINGLE, "HTML page", "hf download"],
    ),
    "file is empty": ("qwen3", text(SINGLE, ""), [SINGLE, "empty", "Download"]),
    "seven bytes": ("qwen3", text(SINGLE, "abcdefg"), [SINGLE, "7 bytes", "Download"]),
    "dangling link": ("qwen3", dangling_link, [SINGLE, "../../blobs/0123", "Restore"]),
    "file is a pipe": ("qwen3", fifo, [SINGLE, "no regular file"]),
    "header cut off": ("qwen3", content(lambda b: b[:300]), [SINGLE, "inside its header"]),
    "huge header": (
        "qwen3",
        content(lambda b: b"\xff" * 7 + b"\x00" + b[8:]),
        [SINGLE, "100,000,000", "Download"],
    ),
    "header no JSON": ("qwen3", content(lambda b: b[:8] + b"x" + b[9:]), [SINGLE, "no JSON"]),
    "header a list": (
        "qwen3",
        lambda p: write_header(p, b"[]", b""),
        [SINGLE, "not a JSON object"],
    ),
    "no tensors": ("qwen3", lambda p: write_header(p, b"{}", b""), ["no tensors", "Download"]),
    "duplicate key": ("qwen3", duplicate_key, [SINGLE, "'lm_head.weight'", "more than once"]),
    "data cut off": (
        "qwen3",
        content(lambda b: b[:-9]),
        [SINGLE, "truncated", "Download it again"],
    ),
    "extra bytes": ("qwen3", content(lambda b: b + b"\0"), [SINGLE, "1 extra bytes at the end"]),
    "overlap": (
        "qwen3",
        header(lambda e: shift_first(e, -4)),
        [SINGLE, "overlap", "4 bytes early"],
    ),
    "hole": ("qwen3", header(lambda e: shift_first(e, 8)), [SINGLE, "hole of 8 bytes"]),
    "beyond the end": (
        "qwen3",
        header(
            lambda e: (
                last_entry(e).update(shape=[10**6], dtype="F32"),
                last_entry(e)["data_offsets"].__setitem__(
                    1, last_entry(e)["data_offsets"][0] + 4 * 10**6
                ),
            )
        ),
        [SINGLE, "beyond the end of the file"],
    ),
    "unknown dtype": ("qwen3", at(HEAD, "dtype", "F7"), [SINGLE, HEAD, "'F7'", "convert"]),
    "wrong size": ("qwen3", at(HEAD, "shape", [64, 31]), [SINGLE, HEAD, "8,192", "7,936"]),
    "negative shape": ("qwen3", at(HEAD, "shape", [-64, -32]), [SINGLE, HEAD, "-64"]),
    "overflowing shape": ("qwen3", at(HEAD, "shape", [2**40, 2**40]), [SINGLE, HEAD, "more than"]),
    "reversed offsets": ("qwen3", at(HEAD, "data_offsets", [9, 1]), [SINGLE, HEAD, "[9, 1]"]),
    "entry without shape": (
        "qwen3",
        header(lambda e: e[HEAD].pop("shape")),
        [SINGLE, HEAD, "no dtype, shape"],
    ),
}
CORRECT = "Correct {} in config.json"
MODELS: dict[str, tuple[str, Damage, list[str]]] = {
    "too many layers": (
        "qwen3",
        config(num_hidden_layers=3),
        ["model.layers.2.", "num_hidden_layers=3", "2 layers", CORRECT.format("num_hidden_layers")],
    ),
    "too few layers": (
        "mixtral",
        config(num_hidden_layers=1),
        ["model.layers.1.", SINGLE, "num_hidden_layers=1", CORRECT.format("num_hidden_layers")],
    ),
    "hidden size": (
        "qwen3",
        config(hidden_size=48),
        [
            "model.embed_tokens.weight",
            "[64, 32] instead of [64, 48]",
            CORRECT.format("hidden_size"),
        ],
    ),
    "vocabulary": (
        "mixtral",
        config(vocab_size=65),
        ["lm_head.weight", "[64, 32] instead of [65, 32]", CORRECT.format("vocab_size")],
    ),
    "too many experts": (
        "mixtral",
        config(num_local_experts=8),
        [
            "24 tensors missing",
            "experts.7.w2.weight",
            "num_local_experts=8",
            "4 experts",
            "Correct num_local_experts",
        ],
    ),
    "too few experts": (
        "mixtral",
        config(num_local_experts=3),
        ["experts.3.w1.weight", SINGLE, "num_local_experts=3", "Correct num_local_experts"],
    ),
    "fused experts": (
        "gpt_oss",
        config(num_local_experts=8),
        ["experts.gate_up_proj", "num_local_experts=8", "4 experts", "Correct num_local_experts"],
    ),
    "more experts a token than experts": (
        "qwen3",
        config(num_experts_per_tok=5),
        ["config.json", "num_experts_per_tok=5", "1 to 4", "Correct"],
    ),
    "expert tensor missing": ("qwen3", lose(EXPERT), [f"1 tensor missing: {EXPERT}\n", "again"]),
    "expert missing": (
        "mixtral",
        lose("layers.0.block_sparse_moe.experts.2."),
        ["3 tensors missing", "model.layers.0.block_sparse_moe.experts.2.w1.weight"],
    ),
    "expert numbers with a gap": (
        "qwen3",
        lambda path: (config(num_experts=3, num_local_experts=3)(path), lose("experts.1.")(path))[
            0
        ],
        ["6 tensors missing", "model.layers.0.mlp.experts.1.down_proj.weight"],
    ),
    "all up projections missing": (
        "qwen3",
        lose("up_proj"),
        ["8 tensors missing", "model.layers.0.mlp.experts.0.up_proj.weight"],
    ),
    "norm missing": (
        "qwen3",
        lose("layers.1.post_attention_layernorm"),
        ["1 tensor missing: model.layers.1.post_attention_layernorm.weight", "again"],
    ),
    "extra tensor": (
        "qwen3",
        tensors(lambda values: values.update({"model.layers.1.mlp.extra": torch.ones(2)})),
        ["1 tensor that the model has no place for", "model.layers.1.mlp.extra in model.safetens"],
    ),
    "extra expert": (
        "qwen3",
        tensors(lambda values: values.update({EXPERT.replace(".3.", ".4."): torch.ones(24, 32)})),
        ["no place for", EXPERT.replace(".3.", ".4.")],
    ),
    "transposed expert": (
        "qwen3",
        transpose("model.layers.1.mlp.experts.2.down_proj.weight"),
        [
            "1 tensor of the wrong shape",
            "experts.2.down_proj.weight in",
            "[24, 32] instead of [32, 24]",
        ],
    ),
    "transposed embedding": (
        "mixtral",
        transpose("model.embed_tokens.weight"),
        ["model.embed_tokens.weight in", "[32, 64] instead of [64, 32]", "again"],
    ),
    "tensor told twice": (
        "qwen3",
        tensors(lambda values: values.update({"embed_tokens.weight": torch.ones(64, 32)})),
        ["there twice", "embed_tokens.weight"],
    ),
    "packed without config": ("qwen3", tensors(packed), ["q_proj", "U8", SINGLE, "unquantized"]),
    "NaN": ("qwen3", poison(EXPERT, float("nan")), [SINGLE, EXPERT, "NaN: 1", "download it again"]),
    "infinity": ("mixtral", poison(HEAD, float("inf")), [SINGLE, HEAD, "infinite: 1"]),
}


@pytest.mark.parametrize("kind", [*FILES, *MODELS])
def test_damage_is_named_with_cause_and_remedy(
    kind: str, sound: dict[str, Path], tmp_path: Path
) -> None:
    family, damage, words = {**FILES, **MODELS}[kind]
    path = tmp_path / "checkpoint"
    shutil.copytree(sound[family], path)
    open_and_check(path)
    damage(path)
    with pytest.raises(CheckpointError) as error:
        open_and_check(path)
    assert error.value.exit_code == 4
    message = str(error.value)
    assert str(path) in message
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


@pytest.mark.parametrize("name", ["config.json", SINGLE])
def test_unreadable_file_is_named(name: str, sound: dict[str, Path], monkeypatch) -> None:
    # Not by chmod: root may read everything.
    real_open = os.open

    def refuse(path: Any, *args: Any, **kwargs: Any) -> int:
        if Path(path).name == name:
            raise PermissionError(13, "Permission denied")
        return real_open(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointError, match=rf"{name}: permission denied.*chmod"):
        open_checkpoint(sound["qwen3"])


def test_check_values_reads_only_the_named_tensors(sound: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    shutil.copytree(sound["qwen3"], path)
    poison(EXPERT, float("nan"))(path)
    with open_checkpoint(path) as view:
        check_values(view, [HEAD])
        assert view.bytes_read == 64 * 32 * 4
        with pytest.raises(CheckpointError, match=r"experts\.3\.up_proj"):
            check_values(view, [HEAD, EXPERT])


entry = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F4", "BOOL", "F7", None, []]),
        "shape": st.lists(
            st.integers(-1, 5) | st.integers() | st.booleans() | st.none(), max_size=3
        )
        | st.none(),
        "data_offsets": st.lists(st.integers(-1, 40) | st.none(), max_size=3) | st.text(max_size=2),
    },
)
json_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


def survives(start: bytes, file_bytes: int) -> None:
    try:
        found = parse_header(start, file=Path("fuzz.safetensors"), file_bytes=file_bytes)
    except CheckpointError:
        return
    for info in found.values():
        assert 8 <= info.start <= info.end <= file_bytes


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 10**6))
def test_arbitrary_bytes_raise_nothing_else(content: bytes, file_bytes: int) -> None:
    survives(content, file_bytes)
    survives(len(content).to_bytes(8, "little") + content, file_bytes)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.text(max_size=5) | st.just("__metadata__"), entry | json_value, max_size=4),
    st.integers(0, 300),
)
def test_arbitrary_headers_raise_nothing_else(entries: dict[str, Any], extra: int) -> None:
    text = json.dumps(entries).encode()
    survives(len(text).to_bytes(8, "little") + text, 8 + len(text) + extra)


def test_deep_and_long_headers_raise_nothing_else() -> None:
    for text in (b"[" * 10**6, b'{"a":' * 10**6, b"9" * 10**5, b'{"a":' + b"9" * 10**5 + b"}"):
        survives(len(text).to_bytes(8, "little") + text, 8 + len(text))
