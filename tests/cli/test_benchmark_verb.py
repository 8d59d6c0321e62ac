"""The verb benchmark, from the command line to its table; processes start, and take some seconds
each."""

import json
from pathlib import Path

import pytest

from moe_lightning.cli.main import main

SMALL = ["--num_rows", "4", "--num_prompt_tokens", "12", "--max_new_tokens", "4", "--rounds", "1"]


def run(out, *options):
    return main(["benchmark", "--output_dir", str(out), *SMALL, *options])


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmark")
    only = ["transformers", "placement", "rpc zmq", "fsdp", "DataParallel"]
    assert run(out, "--only", json.dumps(only)) == 0
    return {
        each["name"]: each
        for each in json.loads((out / "benchmark.json").read_text())["contestants"]
    }


def test_everybody_gives_the_answers_of_one_device(page):
    for name, each in page.items():
        if name == "DataParallel":
            assert "ddp takes its place" in each["why_not"]
            continue
        assert each["why_not"] == "", name
        assert each["difference"]["same_tokens"] == 1.0, name
        assert each["difference"]["logprob"] < 1e-5, name


def test_numbers_are_there(page):
    for name, each in page.items():
        for numbers in each["rounds"]:
            assert numbers["prefill_tokens_per_s"] > 0
            assert numbers["decode_tokens_per_s"] > 0
            assert 1 < numbers["startup_s"] < 120
            assert 1e8 < numbers["peak_bytes"] < 4e9
            assert numbers["num_processes"] == {"rpc zmq": 3}.get(name, each["num_devices"])
            part = {"rpc zmq": "wait"}.get(name, "compute")  # its experts are elsewhere
            assert (numbers.get(f"prefill_{part}_us", 0) > 0) == (name != "transformers")
            moves_rows = name in ("placement", "rpc zmq")
            assert (numbers.get("decode_row_bytes", 0) > 0) == moves_rows, name
            for what in ("decode_weight_bytes", "decode_gather_us"):
                assert (numbers.get(what, 0) > 0) == (name == "fsdp"), name


def test_wrong_options(tmp_path, capsys):
    for options, said in {
        ("--only", "[fdsp]"): "no 'fdsp' among",
        ("--max_new_tokens", "1"): "at least 2",
        ("--rounds", "0"): "at least 1",
        ("--minutes", "0"): "above 0",
        ("--data.input", "absent.jsonl"): "absent.jsonl",
        ("--model.dtype", "int3"): "int3",
    }.items():
        assert run(tmp_path, *options) == 2, options
        assert said in capsys.readouterr().err
    assert run(tmp_path, "--model.checkpoint", str(tmp_path / "none")) == 4
    assert not Path(tmp_path, "benchmark.md").exists()
