"""A tiny random checkpoint, and a way to run the command line within the test's process."""

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moe_lightning.cli.main import main
from moe_lightning.demo.random_checkpoint import make_checkpoint


@dataclass(frozen=True)
class Finished:
    """What one command line left behind on the terminal."""

    code: int
    out: str
    err: str


Run = Callable[..., Finished]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE checkpoint of some 50 thousand parameters."""
    return make_checkpoint(
        tmp_path_factory.mktemp("checkpoints") / "tiny",
        family="qwen3_moe",
        hidden_size=32,
        num_layers=2,
        num_experts=4,
        top_k=2,
        expert_size=16,
        num_heads=4,
        num_kv_heads=2,
        vocab_size=512,
        max_positions=128,
    )


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    directory = tmp_path / "work"
    directory.mkdir()
    monkeypatch.chdir(directory)
    return directory


@pytest.fixture
def run(work: Path, capfd: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Run a command line in this process, in an empty working directory."""
    levels = {
        name: logging.getLogger(name).level
        for name in ("lightning.pytorch", "lightning.fabric", "transformers")
    }

    def run(*arguments: object) -> Finished:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Finished(code, captured.out, captured.err)

    with warnings.catch_warnings():
        yield run
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def predict(run: Run, tiny: Path) -> Run:
    """Run ``predict`` with the tiny checkpoint into ``out``, anew each time."""

    def predict(*arguments: object) -> Finished:
        own = ("--model.checkpoint", tiny, "--output_dir", "out", "--restart")
        return run("predict", *own, *arguments)

    return predict


@pytest.fixture
def write_rows() -> Callable[[str | Path, list[Any]], Path]:
    """Write JSON Lines; strings are written as they are."""

    def write_rows(path: str | Path, rows: list[Any]) -> Path:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        Path(path).write_text("".join(f"{line}\n" for line in lines))
        return Path(path)

    return write_rows


@pytest.fixture
def read_rows() -> Callable[[str | Path], list[Any]]:
    """Read JSON Lines."""

    def read_rows(path: str | Path) -> list[Any]:
        return [json.loads(line) for line in Path(path).read_bytes().splitlines()]

    return read_rows
