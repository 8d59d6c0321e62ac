"""MoELightningModule in a plain Lightning pipeline."""

import pytest
import torch
from quiet_trainer import quiet_trainer
from torch.utils.data import DataLoader

from moe_lightning import MoELightningModule
from moe_lightning.errors import UsageError
from moe_lightning.finetune.fine_tuning import RouterBalance
from moe_lightning.modeling.seam import dispatcher_of, find_moe_layers
from moe_lightning.tasks import Embed, Generate, Score

PROMPTS = ["To be, or", "Once upon a time", "x", "It was the best of times, it was"]


def flat(predictions):
    return [row for batch in predictions for row in batch]


def test_three_lines_with_a_list_of_prompts(family_checkpoint, plain_transformers, tmp_path):
    path = family_checkpoint("qwen3_moe")
    trainer = quiet_trainer(tmp_path)

    module = MoELightningModule(str(path), task=Generate(max_new_tokens=8))
    predictions = flat(trainer.predict(module, DataLoader(PROMPTS, batch_size=3)))

    plain = plain_transformers(path)
    tokenizer = module.tokenizer
    for row, prompt in zip(predictions, PROMPTS, strict=True):
        assert row["token_ids"] == plain.greedy(tokenizer(prompt).input_ids, 8)
    assert [row["id"] for row in predictions] == [0, 1, 2, 3]
    assert module.tally.num_rows == 4
    assert module.tally.num_prompt_tokens == sum(len(tokenizer(p).input_ids) for p in PROMPTS)


