"""``plan`` and ``--trainer.strategy moe_auto`` from the command line."""

import json
import socket
from pathlib import Path

import pytest
from transformers import Qwen3MoeConfig

from moe_lightning.cli.strategy_names import offer_all_devices
from moe_lightning.modeling.checkpoint import open_checkpoint
from moe_lightning.placement.cluster import Cluster

# Qwen3-30B-A3B as published: 30,532,122,624 parameters, 28,991,029,248 of them in experts.
NUM_BYTES, EXPERT_BYTES = 2 * 30_532_122_624, 2 * 28_991_029_248


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A config.json, and no weights."""
    path = tmp_path_factory.mktemp("qwen")
    Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        dtype="bfloat16",
        hidden_size=2048,
        num_hidden_layers=48,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=151936,
    ).save_pretrained(path)
    return path


def table(out):
    """The lines of the table by the strategy's name, without the head."""
    lines = out.split("\n\n")[1].splitlines()[1:]
    return {line.split()[0]: line for line in lines}


def test_the_demo_on_this_machine(run) -> None:
    finished = run("plan", "--dtype", "bfloat16")  # as it is on disk
    assert finished.code == 0, finished.err
    rows = table(finished.out)
    assert set(rows) == {
        *("auto", "ddp", "moe_placement", "moe_rpc", "moe_fsdp", "moe_ep", "moe_tp", "moe_pp")
    }
    num_bytes = open_checkpoint("demo").num_bytes
    assert f"{num_bytes / 1e6:.1f} MB   yes" in rows["auto"]
    assert finished.out.count("moe_auto: ") == 3
    assert "chosen --trainer.strategy auto" in finished.out
    assert not any(Path().iterdir())


def test_a_published_model_without_its_weights(run, qwen) -> None:
    finished = run("plan", "--model.checkpoint", qwen, "--devices", "4x24GiB")
    assert finished.code == 0, finished.err
    rows = table(finished.out)
    assert "61.1 GB    no" in rows["auto"]
    # Dense layers, 3.1 GB, and a quarter of the experts.
    assert "17.6 GB   yes" in rows["moe_placement"]
    assert "moe_auto: chosen --trainer.strategy moe_placement" in finished.out


def test_json_has_the_same_numbers(run, qwen) -> None:
    finished = run("plan", "--model.checkpoint", qwen, "--devices=2x8x80GiB", "--json")
    assert finished.code == 0, finished.err
    plan = json.loads(finished.out)
    assert (plan["total_bytes"], plan["expert_bytes"]) == (NUM_BYTES, EXPERT_BYTES)
    assert plan["dense_bytes"] == NUM_BYTES - EXPERT_BYTES
    assert plan["expert_bytes_by_layer"] == [EXPERT_BYTES // 48] * 48
    assert (plan["num_nodes"], plan["devices_per_node"]) == (2, 8)
    assert plan["bytes_per_device"] == 80 * 2**30
    copies = {"fsdp_size": 1, "dp_replicate_size": 16, "dense": "replicated"}
    assert plan["choice"] == {"name": "moe_fsdp", "options": copies}
    by_name = {row["name"]: row for row in reversed(plan["strategies"])}
    assert by_name["auto"]["bytes_on_a_device"] == NUM_BYTES
    assert by_name["auto"]["fits"] is True
    # A row of 4096 bytes, there and back, to the other ranks of a machine that have one of the 8
    # experts. Each expert is shared by two machines, so of an eighth of all, half comes from the
    # other.
    rows = 4096 * 2 * 7 * (1 - (7 / 8) ** 8)
    gathered = EXPERT_BYTES / 8 / 2 / 16384 / 48
    sent = by_name["moe_ep"]["bytes_per_token_and_layer"]["prefill"]
    assert sent == pytest.approx(rows + gathered)


def test_training_has_other_numbers_and_another_choice(run, qwen) -> None:
    finished = run(
        *("plan", "--model.checkpoint", qwen, "--devices", "8x80GiB", "--training", "true")
    )
    assert finished.code == 0, finished.err
    rows = table(finished.out)
    assert f"{16 * NUM_BYTES / 2e9:.1f} GB    no" in rows["auto"]
    assert "chosen --trainer.strategy moe_fsdp --trainer.strategy.ep_size 8" in finished.out
    lora = run(
        *("plan", "--model.checkpoint", qwen, "--devices", "8x80GiB", "--training", "true"),
        *("--lora_rank", 8, "--dtype", "bfloat16", "--json"),
    )
    alone = json.loads(lora.out)["strategies"][0]["bytes_on_a_device"]
    assert NUM_BYTES < alone < 1.2 * NUM_BYTES


def test_backends_and_dtypes_change_what_fits(run, qwen) -> None:
    common = ("plan", "--model.checkpoint", qwen, "--devices", "64GiB", "--json")
    choices = {
        options: json.loads(run(*common, *options).out)["choice"]
        for options in [
            (),
            ("--model.dtype", "float32"),
            ("--experts_backend", "cpu_int8"),
            ("--experts_backend", "cpu_packed"),
        ]
    }
    assert [choice is not None for choice in choices.values()] == [True, False, True, False]


def test_if_nothing_fits_the_table_and_what_helps_are_printed(run, qwen) -> None:
    finished = run("plan", "--model.checkpoint", qwen, "--devices", "24GiB")
    assert finished.code == 0
    assert "37.9 GB too much" in table(finished.out)["auto"]
    assert "Nothing fits" in finished.out
    assert "--trainer.strategy moe_rpc" in finished.out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--devices", "four"], 2, ["--devices 'four'", "4x80GiB", "2x8x80GiB"]),
        (["--devices", "0x80GiB"], 2, ["--devices '0x80GiB'"]),
        (["--dtype", "int3"], 2, ["dtype", "int3"]),
        (["--trainer.precision", "bf16-true", "--dtype", "float32"], 2, ["bf16-true"]),
        (["--banana", "1"], 2, ["banana"]),
        (["--model.checkpoint", "no/such/place"], 4, ["no/such/place"]),
        (["--model.checkpoint", "."], 4, ["config.json"]),
    ],
)
def test_wrong_options_are_named(run, arguments, code, words) -> None:
    finished = run("plan", *arguments)
    assert finished.code == code, finished.err
    assert "Traceback" not in finished.err
    assert finished.err.startswith("error: ")
    for word in words:
        assert word in finished.err, finished.err


