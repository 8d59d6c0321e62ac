"""The package as others get it: what is in the wheel, what it needs, and how it is built."""

import json
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from moe_lightning import __version__
from moe_lightning.cli.main import main
from moe_lightning.cli.plain_words import plain_words
from moe_lightning.data.remote_input import fetch_input
from moe_lightning.errors import UsageError
from moe_lightning.extras import EXTRAS
from moe_lightning.finetune.adapter_files import save_adapter
from moe_lightning.jobs.url_storage import UrlStorage

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = sorted((ROOT / "moe_lightning").rglob("*.py"))
MANY_LINES, REASON = 300, "over 300 lines because"


# Files.


def test_a_long_file_gives_its_reason_in_its_first_lines():
    without = []
    for path in SOURCES:
        lines = path.read_text().splitlines()
        if len(lines) > MANY_LINES and not any(REASON in line for line in lines[:15]):
            without.append(f"{path.relative_to(ROOT)}: {len(lines)}")
    assert without == []


def test_the_version_is_the_same_everywhere():
    assert PROJECT["version"] == __version__
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()


# Builds.


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with the wheel and the sdist of this checkout."""
    folder = tmp_path_factory.mktemp("dist")
    build(ROOT, folder)
    return folder


def build(source, folder, *targets):
    command = [sys.executable, "-W", "error", "-m", "hatchling", "build", "-d", folder, *targets]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=True)
    assert "warn" not in (done.stdout + done.stderr).lower()


def names_in_wheel(folder):
    (wheel,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_holds_the_package_and_nothing_else(built):
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "moe_lightning"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    tracked = [name for name in tracked if (ROOT / name).is_file()]
    configs = [f"moe_lightning/configs/{path.name}" for path in (ROOT / "configs").iterdir()]
    about = f"moe_lightning-{__version__}.dist-info"
    assert names_in_wheel(built) == {
        *tracked,
        *configs,
        *(f"{about}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt")),
        f"{about}/licenses/LICENSE",
    }
    for needed in (
        "py.typed",
        "configs/fsdp.yaml",
        "demo/checkpoint/model.safetensors",
        "demo/prompts.jsonl",
        "reports/page.css",
        "reports/page.html",
    ):
        assert f"moe_lightning/{needed}" in names_in_wheel(built)


def test_the_metadata_says_what_the_project_says(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        text = file.read(f"moe_lightning-{__version__}.dist-info/METADATA").decode()
    headers, _, readme = text.partition("\n\n")
    assert "License-Expression: Apache-2.0" in headers
    assert "Description-Content-Type: text/markdown" in headers
    assert {f"Provides-Extra: {extra}" for extra in EXTRAS.values()} <= set(headers.splitlines())
    assert readme.strip() == (ROOT / "README.md").read_text().strip()


def test_the_sdist_builds_the_same_wheel(built, tmp_path):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        file.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    wanted = {"moe_lightning", "configs", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"}
    assert {path.name for path in unpacked.iterdir()} - wanted == {"PKG-INFO", ".gitignore"}
    build(unpacked, tmp_path / "dist", "-t", "wheel")
    (first,), (second,) = built.glob("*.whl"), (tmp_path / "dist").glob("*.whl")
    assert first.read_bytes() == second.read_bytes()


def test_the_installed_wheel_runs_in_an_empty_folder(built, tmp_path):
    """The whole of it, from an environment without anything, is scripts/check_package.sh."""
    (wheel,) = built.glob("*.whl")
    site, here = tmp_path / "site", tmp_path / "here"
    here.mkdir()
    install = ["pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run([sys.executable, "-m", *install], check=True)

    def run(*command):
        environment = {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=here, env=environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run(sys.executable, "-c", "import moe_lightning; print(moe_lightning.__file__)")
    assert Path(where.strip()).is_relative_to(site)
    entry_point = site / "bin" / "moe-lightning"
    assert run(sys.executable, entry_point, "--version") == f"{__version__}\n"
    run(sys.executable, "-m", "moe_lightning", "predict", "--config", "single_device.yaml",
        "--model.task.max_new_tokens", "2")  # fmt: skip
    answers = (here / "outputs" / "single_device" / "predictions.jsonl").read_text().splitlines()
    assert len(answers) == 60
    assert {path.name for path in here.iterdir()} == {"outputs"}
    fsdp = ["predict", "--config", "fsdp.yaml", "--print_config"]
    assert "ShardedStrategy" in run(sys.executable, "-m", "moe_lightning", *fsdp)


# What is needed.


def closure(requirements):
    """Distributions that requirements bring along, as far as they are installed."""
    found, waiting = set(), [(Requirement(each), {""}) for each in requirements]
    while waiting:
        requirement, extras = waiting.pop()
        marker, name = requirement.marker, canonicalize_name(requirement.name)
        if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in extras):
            continue
        wanted = (name, frozenset(requirement.extras))
        if wanted not in found:
            found.add(wanted)
            try:
                needs = metadata.requires(name) or []
            except metadata.PackageNotFoundError:
                continue
            waiting += [(Requirement(each), {"", *requirement.extras}) for each in needs]
    return {name for name, _ in found}


IMPORT_ALL = """
import importlib, json, sys
from importlib.machinery import PathFinder