def test_a_list_of_dicts_with_messages_options_and_a_bad_row(
    family_checkpoint, plain_transformers, tmp_path
):
    path = family_checkpoint("qwen3_moe")
    rows = [
        {"id": "a", "prompt": "To be", "max_new_tokens": 3},
        {"id": "b", "messages": [{"role": "user", "content": "Who?"}], "max_new_tokens": 5},
        {"id": "c", "prompt": ""},
        {"id": "d"},
        {"id": "e", "prompt": "or", "max_new_tokens": 2},
    ]
    module = MoELightningModule(str(path), task=Generate(max_new_tokens=8))
    loader = DataLoader(rows, batch_size=5, collate_fn=list)
    (predictions,) = quiet_trainer(tmp_path).predict(module, loader)
    plain, tokenizer = plain_transformers(path), module.tokenizer
    by_id = {row["id"]: row for row in predictions}
    assert by_id.keys() == set("abcde")
    chat = tokenizer.apply_chat_template(
        rows[1]["messages"], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert by_id["a"]["token_ids"] == plain.greedy(tokenizer("To be").input_ids, 3)
    assert by_id["b"]["token_ids"] == plain.greedy(chat, 5)
    assert by_id["e"]["token_ids"] == plain.greedy(tokenizer("or").input_ids, 2)
    assert (by_id["c"]["stage"], by_id["d"]["stage"]) == ("encode", "read")
    assert predictions.num_errors == module.tally.num_errors == 2


def test_default_collation_and_token_ids(family_checkpoint, plain_transformers, tmp_path):
    path = family_checkpoint("qwen3_moe")
    plain = plain_transformers(path)
    module = MoELightningModule(str(path), task=Score())
    trainer = quiet_trainer(tmp_path)
    ids = [module.tokenizer(prompt).input_ids for prompt in PROMPTS]
    want = pytest.approx([plain.logprob(row) for row in ids], abs=1e-4)
    dicts = [{"id": n, "prompt": prompt} for n, prompt in enumerate(PROMPTS)]
    collated = flat(trainer.predict(module, DataLoader(dicts, batch_size=2)))
    assert [row["logprob"] for row in collated] == want
    width = max(map(len, ids))
    tensors = [
        {
            "input_ids": torch.tensor([0] * (width - len(row)) + row),
            "attention_mask": torch.tensor([0] * (width - len(row)) + [1] * len(row)),
        }
        for row in ids
    ]
    padded = flat(trainer.predict(module, DataLoader(tensors, batch_size=2)))
    assert [row["logprob"] for row in padded] == want


def test_the_answers_do_not_depend_on_the_batch_size(family_checkpoint, tmp_path):
    module = MoELightningModule(str(family_checkpoint("mixtral")), task=Embed())
    trainer = quiet_trainer(tmp_path)
    vectors = [
        torch.tensor(
            [
                row["embedding"]
                for row in flat(trainer.predict(module, DataLoader(PROMPTS, batch_size=size)))
            ]
        )
        for size in (1, 3, 4)
    ]
    for other in vectors[1:]:
        torch.testing.assert_close(other, vectors[0], atol=1e-5, rtol=1e-5)


def test_no_rows(family_checkpoint, tmp_path):
    module = MoELightningModule(str(family_checkpoint("mixtral")))
    assert not flat(quiet_trainer(tmp_path).predict(module, DataLoader([])) or [])


def test_configure_model_loads_once(family_checkpoint):
    module = MoELightningModule(str(family_checkpoint("mixtral")))
    assert module.model is None
    assert not list(module.parameters())
    module.configure_model()
    model, num_read = module.model, module.view.bytes_read
    module.configure_model()
    assert module.model is model
    assert module.view.bytes_read == num_read == module.view.num_bytes


@pytest.mark.parametrize("name", ["auto", "reference", "grouped_mm", "cpu_int8"])
def test_every_layer_gets_the_backend_by_name(name, family_checkpoint):
    module = MoELightningModule(str(family_checkpoint("mixtral")), experts_backend=name)
    module.configure_model()
    layers = find_moe_layers(module.model)
    assert [dispatcher_of(layer).shard.backend_name for layer in layers] == [name] * 3


@pytest.mark.parametrize(("name", "dtype"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_dtypes(name, dtype, family_checkpoint, tmp_path):
    path = family_checkpoint("qwen3_moe", dtype="bfloat16")
    module = MoELightningModule(str(path), dtype=name, task=Score())
    rows = flat(quiet_trainer(tmp_path).predict(module, DataLoader(PROMPTS, batch_size=4)))
    assert {p.dtype for p in module.model.parameters()} == {dtype}
    assert all(row["logprob"] < 0 or row["num_tokens"] == 1 for row in rows)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe"])
def test_the_routing_log_counts_what_transformers_routes(
    family, family_checkpoint, plain_transformers, tmp_path
):
    path = family_checkpoint(family)
    module = MoELightningModule(str(path), task=Score())
    traces = []
    module.routing_log.subscribe(traces.append)
    module.configure_model()
    module.runner.has_plain_head()  # tries eight tokens once; not part of the rows
    traces.clear()
    quiet_trainer(tmp_path).predict(module, DataLoader(PROMPTS, batch_size=4))

    want_LE = torch.zeros(3, 8, dtype=torch.int64)
    for prompt in PROMPTS:
        ids = torch.tensor([module.tokenizer(prompt).input_ids])
        with torch.inference_mode():
            output = plain_transformers(path).model(ids, output_router_logits=True)
        for layer, logits_TE in enumerate(output.router_logits):
            for row in logits_TE.tolist():
                for expert in sorted(range(8), key=lambda e, row=row: -row[e])[:2]:
                    want_LE[layer, expert] += 1
    assert [trace.layer for trace in traces] == [0, 1, 2]
    assert all(trace.num_experts == 8 for trace in traces)
    got_LE = torch.stack([t.index_TK.reshape(-1).bincount(minlength=8) for t in traces])
    assert torch.equal(got_LE, want_LE)
    assert int(got_LE.sum()) == 3 * 2 * module.tally.num_prompt_tokens
    assert module.tally.num_padding_tokens > 0


def test_generated_tokens_are_routed_once_each(family_checkpoint, tmp_path):
    """Every token goes through every layer once, the last new one not at all."""
    task = Generate(max_new_tokens=6, ignore_eos=True)
    module = MoELightningModule(str(family_checkpoint("mixtral")), task=task)
    num_rows = []
    module.routing_log.subscribe(lambda trace: num_rows.append(trace.index_TK.shape[0]))
    quiet_trainer(tmp_path).predict(module, DataLoader(PROMPTS, batch_size=4))
    prompt_tokens = sum(len(module.tokenizer(prompt).input_ids) for prompt in PROMPTS)
    assert sum(num_rows) == 3 * (prompt_tokens + 4 * 5)


def test_a_training_step_equals_transformers_loss(family_checkpoint, plain_transformers):
    path = family_checkpoint("qwen3_moe")
    module = MoELightningModule(str(path), router_balance=RouterBalance(aux_loss_weight=0.25))
    module.configure_model()
    module.log = lambda *_, **__: None
    generator = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(4, 320, (2, 16), generator=generator)
    labels_BS = ids_BS.clone()
    labels_BS[:, :5] = -100
    loss = module.training_step({"input_ids": ids_BS, "labels": labels_BS}, 0)
    plain = plain_transformers(path).model
    with torch.no_grad():
        output = plain(ids_BS, labels=labels_BS, output_router_logits=True)
    # transformers adds the auxiliary loss with the config's own weight.
    want = output.loss + (0.25 - plain.router_aux_loss_coef) * output.aux_loss
    torch.testing.assert_close(loss.detach(), want, atol=1e-5, rtol=1e-5)
    loss.backward()
    assert all(p.grad is not None for p in module.model.parameters())


def test_fit_lowers_the_loss_on_one_batch(family_checkpoint, tmp_path):
    module = MoELightningModule(
        str(family_checkpoint("qwen3_moe")),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
    )
    ids_BS = torch.randint(4, 320, (2, 16), generator=torch.Generator().manual_seed(0))
    loader = DataLoader([{"input_ids": row, "labels": row} for row in ids_BS], batch_size=2)
    losses = []
    trainer = quiet_trainer(tmp_path, max_epochs=8)
    module.on_train_batch_end = lambda outputs, *_: losses.append(float(outputs["loss"]))
    trainer.fit(module, loader)
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.5


def test_export_needs_a_model(family_checkpoint, tmp_path):
    module = MoELightningModule(str(family_checkpoint("mixtral")))
    with pytest.raises(UsageError, match="no model to export"):
        module.export(tmp_path / "out")
