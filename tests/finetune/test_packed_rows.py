"""Packed rows: their loss and gradients are those of each document in a row of its own."""

import torch
from transformers import AutoModelForCausalLM

from moe_lightning.collectives import RankGroup
from moe_lightning.finetune.losses import language_model_losses

LENGTHS = ((3, 19, 2), (4, 20))  # two rows; two documents are longer than gpt_oss' window of 16


def make_batches():
    """The same documents packed, and padded one a row."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(4, 320, (2, 24), generator=generator)
    labels, positions = ids.clone(), torch.zeros_like(ids)
    longest = max(map(max, LENGTHS))
    padded = {"input_ids": [], "labels": [], "attention_mask": []}
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            positions[row, start : start + length] = torch.arange(length)
            labels[row, start] = -100
            document = ids[row, start : start + length]
            gap = longest - length
            padded["input_ids"].append(torch.nn.functional.pad(document, (0, gap), value=1))
            padded["labels"].append(torch.nn.functional.pad(document, (0, gap), value=-100))
            mask = torch.arange(longest) < length
            padded["attention_mask"].append(mask.long())
            start += length
    packed = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return packed, {name: torch.stack(rows) for name, rows in padded.items()}


def test_packed_rows_train_as_documents_of_their_own(family_checkpoint, family):
    results = []
    for batch in make_batches():
        model = AutoModelForCausalLM.from_pretrained(
            family_checkpoint(family), dtype=torch.float32
        ).eval()  # phimoe's router draws random numbers in training
        losses = language_model_losses(model, batch, ranks=RankGroup())
        losses.share.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((losses.num_targets, losses.next_token, grads))
    assert results[0][0] == 2 + 18 + 1 + 3 + 19
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
