"""Fits over ranks: losses, gradient norms and weights are those of one process."""

from dataclasses import replace
from functools import partial

import lightning as L
import numpy as np
import pytest
import torch
from fit_runs import ROWS_PER_STEP, Fit, Rows, Seen, fit, fit_each
from ranks import run_on_ranks
from safetensors.torch import load_file, save_file
from sampling import sampled
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM

from moe_lightning import MoELightningModule
from moe_lightning.data.finetune import TextData
from moe_lightning.finetune.fine_tuning import RouterBalance
from moe_lightning.finetune.lora import LoRA
from moe_lightning.finetune.trainable import Trainable
from moe_lightning.placement import ExpertPlacement, save_loads
from moe_lightning.strategies.sharded_strategy import ShardedStrategy

FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")
LAYOUTS = {  # ranks that share each expert x places along ep
    "2x1": (2, {}),
    "1x2": (2, {"ep_size": 2}),
    "4x1": (4, {}),
    "2x2": (4, {"ep_size": 2}),
    "hsdp 2x2": (4, {"dp_replicate_size": 2}),
}


@pytest.fixture(scope="module")
def one_process():
    """The report of a fit in this process, by the same options without a strategy."""
    made = {}

    def run(path, options):
        key = (str(path), repr(options))
        if key not in made:
            made[key] = fit(path, options)
        return made[key]

    return run