def test_no_weights_are_read_and_nothing_is_downloaded(run, tiny, monkeypatch) -> None:
    def refuse(*_):
        raise AssertionError("a weight was read, or the network used")

    monkeypatch.setattr("moe_lightning.modeling.checkpoint.os.preadv", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert run("plan", "--model.checkpoint", tiny).code == 0


# moe_auto.


def test_the_shipped_config_gives_the_rows_of_single_device_on_the_demo(run) -> None:
    for name in ("single_device", "auto"):
        finished = run(
            *("predict", "--config", f"{name}.yaml", "--data.limit_rows", 6),
            *("--model.task.max_new_tokens", 16),
        )
        assert finished.code == 0, finished.err
    assert finished.err.count("moe_auto: ") == 3
    auto, single = (
        Path("outputs", name, "predictions.jsonl").read_bytes()
        for name in ("auto", "single_device")
    )
    assert len(auto.splitlines()) == 6
    assert auto == single
    assert "strategy: moe_auto" in Path("outputs/auto/config.yaml").read_text()


@pytest.mark.parametrize(
    "name", [["--trainer.strategy", "moe_auto"], ["--trainer.strategy=AutoStrategy"]]
)
def test_the_name_chooses_and_run_json_says_what(predict, write_rows, monkeypatch, name) -> None:
    write_rows("in.jsonl", [{"id": n, "prompt": f"prompt {n}"} for n in range(4)])
    monkeypatch.setattr(
        "moe_lightning.strategies.choosing.look_around",
        lambda *_, **__: Cluster(1, 2, 200_000, "cpu"),
    )
    common = ("--data.input", "in.jsonl", "--model.task.max_new_tokens", 4)
    assert predict(*common, "--output_dir", "single").code == 0
    finished = predict(*common, *name, "--trainer.devices", 2)
    assert finished.code == 0, finished.err
    assert json.loads(Path("out/run.json").read_text())["strategy"] == "PlacementStrategy"
    rows, want = (Path(d, "predictions.jsonl").read_bytes() for d in ("out", "single"))
    assert rows == want


def test_too_little_memory_ends_with_the_numbers(predict, monkeypatch) -> None:
    Path("in.jsonl").write_text('{"id": 1, "prompt": "To be"}\n')
    monkeypatch.setattr(
        "moe_lightning.strategies.choosing.look_around",
        lambda *_, **__: Cluster(1, 1, 50_000, "cpu"),
    )
    finished = predict("--data.input", "in.jsonl", "--trainer.strategy", "moe_auto")
    assert finished.code == 2
    assert finished.err.startswith("error: moe_auto found Qwen3MoeForCausalLM")
    assert "45.0 KB of a device" in finished.err


def test_fit_on_one_device(run, tiny) -> None:
    Path("train.txt").write_text("so long lives this and this gives life to thee\n" * 200)
    finished = run(
        *("fit", "--model.checkpoint", tiny, "--output_dir", "out", "--trainer.max_steps", 1),
        *("--data.train", "train.txt", "--data.sequence_length", 32),
        *("--trainer.strategy", "moe_auto"),
    )
    assert finished.code == 0, finished.err
    assert "moe_auto: training on one device" in finished.err


def test_all_devices_are_offered_unless_the_user_says_otherwise() -> None:
    auto = "--trainer.devices=auto"
    assert offer_all_devices(["--trainer.strategy", "moe_auto"])[0] == auto
    assert offer_all_devices(["--trainer.strategy=moe_auto"])[0] == auto
    given = ["--trainer.strategy=moe_auto", "--trainer.devices", "2"]
    assert offer_all_devices(given) == [auto, *given]  # the last one counts
    for others in (["--trainer.strategy", "ddp"], [], ["--config", "auto.yaml"]):
        assert offer_all_devices(others) == others
