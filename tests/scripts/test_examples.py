"""The example scripts that docs/examples.md lists. That page's blocks run them; here is what they
cannot show there."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path.name for path in (ROOT / "scripts").glob("example_*"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_is_short_and_on_the_page(name):
    assert len((ROOT / "scripts" / name).read_text().splitlines()) <= 65
    page = (ROOT / "docs/examples.md").read_text()
    assert f"](../scripts/{name})" in page, "it is in the table"
    assert f"scripts/{name} " in page.partition("## In Python")[2].replace("\n", " "), "it is run"


def test_the_likelier_endings_are_found(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["example_dataloader.py"])
    runpy.run_path(str(ROOT / "scripts/example_dataloader.py"), run_name="__main__")
    answers = capsys.readouterr().out.splitlines()[-2:]
    assert [line.partition("...")[2].split()[0] for line in answers] == ["be", "lord"]


def test_another_machine_gets_the_keys_and_the_workers_command(tmp_path):
    """With scp, ssh and Python in their places, each of which says what it was asked to do."""
    said = tmp_path / "said"
    waits = {"python": f"while ! grep -q ^ssh {said}; do sleep 0.05; done"}  # as a master does
    for name in ("scp", "ssh", "python"):
        stand_in = tmp_path / "bin" / name
        stand_in.parent.mkdir(exist_ok=True)
        stand_in.write_text(f'#!/bin/sh\n{waits.get(name, "")}\necho {name} "$@" >> {said}\n')
        stand_in.chmod(0o755)
    (tmp_path / "my keys").mkdir()
    subprocess.run(
        ["bash", ROOT / "scripts/example_rpc_two_hosts.sh", "--data.limit_rows", "4"],
        env=os.environ
        | {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "WORKER_HOST": "me@gpu2",
            "WORKER_ADDRESS": "tcp://192.0.2.11:7000",
            "CHECKPOINT": "models/moe",
            "KEYS": str(tmp_path / "my keys"),
        },
        cwd=tmp_path,
        check=True,
        timeout=60,
    )
    calls = said.read_text().splitlines()
    assert calls[0] == f"scp -rpq {tmp_path}/my keys me@gpu2:"
    (worker,) = (call for call in calls if call.startswith("ssh"))
    assert worker.rstrip().endswith(
        "python -m moe_lightning worker --listen tcp://192.0.2.11:7000 "
        r"--model.checkpoint models/moe --keys my\ keys"
    )
    (master,) = (call for call in calls if call.startswith("python"))
    assert "--model.checkpoint models/moe" in master
    assert "--trainer.strategy.workers [tcp://192.0.2.11:7000]" in master
    assert master.endswith("--data.limit_rows 4")
