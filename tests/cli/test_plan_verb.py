"""``plan`` and ``--trainer.strategy moe_auto`` from the command line."""

import json
import socket
from math import comb
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
    return {line.split()[0]: " ".join(line.split()) for line in lines}


def test_the_demo_on_this_machine(run) -> None:
    finished = run("plan", "--dtype", "bfloat16")  # as it is on disk
    assert finished.code == 0, finished.err
    rows = table(finished.out)
    assert set(rows) == {
        *("auto", "ddp", "moe_placement", "moe_rpc", "moe_fsdp", "moe_ep", "moe_tp", "moe_pp")
    }
    num_bytes = open_checkpoint("demo").num_bytes
    assert f"{num_bytes / 1e6:.1f} MB yes" in rows["auto"]
    assert finished.out.count("moe_auto: ") == 3
    assert "chosen --trainer.strategy auto" in finished.out
    assert not any(Path().iterdir())


def test_a_published_model_without_its_weights(run, qwen) -> None:
    finished = run("plan", "--model.checkpoint", qwen, "--devices", "4x24GiB")
    assert finished.code == 0, finished.err
    rows = table(finished.out)
    assert "61.1 GB no" in rows["auto"]
    # Dense layers, 3.1 GB, and a quarter of the experts.
    assert "17.6 GB yes" in rows["moe_placement"]
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
    # experts; there also 8 int32 and 8 weights. Each expert is shared by two machines, so of an
    # eighth of all, half comes from the other.
    rows = (4096 * 2 + 8 * 4 + 8 * 2) * 7 * (1 - comb(112, 8) / comb(128, 8))
    gathered = EXPERT_BYTES / 8 / 2 / 16384 / 48
    sent = by_name["moe_ep"]["bytes_per_token_and_layer"]["prefill"]
    assert sent == pytest.approx(rows + gathered)


def test_training_has_other_numbers_and_another_choice(run, qwen) -> None:
    finished = run(
        *("plan", "--model.checkpoint", qwen, "--devices", "8x80GiB", "--training", "true")
    )
    assert finished.code == 0, finished.err
    rows = table(finished.out)
    assert f"{16 * NUM_BYTES / 2e9:.1f} GB no" in rows["auto"]
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
        (["--bandwidth", "900"], 2, ["--bandwidth '900'", "900GB/s"]),
        (["--flops", "400TB/s"], 2, ["--flops '400TB/s'", "400T"]),
        (["--latency", "10GB/s"], 2, ["--latency '10GB/s'", "10us"]),
        (["--memory_bandwidth", "0TB/s"], 2, ["--memory_bandwidth '0TB/s'"]),
        (["--devices", "80GiB", "--flops", "1T"], 2, ["--flops and --memory_bandwidth"]),
        (["--decode_tokens", "0"], 2, ["decode_tokens"]),
        (["--routing", "no.npz"], 2, ["no.npz", "cannot be read"]),
        (["--routing", "other.json"], 2, ["another model", "1 MoE layers with 2 experts"]),
        (["--model.checkpoint", "no/such/place"], 4, ["no/such/place"]),
        (["--model.checkpoint", "."], 4, ["config.json"]),
    ],
)
def test_wrong_options_are_named(run, arguments, code, words) -> None:
    Path("other.json").write_text('{"loads": {"0": [3, 4]}}')
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


RATES = ("--flops", "100T", "--memory_bandwidth", "1TB/s", "--bandwidth", "10GB/s")


def test_speeds_are_what_the_slowest_part_allows(run, qwen) -> None:
    common = ("plan", "--model.checkpoint", qwen, "--devices", "2x80GiB", "--json")
    plan = json.loads(run(*common, *RATES, "--latency", "20us", "--decode_tokens", 1).out)
    assert plan["rates"]["link_bytes_per_s"] == 10e9
    by_name = {row["name"]: row for row in reversed(plan["strategies"])}
    # One token reads all dense layers, the head and 8 of 128 experts of each layer. The input
    # embedding, as large as the head, is left out.
    read = NUM_BYTES - EXPERT_BYTES - 2 * 151936 * 2048 + EXPERT_BYTES * 8 / 128
    alone = by_name["auto"]["tokens_per_s"]["decode"]
    assert alone == pytest.approx(1e12 / read, rel=1e-3)
    assert by_name["ddp"]["tokens_per_s"]["decode"] == pytest.approx(2 * alone)
    # In stages, one after another: hidden states there and back, and two messages.
    seconds = 1 / alone + 2 * 4096 / 10e9 + 2 * 20e-6
    assert by_name["moe_pp"]["tokens_per_s"]["decode"] == pytest.approx(1 / seconds)
    # Many tokens are multiplied with as many weights each; only decoding makes their logits.
    prefill = by_name["auto"]["tokens_per_s"]["prefill"]
    weights = (read - 2 * 151936 * 2048) / 2
    assert prefill == pytest.approx(100e12 / 2 / weights, rel=0.1)


def test_no_speed_is_invented(run, qwen) -> None:
    common = ("plan", "--model.checkpoint", qwen, "--json")
    unknown = json.loads(run(*common, "--devices", "2x80GiB").out)
    assert unknown["rates"] is None
    for row in unknown["strategies"]:
        assert row["tokens_per_s"] == {"decode": None, "prefill": None}
    # Nothing is said of the network, which all but these need.
    machines = json.loads(run(*common, "--devices", "2x2x80GiB", *RATES).out)
    known = [r["name"] for r in machines["strategies"] if r["tokens_per_s"]["decode"] is not None]
    assert known == ["auto", "ddp", "moe_fsdp", "moe_placement"]
    # Of this machine's devices they are found by trying, unless they are given.
    found = json.loads(run("plan", "--json", "--flops", "1G").out)
    assert found["rates"]["flops"] == 1e9
    assert found["rates"]["memory_bytes_per_s"] > 1e8
    assert found["strategies"][0]["tokens_per_s"]["prefill"] > 0


@pytest.mark.parametrize("training", ["false", "true"])
def test_lines_are_short_and_table_and_json_agree(run, qwen, training) -> None:
    options = ("plan", "--model.checkpoint", qwen, "--devices", "2x8x80GiB", "--training", training)
    finished = run(*options, *RATES, "--network", "1GB/s")
    assert max(map(len, finished.out.splitlines())) <= 120
    rows = finished.out.split("\n\n")[1].splitlines()[1:]
    strategies = json.loads(run(*options, *RATES, "--network", "1GB/s", "--json").out)["strategies"]
    for line, row in zip(rows, strategies, strict=True):
        assert f"{row['bytes_on_a_device'] / 1e9:,.1f} GB" in line
        assert row["why_not"] in line
        if row["fits"]:
            assert line.endswith(f"{row['tokens_per_s']['prefill']:,.0f}")


def test_recorded_routing_changes_the_bytes(run) -> None:
    loads = {layer: [100] * 5 + [1] * 11 for layer in range(4)}
    Path("routing_balance.json").write_text(json.dumps({"loads": loads}))
    options = ("plan", "--devices", "2x8GiB", "--json", "--routing", "routing_balance.json")
    recorded, uniform = (json.loads(run(*each).out) for each in (options, options[:-2]))
    assert (recorded["routing"], uniform["routing"]) == ("recorded", "uniform")
    sent = [
        next(r for r in plan["strategies"] if r["name"] == "moe_placement")[
            "bytes_per_token_and_layer"
        ]["prefill"]
        for plan in (recorded, uniform)
    ]
    assert sent[0] < 0.1 * sent[1], "nearly all rows stay on the first slot"


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
