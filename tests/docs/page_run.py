"""Runs a page's blocks in their order, in one folder, as somebody does who reads it.

What a reader has and a test has not is put in its place: checkpoints, GPUs, other machines
(tests/docs/stand_ins), time.
"""

import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from unittest import mock

import psutil
import torch
import yaml
from made_files import MadeFiles, Outcome, snapshot
from markdown_pages import ROOT, Block, Command, Page

from moe_lightning.cli.main import main

STAND_INS = Path(__file__).parent / "stand_ins"
LONG_ENOUGH_S = 200
LANGUAGES = {"console", "python", "yaml", "json", "bash", "text", ""}
# Commands that are not run here, and why.
ELSEWHERE = {
    r"scripts/(demo|test)\.sh|\.ci/run": "they install, and run these tests",
    r"(python )?scripts/(bench_\w+\.py|make_peer_environment\.sh)": (
        "minutes; tests/scripts runs them small"
    ),
    r"scripts/train_demo\.sh": "18 minutes; tests/demo looks at what it made",
    r"(python -m )?pip |git clone |cd |python3? -m venv |source ": (
        "installs, as the tests' own environment was"
    ),
    r"python -m moe_lightning benchmark": "minutes; tests/cli/test_benchmark_verb.py runs it small",
    r"python -m mkdocs |python scripts/look_at_site": "tests/docs/test_site.py does it",
}
# What takes ranks, each of which starts the program again: here, that would be pytest.
OVER_RANKS = re.compile(
    r"(fsdp|_parallel|finetune_\w+)\.yaml|moe_(fsdp|ep|tp|pp)\b|\bddp\b|ShardedStrategy"
)
SHELL = re.compile(r"[|&;<>$`]|^\w+=")
OUTSIDE = re.compile(r"\b(10\.0\.0\.\d+|192\.0\.2\.\d+|127\.0\.0\.1):(\d{4,5})\b")
CONFIG_KEYS = {"model", "data", "trainer", "output_dir", "report", "optimizer", "lr_scheduler"}
AS_IT_IS = Command(0, "", None)
SHORT_FIT = "--trainer.max_steps 2 --trainer.val_check_interval 2"
PROMPTS = ["To be, or not", "The king", "Once more unto the breach"]


