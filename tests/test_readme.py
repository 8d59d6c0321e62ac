"""Every command and code block of the README runs."""

import json
import re
import shlex
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from moe_lightning.cli.main import main
from moe_lightning.transport.keys import new_keys

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
# Commands that other tests run as they are, or that start the tests themselves.
RUN_ELSEWHERE = ("scripts/demo.sh", "scripts/test.sh", "scripts/bench_predict.py")
ADDRESS = "tcp://10.0.0.5:7000"
# What a command reads, and what the command that writes it says.
MADE_BY = {"single_device/routing.npz": "callbacks.record", "planned_placement.json": "plan --from"}


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    lines = [line for block in code_blocks("console") for line in block.splitlines()]
    return [line[2:].split("#")[0].strip() for line in lines if line.startswith("$ ")]


def test_there_is_something_to_run():
    assert len(commands()) >= 5
    assert code_blocks("python")


@pytest.mark.parametrize("command", commands())
def test_command(command, tmp_path, monkeypatch, family_checkpoint):
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text('{"id": 1, "prompt": "To be"}\n')
    words = shlex.split(command)
    if words[0] in RUN_ELSEWHERE or words[1:2] == ["scripts/bench_predict.py"]:
        path = ROOT / (words[0] if words[0] in RUN_ELSEWHERE else words[1])
        assert path.is_file(), "the README names a script that is not there"
        return
    if words[0] == "torchrun":
        subprocess.run([sys.executable, "-m", "torch.distributed.run", *words[1:]], check=True)
        return
    if is_over_ranks(command):
        subprocess.run([sys.executable, *words[1:], *shortened(words[3])], check=True)
        return
    assert words[:3] == ["python", "-m", "moe_lightning"], command
    if "--listen" in words:
        return  # with the master's command
    checkpoint = str(family_checkpoint("mixtral"))
    options = [checkpoint if word == "DIR_OR_HUB_ID" else word for word in words[3:]]
    if torch.cuda.device_count() < 2:
        options = [re.sub(r"cuda:\d", "cpu", option) for option in options]
    for result, made_by in MADE_BY.items():
        if result in command:
            (first,) = [other for other in commands() if made_by in other and other != command]
            test_command(first, tmp_path, monkeypatch, family_checkpoint)
    options += shortened(options[0])
    if "keys" in options and options[0] == "predict":
        new_keys("keys")
        with worker_process(checkpoint) as address:
            assert main([option.replace(ADDRESS, address) for option in options]) == 0
        return
    assert main(options) == 0


def is_over_ranks(command):
    """Whether the command starts itself again for each rank: here, that would be pytest."""
    return re.search(r"(fsdp|_parallel|finetune_\w+)\.yaml", command) is not None


def shortened(verb):
    """The whole of a fit is in tests/demo and tests/cli."""
    return (
        ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2"] if verb == "fit" else []
    )


def test_fine_tuning_goes_on_with_other_ranks_and_is_exported(tmp_path, monkeypatch):
    """The commands about checkpoints in docs/sharded.md, in their order."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "sharded.md").read_text()
    about_checkpoints = [
        line[2:] for line in text.splitlines() if line.startswith("$ ") and "ckpt_path" in line
    ]
    assert len(about_checkpoints) == 2
    first = "python -m moe_lightning fit --config finetune_ep.yaml"
    assert first in text
    for steps, command in enumerate([first, *about_checkpoints], start=2):
        words = shlex.split(command)
        options = shortened(words[3])
        if options:
            options[1] = options[3] = str(steps)
        subprocess.run([sys.executable, *words[1:], *options], check=True)
    assert Path("exported/model.safetensors").is_file()


def test_the_page_about_seeing_runs_in_its_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "observing.md").read_text()
    blocks = re.findall(r"```(console|python)\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 4
    for language, block in blocks:
        if language == "python":
            exec(compile(block, "observing.md", "exec"), {"__name__": "page"})
            continue
        for line in block.splitlines():
            assert main(shlex.split(line[2:])[3:]) == 0, line
    for name in ("report.html", "communication_trace.json", "routing_balance.png"):
        assert Path("outputs/placement", name).is_file()
    assert Path("outputs/seen/report.html").is_file()
    before, after = (
        json.loads(Path(name, "routing_balance.json").read_text())["slot_max_over_mean"]
        for name in ("outputs/recorded", "outputs/placement")
    )
    assert max(after.values()) < 1.05 < max(before.values())


def test_the_page_about_jobs_runs_in_its_order(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text('{"id": 1, "prompt": "To be"}\n{"id": 2, "prompt": "or"}\n')
    text = (ROOT / "docs" / "jobs.md").read_text()
    (console,) = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    said = []
    for line in console.splitlines():
        assert main(shlex.split(line[2:].split("#")[0])[3:]) == 0, line
        said.append(capfd.readouterr().err)
        assert len(Path("run/predictions.jsonl").read_text().splitlines()) == 2
    assert ["nothing to do" in each for each in said] == [False, True, True, True, False]
    (shown,) = re.findall(r"```\n(error: .*?)```", text, re.DOTALL)
    changed = [*shlex.split(line[2:].split("#")[0])[3:-1], "--data.max_batch_tokens", "8192"]
    assert main(changed) == 2
    assert capfd.readouterr().err == shown
    (script,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(script, "jobs.md", "exec"), {"__name__": "page"})
    assert "num_predictions=60" in capfd.readouterr().out


@contextmanager
def worker_process(checkpoint):
    """The README's worker, at a free port of this machine."""
    (command,) = [other for other in commands() if "--listen" in other]
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    places = {"DIR_OR_HUB_ID": checkpoint, ADDRESS: address}
    words = [places.get(word, word) for word in shlex.split(command)]
    process = subprocess.Popen([sys.executable, *words[1:]])
    try:
        yield address
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.parametrize("block", code_blocks("python"))
def test_python_block(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.strip(), "the block prints what it computed"
