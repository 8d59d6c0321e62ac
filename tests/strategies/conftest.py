"""Trainers that place experts over CPU slots, and what transformers says to the same prompts."""

import json

import pytest
import torch
from quiet_trainer import quiet_trainer
from torch.utils.data import DataLoader
from worker_threads import worker_threads

from moe_lightning import MoELightningModule
from moe_lightning.dispatch import PlacedDispatcher
from moe_lightning.modeling.seam import dispatcher_of, find_moe_layers
from moe_lightning.strategies import PlacementStrategy
from moe_lightning.tasks import Embed, Generate, Score, Task

__all__ = ["worker_threads"]

# One prompt of one token; one longer than gpt_oss's window of 16.
PROMPTS = ["To be, or", "Once upon a time", "x", "It was the best of times, it was"]
NEW_TOKENS = 6
# Slots of each expert: slot 0 holds none in layer 1, slot 3 none at all; what a slot holds does not
# stand side by side; experts 1 and 6 have replicas, expert 6 on every slot that holds any.
FILE_LAYERS = {
    0: [0, [1, 2], 4, 0, 2, 1, [0, 1, 2, 4], 4],
    1: [4, [1, 2], 1, 4, 2, 1, [1, 2, 4], 2],
    2: [0, [0, 4], 1, 2, 0, 1, [0, 1, 2, 4], 4],
}
LOADS = [40, 0, 7, 7, 90, 1, 0, 13]


@pytest.fixture
def trainer_with(tmp_path):
    """A quiet trainer on the CPU: ``trainer_with(strategy, **settings)``."""

    def trainer_with(strategy, **settings):
        return quiet_trainer(tmp_path, strategy=strategy, **settings)

    return trainer_with


@pytest.fixture
def placed_trainer(trainer_with):
    """A trainer with so many slots on the CPU: ``placed_trainer(3, policy=...)``."""
    return lambda num_slots, **options: trainer_with(
        PlacementStrategy(["cpu"] * num_slots, **options)
    )


@pytest.fixture(scope="session")
def predict():
    """The rows of a task: ``predict(trainer, module, task)``."""

    def predict(trainer, module, task, prompts=PROMPTS, batch_size=None):
        module.task = task
        loader = DataLoader(prompts, batch_size=batch_size or len(prompts))
        return [row for batch in trainer.predict(module, loader) for row in batch]

    return predict


@pytest.fixture(scope="session")
def answers(plain_transformers):
    """What transformers says to the prompts: log-probabilities, embeddings, greedy tokens."""
    kept = {}

    def answers(path):
        if path not in kept:
            plain = plain_transformers(path)
            tokenizer = MoELightningModule(str(path)).tokenizer
            ids = [tokenizer(prompt).input_ids for prompt in PROMPTS]
            kept[path] = (
                [plain.logprob(row) for row in ids],
                torch.stack([plain.embedding(row) for row in ids]),
                [plain.greedy(row, NEW_TOKENS) for row in ids],
            )
        return kept[path]

    return answers


class Everything(Task):
    """Score, Embed and Generate of the same rows, so that a model is hosted once for all three."""

    def run(self, runner, rows, **options):
        tasks = Score(), Embed(), Generate(max_new_tokens=NEW_TOKENS)
        answers = [task.run(runner, rows, **options) for task in tasks]
        return [{**score, **vector, **text} for score, vector, text in zip(*answers, strict=True)]


@pytest.fixture
def check_answers(answers, predict):
    """Check all three tasks of one module under one trainer."""

    def check(path, trainer, module):
        logprobs, vectors_BD, tokens = answers(path)
        rows = predict(trainer, module, Everything())
        # All are fp32 sums in another order.
        assert [row["logprob"] for row in rows] == pytest.approx(logprobs, rel=0, abs=1e-5)
        got_BD = torch.tensor([row["embedding"] for row in rows])
        torch.testing.assert_close(got_BD, vectors_BD, atol=1e-5, rtol=1e-5)
        assert [row["token_ids"] for row in rows] == tokens

    return check


@pytest.fixture
def policy_options(tmp_path, plain_transformers):
    """Options of a policy for a checkpoint with 8 experts in each MoE layer."""

    def options(policy, path):
        layers = [layer.layer for layer in find_moe_layers(plain_transformers(path).model)]
        file = tmp_path / f"{policy}.json"
        if policy == "balanced":
            # Other loads in every layer.
            loads = {layer: LOADS[layer:] + LOADS[:layer] for layer in layers}
            file.write_text(json.dumps({"loads": loads}))
            return {"policy": "balanced", "loads": file, "replicas": 3}
        if policy == "file":
            content = {
                "format": "moe_lightning expert placement",
                "version": 1,
                "num_slots": 5,
                "layers": {layer: FILE_LAYERS[layer] for layer in layers},
            }
            file.write_text(json.dumps(content))
            return {"policy": "file", "file": str(file)}
        return {"policy": policy}

    return options


@pytest.fixture(scope="session")
def experts_by_slot():
    """The experts that each slot really holds of a layer: ``experts_by_slot(module, layer)``."""

    def experts_by_slot(module, number):
        (layer,) = [n for n in find_moe_layers(module.model) if n.layer == number]
        dispatcher = dispatcher_of(layer)
        assert isinstance(dispatcher, PlacedDispatcher)
        for shard in dispatcher.shards.values():
            assert len(shard.experts.down_proj) == len(shard.expert_ids)
        return {slot: shard.expert_ids for slot, shard in sorted(dispatcher.shards.items())}

    return experts_by_slot
