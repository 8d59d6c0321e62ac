import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub.errors
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_checkpoints import FAMILIES, build_on_meta, save_tiny

import moe_lightning.demo
from moe_lightning.errors import CheckpointError
from moe_lightning.modeling import hub
from moe_lightning.modeling.checkpoint import open_checkpoint
from moe_lightning.modeling.preflight import check_model, check_tokenizer, check_values

DTYPES = [
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sharded")
    save_tiny("qwen3_moe", path, max_shard_size="60KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A directory whose tensors are of all dtypes and ranks; its config is of no matter here."""
    tensors = {str(dtype): torch.arange(24).reshape(4, 3, 2).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    return tmp_path


@pytest.mark.parametrize("family", FAMILIES)
def test_undamaged_checkpoint_passes(family: str, tmp_path: Path, capfd) -> None:
    save_tiny(family, tmp_path)
    capfd.readouterr()
    with open_checkpoint(str(tmp_path)) as view:
        check_model(view, build_on_meta(view.config))
        check_values(view)
        assert view.bytes_read == view.num_bytes
    assert "Loading weights" not in capfd.readouterr().err


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "granitemoe"])
def test_tied_embeddings_in_bf16_pass(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path, dtype=torch.bfloat16, tie_word_embeddings=True)
    with open_checkpoint(tmp_path) as view:
        assert "lm_head.weight" not in view.tensors
        assert {info.dtype for info in view.tensors.values()} == {"BF16"}
        check_model(view, build_on_meta(view.config))


def test_tied_embeddings_saved_under_the_other_name_pass(tmp_path: Path) -> None:
    save_tiny("qwen3_moe", tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as view:
        check_model(view, build_on_meta(view.config))


def test_prediction_layers_that_the_family_ignores_pass(tmp_path: Path) -> None:
    save_tiny("deepseek_v3", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.61.eh_proj.weight"] = torch.ones(2, 2)
    save_file(tensors, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as view:
        check_model(view, build_on_meta(view.config))


def test_remote_code_of_a_known_family_is_ignored(tmp_path: Path) -> None:
    # The published DeepSeek-V3 has both; transformers' own class is the one to use.
    save_tiny("deepseek_v3", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.DeepseekV3Config"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    assert open_checkpoint(tmp_path).config.model_type == "deepseek_v3"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_equal_safetensors(dtype: torch.dtype, table: Path) -> None:
    name = str(dtype)
    with (
        open_checkpoint(table) as view,
        safe_open(table / "model.safetensors", "pt") as file,
    ):
        ours, theirs = view.slices([name])[name], file.get_slice(name)
        assert ours.get_shape() == theirs.get_shape()
        assert ours.get_dtype() == theirs.get_dtype()
        whole = file.get_tensor(name)
        for index in (
            ...,
            slice(None),
            slice(1, 3),
            slice(-2, None),
            slice(0, 99),
            slice(3, 1),
            slice(None, None, 2),
            (slice(1, 3), slice(0, 1)),
            (slice(0, 2), ..., 0),
            (slice(1, 4, 2), slice(None), 1),
            (slice(1, 2), 2, slice(0, 1)),
            (..., slice(0, 1)),
            1,
            -1,
            (2, slice(0, 2)),
        ):
            part = ours[index]
            assert part.dtype == dtype
            assert part.shape == whole[index].shape
            assert torch.equal(part.view(torch.uint8), whole[index].clone().view(torch.uint8))
            assert part.is_contiguous()


def test_slices_of_scalar_and_empty_tensors(table: Path) -> None:
    with open_checkpoint(table) as view:
        slices = view.slices(["scalar", "empty"])
        assert slices["scalar"][...].item() == 2.5
        assert slices["scalar"].get_shape() == []
        assert slices["empty"][...].shape == (0, 3)
        assert slices["empty"][0:4, 1:].shape == (0, 2)
        with pytest.raises(IndexError):
            slices["empty"][0]


def test_slices_read_only_their_bytes(table: Path) -> None:
    with open_checkpoint(table) as view:
        piece = view.slices(["torch.float32"])["torch.float32"]
        row_bytes = 3 * 2 * 4
        for index, num_rows in [
            (slice(1, 3), 2),
            (2, 1),
            ((slice(0, 1), slice(0, 1)), 1),
            (slice(2, 2), 0),
            (..., 4),
        ]:
            before = view.bytes_read
            piece[index]
            assert view.bytes_read - before == num_rows * row_bytes, index


def test_some_experts_read_only_their_bytes(sharded: Path) -> None:
    with open_checkpoint(sharded) as view:
        names = [f"model.layers.1.mlp.experts.{e}.up_proj.weight" for e in (1, 3)]
        parts = {name: piece[...] for name, piece in view.slices(names).items()}
        assert view.bytes_read == 2 * 24 * 32 * 4
        for name, part in parts.items():
            assert torch.equal(part, load_file(view.tensors[name].file)[name])


def test_slices_stay_on_the_cpu_under_a_meta_device(table: Path) -> None:
    with open_checkpoint(table) as view, torch.device("meta"):
        assert view.slices(["scalar"])["scalar"][...].device.type == "cpu"


def test_threads_share_a_view(sharded: Path) -> None:
    with open_checkpoint(sharded) as view:
        slices = view.slices(view.tensors)
        with ThreadPoolExecutor(8) as pool:
            parts = dict(zip(slices, pool.map(lambda s: s[...], slices.values()), strict=True))
        assert view.bytes_read == view.num_bytes
    for name, part in parts.items():
        assert torch.equal(part, load_file(view.tensors[name].file)[name])


def test_file_truncated_after_open_is_an_error_not_a_signal(table: Path) -> None:
    file = table / "model.safetensors"
    with open_checkpoint(table) as view:
        piece = view.slices(["torch.float64"])["torch.float64"]
        piece[0]
        os.truncate(file, view.tensors["torch.float64"].start + 50)
        with pytest.raises(CheckpointError, match=r"truncated after it was opened") as error:
            piece[...]
    assert str(file) in str(error.value)
    assert "torch.float64" in str(error.value)


def test_closed_view_says_so(table: Path) -> None:
    num_open = len(os.listdir("/proc/self/fd"))
    with open_checkpoint(table) as view:
        piece = view.slices(["scalar"])["scalar"]
        piece[...]
        assert len(os.listdir("/proc/self/fd")) == num_open + 1
    assert len(os.listdir("/proc/self/fd")) == num_open
    with pytest.raises(CheckpointError, match="closed"):
        piece[...]


def test_unknown_tensor_is_named(table: Path) -> None:
    with open_checkpoint(table) as view, pytest.raises(CheckpointError, match="'nope'"):
        view.slices(["nope"])


def test_fingerprint_changes_with_config_index_and_headers(sharded: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(sharded, copy)
    first = open_checkpoint(sharded).fingerprint()
    assert open_checkpoint(copy).fingerprint() == first
    config = copy / "config.json"
    config.write_text(config.read_text() + " ")
    second = open_checkpoint(copy).fingerprint()
    index = copy / "model.safetensors.index.json"
    index.write_text(index.read_text() + " ")
    third = open_checkpoint(copy).fingerprint()
    shard = sorted(copy.glob("*.safetensors"))[0]
    save_file({n: t.half() for n, t in load_file(shard).items()}, shard)
    fourth = open_checkpoint(copy).fingerprint()
    assert len({first, second, third, fourth}) == 4


def test_symbolic_links_are_followed(sharded: Path, tmp_path: Path) -> None:
    # As in the cache of the hub.
    for file in sharded.iterdir():
        (tmp_path / file.name).symlink_to(file)
    assert open_checkpoint(tmp_path).num_bytes == open_checkpoint(sharded).num_bytes


def test_demo_is_looked_up_in_the_package(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(moe_lightning.demo, "HERE", tmp_path)
    with pytest.raises(CheckpointError, match="Reinstall moe-lightning"):
        open_checkpoint("demo")
    save_tiny("qwen3_moe", tmp_path / "checkpoint")
    assert open_checkpoint("demo").path == tmp_path / "checkpoint"


@pytest.mark.parametrize("name", ["no/such/directory", "./nowhere", "", "a" * 5000, "tab\t/x\0y"])
def test_names_that_are_nothing_are_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"--model\.checkpoint"):
        open_checkpoint(name)


def test_a_file_is_refused(table: Path) -> None:
    with pytest.raises(CheckpointError, match="Name the directory"):
        open_checkpoint(table / "model.safetensors")


def test_hub_id_is_downloaded_without_code_and_pickles(sharded: Path, monkeypatch) -> None:
    asked = []

    def download(name: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(sharded)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert open_checkpoint("someone/model").path == sharded
    assert "*.safetensors" not in asked[0]
    assert "*.safetensors" in asked[1]
    assert not {"*.bin", "*.py", "*"} & {*asked[0], *asked[1]}


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (huggingface_hub.errors.LocalEntryNotFoundError, "cannot be reached"),
        (huggingface_hub.errors.HFValidationError, "nor a model of that name"),
        (huggingface_hub.errors.OfflineModeIsEnabled, "download failed"),
        (ConnectionError, "Run the same command again"),
    ],
)
def test_hub_failures_are_explained(kind: type[Exception], words: str, monkeypatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise kind("no")

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match=words) as error:
        open_checkpoint("someone/model")
    assert "someone/model" in str(error.value)


def test_tokenizer_files_are_checked(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer.*save_pretrained"):
        check_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["a.B", null]}}'
    )
    with pytest.raises(CheckpointError, match="remote code"):
        check_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    check_tokenizer(tmp_path)
    for text, words in [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("<!DOCTYPE html><html></html>", "HTML page"),
        ('{"version": ', "not valid JSON"),
        ("[]", "list where an object belongs"),
        ("", "empty"),
    ]:
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(CheckpointError, match=words) as error:
            check_tokenizer(tmp_path)
        assert "tokenizer.json" in str(error.value)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: is a git-LFS pointer"):
        check_tokenizer(tmp_path)
