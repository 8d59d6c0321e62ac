"""``--env`` on machines with something wrong."""

import subprocess
import sys
from importlib import metadata

import pytest
import torch

from moe_lightning import __version__
from moe_lightning.cli import environment
from moe_lightning.cli.main import main

REQUIRES = ["torch>=2.10", "numpy>=2.0", "peft>=0.1; extra == 'lora'"]


@pytest.fixture
def look(capsys):
    """Look at this machine: the exit code, the lines of each part, and the problems."""

    def look():
        code = environment.run()
        parts, lines = {}, []
        for line in capsys.readouterr().out.splitlines():
            if not line.startswith(" "):
                lines = parts.setdefault(line.partition(":")[0], [])
            else:
                lines.append(line.strip())
        return code, parts, [line.removeprefix("- ") for line in parts.pop("problems")]

    return look


def value(lines, name):
    (line,) = [line for line in lines if line.startswith(f"{name} ")]
    return line.removeprefix(name).strip()


def test_a_machine_that_works(look, monkeypatch):
    monkeypatch.setattr(metadata, "requires", lambda name: REQUIRES)
    code, parts, problems = look()
    assert (code, problems) == (0, [])
    assert list(parts) == [
        "package",
        "machine",
        "dependencies",
        "optional packages",
        "torch",
        "distributed",
        "backends of experts",
        "variables",
    ]
    assert value(parts["package"], "moe-lightning").startswith(f"{__version__} in ")
    assert parts["dependencies"] == [
        f"torch  {metadata.version('torch')}",
        f"numpy  {metadata.version('numpy')}",
    ]
    assert value(parts["distributed"], "gloo") == "there"
    assert value(parts["distributed"], "zmq on the loopback").startswith("answers in")
    assert value(parts["backends of experts"], "cpu_int8 (cpu, float32)") == "usable"
    assert "cpu_packed, " in value(parts["backends of experts"], "auto (cpu, float32)")
    assert "not in use" in value(parts["torch"], "NCCL") or torch.cuda.is_available()


def test_versions_that_do_not_fit_are_named_with_what_to_do(look, monkeypatch):
    monkeypatch.setattr(
        metadata, "requires", lambda name: ["torch>=99", "no-such-package>=1,<2", "numpy>=2.0"]
    )
    code, parts, problems = look()
    assert code == 1
    assert value(parts["dependencies"], "torch").endswith(", but >=99 is needed")
    assert value(parts["dependencies"], "no-such-package") == "missing"
    assert [problem.partition(". ")[2] for problem in problems] == [
        "pip install 'torch>=99'",
        "pip install 'no-such-package<2,>=1'",
    ]


def test_a_package_that_cannot_be_imported_leaves_the_other_lines(look, monkeypatch):
    monkeypatch.setattr(metadata, "requires", lambda name: REQUIRES)
    monkeypatch.setitem(sys.modules, "numpy", None)
    code, parts, problems = look()
    assert code == 1
    assert "cannot be imported: ModuleNotFoundError" in value(parts["dependencies"], "numpy")
    assert "pip install --force-reinstall 'numpy>=2.0'" in problems[0]
    assert value(parts["torch"], "torch") == torch.__version__


@pytest.mark.parametrize("broken", ["torch", "psutil", "zmq", "packaging", "transformers"])
def test_it_prints_without(broken):
    """In a process of its own, in which nothing is imported yet."""
    code = (
        f"import sys; sys.modules[{broken!r}] = None\n"
        "from moe_lightning.cli.main import main; sys.exit(main(['--env']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    parts = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert len(parts) == 9
    assert parts[-1] == "problems:"
    assert "not known" in done.stdout
    assert f"ModuleNotFoundError: import of {broken}" in done.stdout


def test_secrets_are_not_printed(look, monkeypatch):
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "SLURM_JWT", "HTTPS_PROXY", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "s3cret")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    _, parts, _ = look()
    assert value(parts["variables"], "MASTER_ADDR") == "10.0.0.1"
    assert value(parts["variables"], "HF_TOKEN") == "set"
    assert "s3cret" not in str(parts)


def test_a_package_that_is_not_whole(look, monkeypatch, tmp_path):
    monkeypatch.setattr("moe_lightning.cli.configs.PACKAGE", tmp_path / "package")
    _, parts, problems = look()
    assert value(parts["package"], "configs") == "0"
    assert "the package is not whole" in problems[0]


def test_more_threads_than_cores(look, monkeypatch):
    monkeypatch.setattr(environment, "_cgroup", {"cpu.max": "150000 100000"}.get)
    monkeypatch.setattr(
        environment, "_cgroup", lambda name: {"cpu.max": "50000 100000"}.get(name, "")
    )
    code, parts, problems = look()
    assert code == 1
    assert "0.5 of" in value(parts["machine"], "cpu")
    assert "export OMP_NUM_THREADS=1" in problems[0]


def test_a_loopback_that_does_not_answer(look, monkeypatch):
    import zmq

    monkeypatch.setattr(environment, "LOOPBACK_MS", 1)
    monkeypatch.setattr(zmq.Socket, "connect", lambda self, address: None)
    _, parts, problems = look()
    assert "does not answer: Again" in value(parts["distributed"], "zmq on the loopback")
    assert "cannot talk over 127.0.0.1" in problems[0]


def test_wrong_experts_are_a_problem(look, monkeypatch):
    def twice(name, experts):
        return lambda rows, index, weights: rows

    monkeypatch.setattr("moe_lightning.cli.environment_experts.make_backend", twice)
    _, _, problems = look()
    assert "experts are computed wrongly here" in problems[0]


def test_it_is_an_option_of_the_program(capsys):
    assert main(["--help"]) == 0
    assert "--env" in capsys.readouterr().out
