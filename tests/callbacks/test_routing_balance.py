"""RoutingBalance counts what the routers chose, and its file balances a placement."""

import json
from collections import Counter
from functools import partial

import lightning as L
import pytest
import torch
from families import FAMILIES
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from quiet_trainer import quiet_trainer
from sampling import sampled
from torch.utils.data import DataLoader

from moe_lightning import Generate, MoELightningModule, PlacementStrategy, RoutingBalance, Score
from moe_lightning.errors import UsageError
from moe_lightning.modeling.seam import find_moe_layers
from moe_lightning.placement import imbalance, load_loads
from moe_lightning.placement.recording import load_recording

PROMPTS = [f"{'ab c ' * n}{n}" for n in range(1, 7)]


def predict(
    checkpoint, output_dir, *, strategy="auto", callbacks=(), task=None, batch_size=6, **settings
):
    module = MoELightningModule(str(checkpoint), task=task or Score())
    trainer = quiet_trainer(output_dir, strategy=strategy, callbacks=list(callbacks), **settings)
    batches = trainer.predict(module, DataLoader(PROMPTS, batch_size=batch_size))
    return module, [row for batch in batches for row in batch]


def routed_by_hand(module, plain, new_ids=None):
    """Rows per expert and layer, of unmodified transformers, one prompt at a time."""
    counts = {}

    def hook(layer):
        def count(_router, _inputs, output):
            index_TK = next(t for t in output if t.dtype == torch.int64)
            counts.setdefault(layer, Counter()).update(index_TK.reshape(-1).tolist())

        return count

    handles = [
        layer.router.register_forward_hook(hook(layer.layer))
        for layer in find_moe_layers(plain.model)
    ]
    for number, prompt in enumerate(PROMPTS):
        ids = module.tokenizer(prompt)["input_ids"]
        plain.logits(ids if new_ids is None else ids + new_ids[number][:-1])
    for handle in handles:
        handle.remove()
    return counts


def json_of(counts, num_experts=8):
    return {str(layer): [rows[e] for e in range(num_experts)] for layer, rows in counts.items()}


@pytest.mark.parametrize("strategy", ["auto", "moe_placement"])
def test_counts_are_those_of_transformers_routers(
    strategy, family, family_checkpoint, plain_transformers, tmp_path
):
    checkpoint = family_checkpoint(family)
    callback = RoutingBalance(str(tmp_path / "out"), picture=False)
    module, _ = predict(checkpoint, tmp_path, strategy=strategy, callbacks=[callback])
    want = routed_by_hand(module, plain_transformers(checkpoint))
    written = json.loads((tmp_path / "out" / "routing_balance.json").read_text())
    assert written["loads"] == json_of(want)
    for layer, rows in want.items():
        assert written["layers"][str(layer)]["num_rows"] == rows.total()
    assert not module.routing_log.is_read


@pytest.mark.parametrize("family", sampled(FAMILIES, "mixtral", "deepseek_v3"))
def test_every_new_token_but_the_last_is_routed(
    family, family_checkpoint, plain_transformers, tmp_path
):
    checkpoint = family_checkpoint(family)
    callback = RoutingBalance(str(tmp_path), picture=False)
    task = Generate(max_new_tokens=5)
    module, rows = predict(checkpoint, tmp_path, callbacks=[callback], task=task)
    new_ids = [row["token_ids"] for row in rows]
    want = routed_by_hand(module, plain_transformers(checkpoint), new_ids)
    got = {layer.layer: layer.load_E.tolist() for layer in callback.summary.layers}
    assert got == {layer: [rows[e] for e in range(8)] for layer, rows in want.items()}


def test_its_file_balances_a_placement_and_answers_stay(family_checkpoint, tmp_path):
    checkpoint = family_checkpoint("qwen3_moe")
    _, want = predict(checkpoint, tmp_path, callbacks=[RoutingBalance()])
    file = tmp_path / "routing_balance.json"
    strategy = PlacementStrategy(["cpu"] * 3, policy="balanced", loads=file, replicas=1)
    _, got = predict(checkpoint, tmp_path, strategy=strategy)
    assert [r["logprob"] for r in got] == pytest.approx([r["logprob"] for r in want], abs=1e-4)
    assert strategy.placement.num_replicas == 3
    linear = PlacementStrategy(["cpu"] * 3)
    predict(checkpoint, tmp_path, strategy=linear)
    loads = load_loads(file)
    assert max(imbalance(strategy.placement, loads).values()) < max(
        imbalance(linear.placement, loads).values()
    )


