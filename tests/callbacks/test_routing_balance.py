"""RoutingBalance counts what the routers chose, and its file balances a placement."""

import json
from collections import Counter

import lightning as L
import pytest
import torch
from quiet_trainer import quiet_trainer
from torch.utils.data import DataLoader

from moe_lightning import MoELightningModule, PlacementStrategy, RoutingBalance, Score
from moe_lightning.modeling.seam import find_moe_layers
from moe_lightning.placement import imbalance, load_loads

PROMPTS = [f"{'ab c ' * n}{n}" for n in range(1, 7)]


def predict(checkpoint, output_dir, *, strategy="auto", callbacks=()):
    module = MoELightningModule(str(checkpoint), task=Score())
    trainer = quiet_trainer(output_dir, strategy=strategy, callbacks=list(callbacks))
    batches = trainer.predict(module, DataLoader(PROMPTS, batch_size=6))
    return module, [row["logprob"] for row in batches[0]]


def routed_by_hand(module, plain):
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
    for prompt in PROMPTS:
        plain.logits(module.tokenizer(prompt)["input_ids"])
    for handle in handles:
        handle.remove()
    return counts


@pytest.mark.parametrize("strategy", ["auto", "moe_placement"])
def test_counts_are_those_of_transformers_routers(
    strategy, family_checkpoint, plain_transformers, tmp_path
):
    checkpoint = family_checkpoint("qwen3_moe")
    callback = RoutingBalance(str(tmp_path / "out"))
    module, _ = predict(checkpoint, tmp_path, strategy=strategy, callbacks=[callback])
    want = routed_by_hand(module, plain_transformers(checkpoint))
    loads = json.loads((tmp_path / "out" / "routing_balance.json").read_text())["loads"]
    assert loads == {
        str(layer): [counts[expert] for expert in range(8)] for layer, counts in want.items()
    }
    assert not module.routing_log.is_read


def test_its_file_balances_a_placement_and_answers_stay(family_checkpoint, tmp_path):
    checkpoint = family_checkpoint("qwen3_moe")
    _, want = predict(checkpoint, tmp_path, callbacks=[RoutingBalance()])
    file = tmp_path / "routing_balance.json"
    strategy = PlacementStrategy(["cpu"] * 3, policy="balanced", loads=file, replicas=1)
    _, got = predict(checkpoint, tmp_path, strategy=strategy)
    assert got == pytest.approx(want, abs=1e-4)
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