def assert_same(report, expected, name, tolerance=1e-5):
    """Sums of fp32 in another order differ by some 1e-7; the issue asks for 1e-5."""
    for what in ("losses", "norms"):
        torch.testing.assert_close(
            getattr(report, what),
            getattr(expected, what),
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, what=what: f"{name}: {what}: {text}",
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_one_process_is_plain_transformers_and_torch(family_checkpoint, one_process, family):
    path = family_checkpoint(family)
    report = one_process(path, Fit())
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, experts_implementation="eager"
    )
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rows = Rows(6)
    aux = getattr(model.config, "router_aux_loss_coef", None)
    losses, norms = [], []
    for step in range(6):
        taken = [rows[n] for n in range(step * ROWS_PER_STEP, (step + 1) * ROWS_PER_STEP)]
        batch = {name: torch.stack([row[name] for row in taken]) for name in taken[0]}
        out = model(**batch, **({} if aux is None else {"output_router_logits": True}))
        out.loss.backward()
        router_loss = 0.0 if aux is None else aux * float(out.aux_loss.detach())
        losses.append(float(out.loss.detach()) - router_loss)
        norms.append(float(clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(report.losses, losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(report.norms, norms, rtol=1e-5, atol=1e-5)


WAYS = {
    "full": ({}, 1e-3, LAYOUTS),
    "lora": ({"lora": LoRA(rank=4)}, 1e-2, ("2x1", "1x2", "2x2")),
    # Nothing below the first experts has a gradient.
    "lora of experts": ({"lora": LoRA(rank=4, targets=[])}, 1e-2, ("1x2",)),
}


@pytest.mark.parametrize("family", sampled(FAMILIES, "qwen3_moe"))
def test_steps_over_ranks_are_those_of_one_process(family_checkpoint, one_process, family):
    path = family_checkpoint(family)
    for num_ranks in (2, 4):
        runs = {
            (way, layout): Fit(LAYOUTS[layout][1], module=module, lr=lr)
            for way, (module, lr, layouts) in WAYS.items()
            for layout in layouts
            if LAYOUTS[layout][0] == num_ranks
        }
        for reports in run_on_ranks(num_ranks, fit_each, path, runs):
            for (way, layout), report in reports.items():
                module, lr, _ = WAYS[way]
                expected = one_process(path, Fit(module=module, lr=lr))
                assert len(report.losses) == 6
                assert_same(report, expected, f"{way} {layout}")


MORE_LAYOUTS = {
    "hsdp, ep 2": {"dp_replicate_size": 2, "ep_size": 2},
    "tp 2, ep 2": {"tp_size": 2, "ep_size": 2},
    "tp 2, ep 4": {"tp_size": 2, "ep_size": 4},
    "ep 4, checkpointed": {"ep_size": 4, "activation_checkpointing": True, "overlap_chunks": 2},
    "4x1": {},  # each expert's rows are cut along the experts: 2, 2, 2 and none of 6
}


@pytest.mark.wide
def test_more_layouts_of_a_model_whose_head_is_its_embedding(family_checkpoint, one_process):
    path = family_checkpoint("qwen3_moe", num_experts=6, tie=True)
    chosen = {"trainable": Trainable(train_experts=["1:1,5", "2:*"], train_dense=True)}
    ways = {"full": {}, "chosen experts": chosen}
    runs = {
        (way, layout): Fit(strategy, module=module, num_steps=3)
        for way, module in ways.items()
        for layout, strategy in MORE_LAYOUTS.items()
        if way == "full" or layout == "4x1"
    }
    for reports in run_on_ranks(4, fit_each, path, runs):
        for (way, layout), report in reports.items():
            expected = one_process(path, Fit(module=ways[way], num_steps=3))
            assert_same(report, expected, f"{way} {layout}")
    (report,) = run_on_ranks(1, fit_each, path, {"alone": Fit({}, num_steps=3)})
    assert_same(report["alone"], one_process(path, Fit(num_steps=3)), "alone", tolerance=0)


def one_cycle(optimizer):
    """Warm-up over two steps, then down along a cosine."""
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=6, pct_start=0.34)


OPTIONS = {
    "accumulation": Fit(trainer={"accumulate_grad_batches": 2}, num_steps=3),
    "clipped by value": Fit(
        trainer={"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"},
        module={"optimizer": partial(torch.optim.SGD, lr=10.0)},  # Adam would undo the clipping
    ),
    "not clipped": Fit(
        trainer={"gradient_clip_val": None}, module={"optimizer": partial(torch.optim.SGD, lr=0.5)}
    ),
    "router losses": Fit(
        module={"router_balance": RouterBalance(aux_loss_weight=0.1, z_loss_weight=0.01)}
    ),
    "schedule": Fit(module={"lr_scheduler": one_cycle}),
    "frozen router": Fit(module={"trainable": Trainable(freeze_router=True)}, num_steps=3),
    "chosen experts": Fit(module={"trainable": Trainable(train_experts=["0:1", "2:0,5"])}),
    "chosen experts and dense": Fit(
        module={"trainable": Trainable(train_experts=["1:*", "2:7"], train_dense=True)},
        num_steps=3,
    ),
    "adapters of chosen experts": Fit(
        module={
            "lora": LoRA(rank=4),
            "trainable": Trainable(train_experts=["1:2,3"]),
        },
        lr=1e-2,
    ),
}
TRAINED = {  # whether a weight of a layer, or an expert's row of one, trains
    "frozen router": lambda name, layer, expert: not name.endswith("mlp.gate.weight"),
    "chosen experts": lambda name, layer, expert: (layer, expert) in [(0, 1), (2, 0), (2, 5)],
    "chosen experts and dense": lambda name, layer, expert: (
        expert is None or layer == 1 or (layer, expert) == (2, 7)
    ),
    "adapters of chosen experts": lambda name, layer, expert: (
        "lora_" in name and (layer, expert) in [(1, 2), (1, 3)]
    ),
}


def start_of(path):
    """The weights of a checkpoint, as plain transformers reads them."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return {name: tensor.detach().numpy() for name, tensor in model.named_parameters()}


def assert_trained(report, start, is_trained, way):
    """What trains has moved, and everything else is bitwise the same."""
    for key, value in report.weights.items():
        name, expert = key if isinstance(key, tuple) else (key, None)
        layer = int(name.split(".")[2]) if ".layers." in name else None
        if "lora_" in name:  # B starts with zeros; A has no gradient in the first step
            before = np.zeros_like(value) if "lora_B" in name else None
        elif name not in start:
            continue  # a buffer
        else:
            before = start[name] if expert is None else start[name][expert]
        if before is not None:
            is_same = np.array_equal(before, value)
            assert is_same != is_trained(name, layer, expert), f"{way}: {key}"


def test_options_over_ranks_do_as_on_one_process(family_checkpoint, one_process):
    path = family_checkpoint("qwen3_moe")
    start = start_of(path)
    options = {way: replace(run, keeps_weights=way in TRAINED) for way, run in OPTIONS.items()}
    layouts = {"2x1": {}, "1x2": {"ep_size": 2}}
    runs = {
        (way, layout): replace(run, strategy=layouts[layout])
        for way, run in options.items()
        for layout in layouts
        if layout == "1x2" or way in ("clipped by value", "not clipped", "chosen experts")
    }
    # Computes the same again in the backward pass.
    runs["checkpointed", "2x1"] = Fit({"activation_checkpointing": True})
    runs["checkpointed", "1x2"] = Fit({"ep_size": 2, "activation_checkpointing": True})
    options["checkpointed"] = Fit()
    # Ranks that compute the same rows.
    fused = {"optimizer": partial(torch.optim.AdamW, lr=1e-3, fused=True)}
    runs["tensor parallel", "tp 2"] = Fit({"tp_size": 2})
    runs["tensor parallel", "tp 2, ep 2, fused"] = Fit({"tp_size": 2, "ep_size": 2}, module=fused)
    options["tensor parallel"] = Fit()
    # Lightning's own strategy.
    runs["ddp", ""] = Fit("ddp")
    options["ddp"] = Fit()
    for reports in run_on_ranks(2, fit_each, path, runs):
        for (way, layout), report in reports.items():
            expected = one_process(path, options[way])
            assert_same(report, expected, f"{way} {layout}")
            assert report.is_checkpointed == (way == "checkpointed")
            assert report.logged.keys() == expected.logged.keys()
            for name, value in expected.logged.items():
                assert report.logged[name] == pytest.approx(value, abs=1e-5), (way, layout, name)
            if way in TRAINED:
                assert_trained(report, start, TRAINED[way], f"{way} {layout}")
    clipped, free = (one_process(path, options[way]) for way in ("clipped by value", "not clipped"))
    assert set(clipped.norms) == set(free.norms) == {None}
    assert len(one_process(path, options["accumulation"]).losses) == 6


def test_half_precision_over_ranks_stays_near_float32(family_checkpoint, one_process):
    path = family_checkpoint("qwen3_moe")
    expected = one_process(path, Fit())
    runs = {
        (precision, layout): Fit(options, trainer={"precision": precision})
        for precision in ("bf16-mixed", "bf16-true")
        for layout, options in {"2x1": {}, "1x2": {"ep_size": 2}}.items()
    }
    for reports in run_on_ranks(2, fit_each, path, runs):
        for (precision, layout), report in reports.items():
            # bfloat16 has 8 bits of a number; the weights of bf16-true lose small updates as well.
            assert_same(report, expected, f"{precision} {layout}", tolerance=5e-2)
            whole = {"bf16-mixed": {"torch.float32"}, "bf16-true": {"torch.bfloat16"}}
            assert report.dtypes == whole[precision]
            assert report.losses != expected.losses


def test_biases_that_balance_are_moved_alike_everywhere(family_checkpoint, one_process):
    path = family_checkpoint("deepseek_v3")
    balance = {"router_balance": RouterBalance(bias_update_rate=0.05)}
    run = Fit(
        module=balance,
        trainer={"accumulate_grad_batches": 2},  # counts of both batches make one move
        keeps_weights=True,
    )
    expected = one_process(path, run)
    runs = {"2x1": replace(run, strategy={}), "1x2": replace(run, strategy={"ep_size": 2})}
    biases = {k: v for k, v in expected.weights.items() if "e_score_correction_bias" in k}
    assert len(biases) == 2
    for reports in run_on_ranks(2, fit_each, path, runs):
        for layout, report in reports.items():
            assert_same(report, expected, layout)
            assert report.logged["train_imbalance"] == expected.logged["train_imbalance"]
            for name, bias in biases.items():
                assert np.abs(bias).max() > 0.05, "it has moved"
                np.testing.assert_array_equal(report.weights[name], bias, err_msg=name)


def rows_of(weights):
    """Those weights that are an expert's row."""
    return [(key, value) for key, value in weights.items() if isinstance(key, tuple)]


def test_copies_of_experts_stay_equal(family_checkpoint, one_process, tmp_path):
    """6 experts on 4 ranks: uneven, one on all ranks, and as a policy puts them."""
    path = family_checkpoint("qwen3_moe", num_experts=6)
    slots = ((0, 1, 2, 3), (1,), (0, 2), (3,), (1,), (1, 3))
    ExpertPlacement(4, dict.fromkeys(range(3), slots)).save(tmp_path / "placement.json")
    ExpertPlacement(2, dict.fromkeys(range(3), ((0,), (0, 1), (1,), (0, 1), (0,), (1,)))).save(
        tmp_path / "two.json"
    )
    save_loads(tmp_path / "loads.json", dict.fromkeys(range(3), (90, 10, 20, 80, 30, 10)))
    file = {"ep_size": 4, "policy": "file", "file": str(tmp_path / "placement.json")}
    strategies = {
        "uneven": {"ep_size": 4},
        "one on all": file,
        "balanced": {
            **{"ep_size": 4, "policy": "balanced", "replicas": 2},
            "loads": str(tmp_path / "loads.json"),
        },
        "efsdp 2": {"ep_size": 2, "policy": "file", "file": str(tmp_path / "two.json")},
    }
    ways = {"full": ({}, 1e-3), "lora": ({"lora": LoRA(rank=4)}, 1e-2)}
    runs = {
        (way, layout): Fit(strategy, module=module, lr=lr, keeps_weights=True)
        for layout, strategy in strategies.items()
        for way, (module, lr) in ways.items()
        if way == "full" or layout == "one on all"
    }
    by_rank = run_on_ranks(4, fit_each, path, runs)
    for (way, layout), run in runs.items():
        expected = one_process(path, replace(run, strategy=None))
        copies = {}
        for reports in by_rank:
            report = reports[way, layout]
            assert_same(report, expected, f"{way} {layout}")
            for key, value in report.weights.items():
                copies.setdefault(key, []).append(value)
        assert copies.keys() == expected.weights.keys()
        held = {len(values) for (_, expert), values in rows_of(copies) if expert == 0}
        assert held == {{"uneven": 1, "one on all": 4, "balanced": 2, "efsdp 2": 1}[layout]}
        for key, values in copies.items():
            for value in values[1:]:
                np.testing.assert_array_equal(value, values[0], err_msg=f"{way} {layout} {key}")


def test_a_rank_whose_experts_get_no_rows(family_checkpoint, one_process, tmp_path):
    """Its experts have gradients of zero, and it takes part in every exchange."""
    path = family_checkpoint("gpt_oss", seed=5)
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith("mlp.router.bias"):
                tensor[4:] = -100.0  # experts 4 to 7 are never chosen
        save_file(tensors, file, metadata={"format": "pt"})
    ways = {
        "full": ({}, 1e-3),
        "lora of experts": ({"lora": LoRA(rank=4, targets=[])}, 1e-2),
        "chosen experts": ({"trainable": Trainable(train_experts=["0:0,6", "2:7"])}, 1e-3),
    }
    for num_ranks in (2, 4):
        runs = {
            way: Fit({"ep_size": 2}, module=module, lr=lr)
            for way, (module, lr) in ways.items()
            if num_ranks == 2 or way == "full"
        }
        for reports in run_on_ranks(num_ranks, fit_each, path, runs):
            for way, report in reports.items():
                expected = one_process(path, replace(runs[way], strategy=None))
                assert_same(report, expected, f"{way} on {num_ranks} ranks")


class Held(L.Callback):
    """The held-out losses of a fit."""

    def __init__(self):
        self.losses = []

    def on_validation_end(self, trainer, pl_module):
        self.losses.append(float(trainer.callback_metrics["val_loss"]))


def fit_text(path, directory, strategies):
    """Losses, norms and held-out losses of fits on text, packed."""
    reports = {}
    for name, (strategy, batch_size) in strategies.items():
        seen, held = Seen(), Held()
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1 if strategy is None else torch.distributed.get_world_size(),
            strategy="auto" if strategy is None else ShardedStrategy(**strategy),
            max_steps=6,
            val_check_interval=3,
            check_val_every_n_epoch=None,
            gradient_clip_val=0.5,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=directory,
            callbacks=[seen, held],
        )
        module = MoELightningModule(str(path), optimizer=partial(torch.optim.AdamW, lr=1e-3))
        data = TextData(
            train=f"{directory}/train.txt",
            val=f"{directory}/val.txt",
            sequence_length=32,
            batch_size=batch_size,
        )
        trainer.fit(module, data)
        reports[name] = (seen.losses, seen.norms, held.losses)
    return reports


@pytest.mark.wide
def test_text_over_ranks_gives_the_losses_of_one_process(family_checkpoint, tmp_path):
    path = family_checkpoint("qwen3_moe")
    words = [f"to be or not {n} to be" for n in range(200)]
    (tmp_path / "train.txt").write_text("\n<|endoftext|>\n".join(words))
    # Of its last batch of four sequences, some ranks have nothing.
    (tmp_path / "val.txt").write_text("\n<|endoftext|>\n".join(words[:21:2]))
    strategies = {
        2: {"2x1": {}, "1x2": {"ep_size": 2}, "tp": {"tp_size": 2}},
        3: {"1x3": {"ep_size": 3}},  # 8 experts on 3 ranks
        4: {"4x1": {}, "2x2": {"ep_size": 2}},
    }
    for num_ranks, layouts in strategies.items():
        step = 6 if num_ranks == 3 else 4  # sequences
        expected = fit_text(path, tmp_path, {"one": (None, step)})["one"]
        assert [len(values) for values in expected] == [6, 6, 3], "with the one before training"
        sizes = {name: step // (1 if name == "tp" else num_ranks) for name in layouts}
        runs = {name: (layout, sizes[name]) for name, layout in layouts.items()}
        for reports in run_on_ranks(num_ranks, fit_text, path, tmp_path, runs):
            for layout, report in reports.items():
                for got, want in zip(report, expected, strict=True):
                    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=layout)