def test_it_stops_counting_when_a_run_fails(family_checkpoint, tmp_path):
    class Failing(L.Callback):
        def on_predict_batch_end(self, *args, **kwargs):
            raise RuntimeError("on purpose")

    module = MoELightningModule(str(family_checkpoint("qwen3_moe")), task=Score())
    trainer = quiet_trainer(tmp_path, callbacks=[RoutingBalance(str(tmp_path)), Failing()])
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.predict(module, DataLoader(PROMPTS))
    assert not module.routing_log.is_read
    assert not (tmp_path / "routing_balance.json").exists()


# Slots.


def test_rows_of_each_slot_are_those_of_its_experts(family_checkpoint, tmp_path):
    callback = RoutingBalance(str(tmp_path), picture=False)
    strategy = PlacementStrategy(["cpu"] * 3)
    predict(family_checkpoint("qwen3_moe"), tmp_path, strategy=strategy, callbacks=[callback])
    written = json.loads((tmp_path / "routing_balance.json").read_text())
    assert written["slots"] == ["0:cpu", "1:cpu", "2:cpu"]
    for layer, loads in written["loads"].items():
        want = [
            sum(loads[e] for e in strategy.placement.experts_of(slot, int(layer)))
            for slot in range(3)
        ]
        assert written["slot_loads"][layer] == want
        ratio = max(want) / (sum(want) / 3)
        assert written["slot_max_over_mean"][layer] == pytest.approx(ratio, abs=1e-3)


def test_interleaved_halves_and_replicas_are_counted_once(family_checkpoint, tmp_path):
    checkpoint, loads = family_checkpoint("qwen3_moe"), {layer: [9, 1] * 4 for layer in range(3)}
    want, got = RoutingBalance(str(tmp_path / "one")), RoutingBalance(str(tmp_path / "several"))
    predict(checkpoint, tmp_path, callbacks=[want])
    file = tmp_path / "loads.json"
    file.write_text(json.dumps({"loads": loads}))
    strategy = PlacementStrategy(["cpu"] * 2, policy="balanced", loads=file, replicas=3)
    predict(checkpoint, tmp_path, strategy=strategy, callbacks=[got])
    assert got.summary.layers[0].load_E.tolist() == want.summary.layers[0].load_E.tolist()
    for each in got.summary.layers:
        assert got.summary.slot_rows[each.layer].sum() == each.num_rows


# Intervals.


class Other(Logger):
    """A logger of somebody else."""

    def __init__(self):
        super().__init__()
        self.logged = []

    name, version = "other", 0

    def log_metrics(self, metrics, step=None):
        self.logged.append((step, metrics))

    def log_hyperparams(self, *args, **kwargs):
        pass


def test_loggers_get_the_balance_of_each_interval(family_checkpoint, tmp_path):
    other = Other()
    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tb"), other]
    callback = RoutingBalance(str(tmp_path), every_n_batches=2, picture=False)
    checkpoint = family_checkpoint("qwen3_moe")
    predict(checkpoint, tmp_path, callbacks=[callback], batch_size=1, logger=loggers)
    assert [step for step, _ in other.logged[:3]] == [2, 4, 6]
    last = other.logged[-1][1]
    assert last["routing/max_over_mean_worst"] == callback.summary.worst.max_over_mean
    assert set(last) == {f"routing/{name}" for name in (
        "max_over_mean", "max_over_mean_worst", "cv", "entropy", "dead_experts",
        *(f"layer_{layer}/max_over_mean" for layer in range(3)),
    )}  # fmt: skip
    header = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text().splitlines()[0]
    assert "routing/entropy" in header
    assert list((tmp_path / "tb").rglob("events.out.tfevents*"))