ABSENT = set(json.loads(sys.argv[1]))

class WithoutThem(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in ABSENT else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutThem
failed = {}
for name in json.loads(sys.argv[2]):
    try:
        importlib.import_module(name)
    except BaseException as error:
        failed[name] = f"{type(error).__name__}: {error}"
assert not ABSENT & set(sys.modules)
print(json.dumps(failed))
"""


def test_every_module_imports_with_the_required_packages_alone():
    required = closure(PROJECT["dependencies"])
    absent = [
        module
        for module, names in metadata.packages_distributions().items()
        if module != "moe_lightning" and not required & {canonicalize_name(name) for name in names}
    ]
    assert {"pytest", "peft", "tensorboard", "hypothesis"} <= set(absent)
    paths = [path.relative_to(ROOT).with_suffix("") for path in SOURCES]
    modules = [".".join(path.parts).removesuffix(".__init__") for path in paths]
    command = [sys.executable, "-c", IMPORT_ALL, json.dumps(absent), json.dumps(modules)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    failed = json.loads(done.stdout.splitlines()[-1])
    kernels = failed.pop("moe_lightning.experts.triton_kernels", None)
    if "triton" in absent:
        assert "pip install 'moe-lightning[triton]'" in kernels
    assert failed == {}


def test_every_extra_is_one_of_the_project():
    extras = PROJECT["optional-dependencies"]
    for package, extra in EXTRAS.items():
        assert any(Requirement(each).name == package for each in extras[extra])


def test_lower_bounds_are_given():
    for each in PROJECT["dependencies"]:
        assert any(bound.operator == ">=" for bound in Requirement(each).specifier), each


@pytest.mark.parametrize(
    ("package", "url", "extra"),
    [
        ("s3fs", "s3://bucket/rows.jsonl", "s3"),
        ("gcsfs", "gs://bucket/rows.jsonl", "gcs"),
        ("adlfs", "abfs://container/rows.jsonl", "azure"),
    ],
)
@pytest.mark.parametrize("use", [fetch_input, UrlStorage])
def test_a_url_says_which_extra_reads_it(package, url, extra, use, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=rf"{package}.*pip install 'moe-lightning\[{extra}\]'"):
        use(url)


def test_adapters_say_which_extra_writes_them(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match=r"pip install 'moe-lightning\[lora\]'"):
        save_adapter(tmp_path, [("a", torch.zeros(1))], rank=1, alpha=1.0, base="demo")


def test_a_logger_says_which_extra_it_needs(tmp_path, monkeypatch, capfd):
    for name in ("tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    options = ["--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", str(tmp_path)]
    options += ["--output_dir", str(tmp_path / "out"), "--model.task.max_new_tokens", "1"]
    assert main(["predict", "--config", "single_device.yaml", *options]) == 2
    assert "pip install 'moe-lightning[tensorboard]'" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("package", "remedy"),
    [
        ("tensorboard", "is missing: pip install 'moe-lightning[tensorboard]'"),
        ("wandb>=0.12.10", "not met. HINT: Try running `pip install -U 'wandb>=0.12.10'`"),
    ],
)
def test_what_lightning_says_of_missing_packages(package, remedy):
    """The words of Lightning 2.6.6 where the package is not even installed."""
    said = f"Requirement '{package}' not met. HINT: Try running `pip install -U '{package}'`"
    assert remedy in plain_words(f"- Problem with given class_path 'Logger':\n  {said}")
