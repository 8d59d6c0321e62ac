"""The configs that fine-tune over ranks run as they are, and lower the held-out loss."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ranks import run_on_ranks
from sampling import sampled

import moe_lightning
from moe_lightning.cli.main import main


def fit(directory, config, *options):
    """The exit code of a rank of a run that torchrun has started."""
    before = Path.cwd()
    os.chdir(directory)
    try:
        return main(["fit", "--config", config, *options])
    finally:
        os.chdir(before)


def held_out_losses(output_dir):
    """Held-out loss by step, as in the log; 20 steps in all."""
    with open(output_dir / "logs" / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["val_loss"]]
    return {int(row["step"]): float(row["val_loss"]) for row in rows}


@pytest.fixture(scope="module")
def loss_before(tmp_path_factory):
    """The held-out loss of the demo as it ships."""
    out = tmp_path_factory.mktemp("before")
    before = Path.cwd()
    os.chdir(out)
    try:
        assert main(["validate", "--data.val=demo", "--output_dir=out"]) == 0
    finally:
        os.chdir(before)
    return held_out_losses(out / "out")[0]


@pytest.mark.parametrize("name", sampled(["finetune_lora", "finetune_ep"]))
def test_a_config_runs_as_it_is_under_torchrun(tmp_path, loss_before, name):
    assert run_on_ranks(2, fit, tmp_path, f"{name}.yaml") == [0, 0]
    losses = held_out_losses(tmp_path / "outputs" / name)
    assert list(losses) == [9, 19]
    assert losses[19] < losses[9] < loss_before


@pytest.mark.wide
def test_a_config_starts_its_own_ranks(tmp_path, loss_before):
    """As it is but for the accelerator; without GPUs, devices: auto would be two as well."""
    root = Path(moe_lightning.__file__).parent.parent
    started = subprocess.run(
        [
            *(sys.executable, "-m", "moe_lightning", "fit", "--config", "finetune_fsdp.yaml"),
            *("--trainer.devices=2", "--trainer.accelerator=cpu"),
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert started.returncode == 0, started.stderr
    losses = held_out_losses(tmp_path / "outputs" / "finetune_fsdp")
    assert list(losses) == [9, 19]
    assert losses[19] < losses[9] < loss_before


def test_options_of_training_are_dotted_names(run):
    finished = run(
        *("fit", "--config", "finetune.yaml", "--model.lora.rank", 4),
        *("--model.router_balance.aux_loss_weight", 0.02, "--model.trainable.freeze_router", True),
        *("--model.trainable.train_experts", '["0:1,3-4", "2:*"]', "--print_config"),
    )
    assert finished.code == 0, finished.err
    model = yaml.safe_load(finished.out)["model"]
    lora = model["lora"].get("init_args", model["lora"])
    assert (lora["rank"], lora["alpha"], lora["experts"]) == (4, 16.0, True)
    assert model["router_balance"]["aux_loss_weight"] == 0.02
    assert model["router_balance"]["z_loss_weight"] == 0.0
    assert model["trainable"]["freeze_router"] is True
    assert model["trainable"]["train_experts"] == ["0:1,3-4", "2:*"]


DATA = ("--data.train=demo", "--data.sequence_length=64")
WRONG = {
    "lora.rank=0": "rank=0",
    "trainable.train_experts=['9:0']": "layer 9",
    "trainable.train_experts=[nonsense]": "nonsense",
    "lora.targets=[nothing]": "nothing",
    "router_balance.bias_update_rate=0.1": "bias_update_rate",
}


@pytest.mark.parametrize("option", WRONG)
def test_a_wrong_option_ends_with_its_reason(run, tiny, option):
    finished = run("fit", "--model.checkpoint", tiny, *DATA, f"--model.{option}")
    assert finished.code == 2
    assert WRONG[option] in finished.err
    assert "Traceback" not in finished.err