def test_a_recording_has_every_interval_and_experts_chosen_together(family_checkpoint, tmp_path):
    callback = RoutingBalance(str(tmp_path), record=True, every_n_batches=2, picture=False)
    predict(family_checkpoint("qwen3_moe"), tmp_path, callbacks=[callback], batch_size=1)
    recording = load_recording(tmp_path / "routing.npz")
    for each in callback.summary.layers:
        loads_IE, both_EE = recording.loads[each.layer], recording.together[each.layer]
        assert loads_IE.shape == (3, 8)
        assert loads_IE.sum(0).tolist() == each.load_E.tolist() == both_EE.diagonal().tolist()
        # Two experts a token: each pair of a token's experts is there from both sides.
        assert both_EE.sum() == 2 * each.num_rows
        assert (both_EE == both_EE.T).all()


def test_wrong_intervals_are_refused():
    with pytest.raises(UsageError, match="every_n_batches=0"):
        RoutingBalance(every_n_batches=0)


# Fit.


class Batches(L.LightningDataModule):
    """Four batches of two rows, and one to validate by."""

    def __init__(self):
        super().__init__()
        self.ids = torch.randint(4, 320, (8, 9), generator=torch.Generator().manual_seed(3))

    def rows(self, ids):
        return [
            {"input_ids": row, "labels": row, "position_ids": torch.arange(len(row))} for row in ids
        ]

    def train_dataloader(self):
        return DataLoader(self.rows(self.ids), batch_size=2)

    def val_dataloader(self):
        return DataLoader(self.rows(self.ids[:2]), batch_size=2)


def fit(checkpoint, tmp_path, *callbacks, **settings):
    frozen = partial(torch.optim.SGD, lr=0.0)  # so that every step routes as the checkpoint does
    module = MoELightningModule(str(checkpoint), optimizer=frozen)
    trainer = quiet_trainer(
        tmp_path, max_epochs=1, callbacks=[*callbacks], val_check_interval=2, **settings
    )
    trainer.fit(module, Batches())
    return module


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_fit_counts_what_was_trained_on_once(
    is_checkpointed, family_checkpoint, plain_transformers, tmp_path
):
    """Not the rows of validation, and not the forwards that backward repeats."""

    class Checkpointing(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            if is_checkpointed:
                pl_module.model.gradient_checkpointing_enable({"use_reentrant": False})

    checkpoint = family_checkpoint("qwen3_moe")
    callback = RoutingBalance(str(tmp_path), picture=False)
    module = fit(checkpoint, tmp_path, callback, Checkpointing(), log_every_n_steps=1)
    assert module.model.is_gradient_checkpointing == is_checkpointed
    plain, counts = plain_transformers(checkpoint), {}
    handles = [
        layer.router.register_forward_hook(
            lambda _module, _inputs, output, layer=layer.layer: counts.setdefault(
                layer, Counter()
            ).update(output[2].reshape(-1).tolist())
        )
        for layer in find_moe_layers(plain.model)
    ]
    for ids in Batches().ids.tolist():
        plain.logits(ids)
    for handle in handles:
        handle.remove()
    assert json.loads((tmp_path / "routing_balance.json").read_text())["loads"] == json_of(counts)


def test_fit_logs_at_the_trainers_interval(family_checkpoint, tmp_path):
    other = Other()
    callback = RoutingBalance(str(tmp_path), picture=False)
    fit(family_checkpoint("qwen3_moe"), tmp_path, callback, logger=other, log_every_n_steps=2)
    steps = [step for step, metrics in other.logged if "routing/cv" in metrics]
    assert steps[:2] == [2, 4]


# What people see.


def test_the_picture_and_the_table(family_checkpoint, tmp_path, capsys):
    callback = RoutingBalance(str(tmp_path))
    predict(family_checkpoint("qwen3_moe"), tmp_path, callbacks=[callback])
    assert (tmp_path / "routing_balance.png").read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("routing: rows are spread")
    assert f"(layer {callback.summary.worst.layer})" in lines[0]
    assert len(lines) == 5, "two lines of heading, three layers"
