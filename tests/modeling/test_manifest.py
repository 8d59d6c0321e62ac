"""Is another copy of a checkpoint the same? What the hash sees, and how little it reads."""

import random
import shutil
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import save_tiny

from moe_lightning.errors import CheckpointError
from moe_lightning.modeling import manifest
from moe_lightning.modeling.checkpoint import open_checkpoint
from moe_lightning.modeling.manifest import manifest_hash


def hash_of(path):
    with open_checkpoint(str(path)) as view:
        return manifest_hash(view)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A checkpoint in several files, each below 1 MiB."""
    path = tmp_path_factory.mktemp("manifest") / "original"
    save_tiny("mixtral", path, max_shard_size="20KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


@pytest.fixture
def copy(original, tmp_path):
    return shutil.copytree(original, tmp_path / "another place")


def test_copies_have_the_same_hash(original, copy):
    assert hash_of(copy) == hash_of(original) == hash_of(original)
    assert len(hash_of(original)) == 64


def test_what_workers_do_not_read_may_differ(original, copy):
    (copy / "tokenizer.json").write_text("{}")
    (copy / "README.md").write_text("another text")
    (copy / "generation_config.json").unlink()
    assert hash_of(copy) == hash_of(original)


def test_another_training_of_the_same_model_has_another_hash(original, copy):
    """All headers, names and sizes are the same."""
    for file in copy.glob("*.safetensors"):
        weights = {name: tensor + 1e-3 for name, tensor in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
    with open_checkpoint(str(copy)) as changed, open_checkpoint(str(original)) as view:
        assert changed.fingerprint() == view.fingerprint()
    assert hash_of(copy) != hash_of(original)


def test_another_config_has_another_hash(original, copy):
    config = copy / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 2e-05'))
    assert hash_of(copy) != hash_of(original)


@pytest.mark.parametrize("seed", range(10))
def test_every_byte_of_a_small_file_counts(original, copy, seed):
    draw = random.Random(seed)
    file = draw.choice(sorted(copy.glob("*.safetensors")))
    content = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[draw.randrange(header, len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)
    assert hash_of(copy) != hash_of(original)


# How files are read, with a view that has nothing but files.


def view_of(*files):
    tensors = {file.name: SimpleNamespace(file=file) for file in files}
    return SimpleNamespace(fingerprint=lambda: "the same", tensors=tensors)


@pytest.mark.parametrize("num_bytes", [1, 2**16 - 1, 2**16, 2**16 + 1, 500_001, 2**20])
def test_files_up_to_1_mib_are_read_whole(num_bytes, tmp_path):
    file = tmp_path / "weights"
    # Where the samples meet, the ends, and somewhere.
    places = {0, num_bytes - 1, num_bytes // 3, *range(0, num_bytes, 2**16 - 4097)}
    hashes = set()
    for place in (None, *sorted(places)):
        content = bytearray(num_bytes)
        if place is not None:
            content[place] = 1
        file.write_bytes(content)
        hashes.add(manifest_hash(view_of(file)))
    assert len(hashes) == len(places) + 1


def test_of_a_large_file_16_samples_are_read_its_ends_among_them(tmp_path, monkeypatch):
    num_bytes, reads = 50 * 2**20 + 17, []
    file = tmp_path / "weights"
    with file.open("wb") as opened:
        opened.truncate(num_bytes)

    def read(fd, count, offset):
        reads.append((offset, offset + count))
        return real(fd, count, offset)

    real = manifest.read_exactly
    monkeypatch.setattr(manifest, "read_exactly", read)
    first = manifest_hash(view_of(file))
    assert [end - start for start, end in reads] == [2**16] * 16
    assert (reads[0][0], reads[-1][1]) == (0, num_bytes)
    gaps = [later[0] - earlier[1] for earlier, later in pairwise(reads)]
    assert max(gaps) - min(gaps) <= 1
    for place in (0, num_bytes - 1, reads[7][0], reads[7][1] - 1):
        with file.open("r+b") as opened:
            opened.seek(place)
            opened.write(b"x")
        assert manifest_hash(view_of(file)) != first
        with file.open("r+b") as opened:
            opened.seek(place)
            opened.write(b"\0")
    assert manifest_hash(view_of(file)) == first


def test_the_order_in_which_tensors_are_known_does_not_matter(tmp_path):
    files = [tmp_path / name for name in ("b", "a", "c")]
    for file in files:
        file.write_text(file.name * 1000)
    assert manifest_hash(view_of(*files)) == manifest_hash(view_of(*reversed(files)))


def test_a_file_that_is_gone_is_an_error(copy):
    view = open_checkpoint(str(copy))
    next(copy.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="safetensors"):
        manifest_hash(view)


def test_a_file_that_was_cut_since_it_was_opened_has_another_hash(original, copy):
    with open_checkpoint(str(copy)) as view:
        file = sorted(copy.glob("*.safetensors"))[0]
        with file.open("r+b") as opened:
            opened.truncate(file.stat().st_size - 1)
        assert manifest_hash(view) != hash_of(original)


def test_the_same_weights_in_another_dtype_have_another_hash(tmp_path):
    for name, dtype in (("half", torch.float16), ("float", torch.float32)):
        save_tiny("olmoe", tmp_path / name, dtype=dtype)
    assert hash_of(tmp_path / "half") != hash_of(tmp_path / "float")