class PageRun:
    """One page.

    Args:
        page: The page.
        folder: An empty folder, which is the working directory.
        checkpoint: Stands for a checkpoint of the reader's own.
        made: What commands of other pages made.
        warm_python: Socket of the Python that forks (tests/docs/warm_python.py).
        read_output: Gives what this process wrote since the last call.
    """

    def __init__(
        self,
        page: Page,
        *,
        folder: Path,
        checkpoint: Path,
        made: MadeFiles,
        warm_python: Path,
        read_output: Callable[[], str],
    ) -> None:
        self._page = page
        self._folder = folder
        self._checkpoint = checkpoint
        self._made = made
        self._warm_python = warm_python
        self._read_output = read_output
        self._ports: dict[str, str] = {}
        self._background: list[subprocess.Popen[bytes]] = []
        self._num_fits = 0
        for name in ("configs", "scripts"):
            (folder / name).symlink_to(ROOT / name)
        rows = [json.dumps({"id": n, "prompt": p}) for n, p in enumerate(PROMPTS)]
        (folder / "prompts.jsonl").write_text("".join(f"{row}\n" for row in rows))

    def run(self, block: Block) -> None:
        """Run a block; what it shows must be what is seen."""
        if block.title:
            Path(block.title).parent.mkdir(parents=True, exist_ok=True)
            Path(block.title).write_text(block.text)
        match block.language:
            case "console":
                for command in block.commands:
                    self._run_command(command)
            case "python":
                if not self._is_run_later(block):
                    self._run_python(block)
            case "yaml":
                _check_yaml(block)
            case "json":
                is_whole = re.match(r"[\[{]\s*\n", block.text) is not None
                for part in [block.text] if is_whole else block.text.splitlines():
                    json.loads(part)
            case "bash":
                subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
                if not self._is_run_later(block):
                    self._expect(AS_IT_IS, self._in_a_shell(block.text))
            case "text" | "":
                assert not re.search(r"^\$ ", block.text, re.MULTILINE), "commands are `console`"
            case other:
                raise AssertionError(f"what is a block of {other!r}? Known: {sorted(LANGUAGES)}")

    def end(self) -> None:
        """End what the page left running."""
        for process in self._background:
            process.send_signal(signal.SIGTERM)
        for process in self._background:
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()

    def _is_run_later(self, block: Block) -> bool:
        """Whether a command of the page runs this block's file."""
        commands = [c.text for each in self._page.blocks for c in each.commands]
        return bool(block.title) and any(block.title in text for text in commands)

    def _run_command(self, command: Command) -> None:
        text = self._in_place(command.text)
        for pattern in ELSEWHERE:
            if re.match(pattern, text):
                script = re.search(r"scripts/\S+", text)
                assert script is None or (ROOT / script[0]).is_file(), f"{script} is not there"
                return
        if " worker " in text and "--listen" in text:
            self._start(text.removesuffix("&"))
            return
        short_fit = self._short_fit(text) if " fit " in text else ""
        key = f"{text} {short_fit}"
        outcome = self._made.again(key, self._folder)
        if outcome is None:
            before = snapshot(self._folder)
            is_here = _is_one_process(text)
            outcome = self._here(key) if is_here else self._in_a_shell(text, short_fit)
            self._made.keep(key, self._folder, before, outcome)
        self._expect(command, outcome)

    def _expect(self, command: Command, outcome: Outcome) -> None:
        assert outcome.code in command.may_end_with, (
            f"ended with {outcome.code}, not {command.may_end_with}:\n{outcome.output[-3000:]}"
        )
        seen = _alike(outcome.output)
        for line in command.shown:
            for piece in _alike(line).split("..."):
                assert piece.strip() in seen, (
                    f"shown but not seen: {line!r} in\n{outcome.output[-3000:]}"
                )

    def _in_place(self, text: str) -> str:
        """A command with what this machine has."""
        text = text.replace("DIR_OR_HUB_ID", str(self._checkpoint))
        if torch.cuda.device_count() < 2:
            text = re.sub(r"cuda:\d", "cpu", text)
        return OUTSIDE.sub(self._own_address, text)

    def _own_address(self, found: re.Match[str]) -> str:
        if found[0] not in self._ports:
            host = "127.0.0.1" if found[1] == "127.0.0.1" else _outside_address() or "127.0.0.1"
            self._ports[found[0]] = f"{host}:{_free_port()}"
        return self._ports[found[0]]

    def _short_fit(self, text: str) -> str:
        """Options that end a fit after two steps; one that goes on does one more."""
        if re.search(r"--print_config|--help|--trainer.max_steps", text):
            return ""
        steps = 2 + self._num_fits * ("--ckpt_path" in text)
        self._num_fits += 1
        return f"--trainer.max_steps {steps} --trainer.val_check_interval {steps}"

    def _here(self, text: str) -> Outcome:
        self._read_output()
        words = shlex.split(text)
        options = words[3:] if words[0] == "python" else words[1:]
        with (
            warnings.catch_warnings(),
            mock.patch.dict(os.environ, self._environ()),
            mock.patch.object(sys, "executable", str(STAND_INS / "python")),
        ):
            code = main(options)
        return Outcome(code, self._read_output())

    def _in_a_shell(self, text: str, short_fit: str = SHORT_FIT) -> Outcome:
        shell = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=self._folder,
            env=self._environ() | {"SHORT_FIT": short_fit},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = shell.communicate(timeout=LONG_ENOUGH_S)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
        return Outcome(shell.returncode, output)

    def _environ(self) -> dict[str, str]:
        return os.environ | {
            "PATH": f"{STAND_INS}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "TESTS_PYTHON": sys.executable,
            "TESTS_WARM": str(self._warm_python),
            "TESTS_PORT": str(_free_port()),
        }

    def _start(self, text: str) -> None:
        """A worker that stays until the page's end."""
        log = self._folder.parent / f"worker-{len(self._background)}.log"
        with log.open("wb") as file:
            words = shlex.split(text)
            process = subprocess.Popen(
                words, cwd=self._folder, env=self._environ(), stdout=file, stderr=file
            )
        self._background.append(process)
        deadline_s = time.monotonic() + LONG_ENOUGH_S
        while "listening on" not in log.read_text():
            assert process.poll() is None, f"the worker ended: {log.read_text()}"
            assert time.monotonic() < deadline_s, "the worker does not listen"
            time.sleep(0.1)

    def _run_python(self, block: Block) -> None:
        if OVER_RANKS.search(block.text):
            script = self._folder / (block.title or f"block_{block.line}.py")
            script.write_text(block.text)
            self._expect(AS_IT_IS, self._in_a_shell(f"python {shlex.quote(str(script))}"))
            return
        code = compile("\n" * (block.line - 1) + block.text, str(self._page.path), "exec")
        with warnings.catch_warnings():
            exec(code, {"__name__": "__main__"})


def _is_one_process(text: str) -> bool:
    is_ours = re.match(r"(python -m moe_lightning|moe-lightning) ", text) is not None
    return is_ours and not OVER_RANKS.search(text) and not SHELL.search(text)


def _check_yaml(block: Block) -> None:
    """It is YAML; if it is options, then of a verb."""
    content = yaml.safe_load(block.text)
    if not isinstance(content, dict) or not CONFIG_KEYS.issuperset(content):
        return
    verb = "fit" if {"train", "val"} & set(content.get("data", {})) else "predict"
    file = Path(block.title or f"block_{block.line}.yaml")
    file.write_text(block.text)
    assert main([verb, "--config", str(file), "--print_config"]) == 0
    if not block.title:
        file.unlink()


def _alike(text: str) -> str:
    """Output without what differs from run to run: numbers, and how much space is between words."""
    text = re.sub(r"\x1b\[[\d;]*m", "", text)
    return re.sub(r"\s+", " ", re.sub(r"\d[\d,.]*(e[+-]?\d+)?", "#", text))


def _free_port() -> int:
    """A port that is free, as the one after it is; none that outgoing connections get."""
    while True:
        port = random.randrange(12_000, 30_000)
        with socket.socket() as probe, socket.socket() as next_one, suppress(OSError):
            probe.bind(("", port))
            next_one.bind(("", port + 1))
            return port


def _outside_address() -> str | None:
    """An IPv4 address of this machine that others could reach; None if it has none."""
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            if address.family == socket.AF_INET and not address.address.startswith("127."):
                return address.address
    return None
