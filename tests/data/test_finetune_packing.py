"""Which tokens come into which sequence, and that packed documents don't see each other."""

import json

import numpy as np
import pytest
import torch

from moe_lightning.data.packing import TrainingSequences, drop_without_targets, plan_sequences
from moe_lightning.data.token_cache import TokenCache


def make_cache(directory, documents, is_learnt=None) -> TokenCache:
    """The files of a cache, made by hand."""
    directory.mkdir()
    tokens = np.concatenate([np.array(d, dtype=np.uint16) for d in documents])
    learnt = np.ones(len(tokens), dtype=np.uint8)
    if is_learnt is not None:
        learnt = np.concatenate([np.array(m, dtype=np.uint8) for m in is_learnt])
    tokens.tofile(directory / "tokens.bin")
    learnt.tofile(directory / "is_learnt.bin")
    np.cumsum([0, *map(len, documents)], dtype=np.int64).tofile(directory / "documents.bin")
    meta = {
        "dtype": "uint16",
        "num_tokens": len(tokens),
        "num_learnt": int(learnt.sum()),
        "num_documents": len(documents),
    }
    (directory / "meta.json").write_text(json.dumps(meta))
    return TokenCache(directory)


def pieces(plan) -> list[list[tuple[int, int]]]:
    pairs = list(zip(plan.starts_P.tolist(), plan.lengths_P.tolist(), strict=True))
    return [pairs[a:b] for a, b in zip(plan.first_piece[:-1], plan.first_piece[1:], strict=True)]


def test_fill_cuts_documents_where_a_sequence_is_full():
    # Lengths 12, 3, 4 in sequences of 8, the drawing of packing.py.
    plan = plan_sequences(np.array([0, 12, 15, 19]), sequence_length=8, mode="fill")
    assert pieces(plan) == [[(0, 8)], [(7, 5), (12, 3)], [(15, 4)]]


def test_fill_leaves_a_single_free_place_and_single_tokens_out():
    plan = plan_sequences(np.array([0, 4, 5, 8]), sequence_length=5, mode="fill")
    assert pieces(plan) == [[(0, 4)], [(5, 3)]]


def test_whole_keeps_documents_together_and_fits_them_best():
    # Lengths 6, 3, 4, 2 and 11 in sequences of 8: 3+4 is full first, then 6+2; the last one is cut.
    plan = plan_sequences(np.array([0, 6, 9, 13, 15, 26]), sequence_length=8, mode="whole")
    assert pieces(plan) == [[(6, 3), (9, 4)], [(0, 6), (13, 2)], [(15, 8)], [(22, 4)]]


def test_single_gives_each_piece_its_own_sequence():
    plan = plan_sequences(np.array([0, 3, 5, 14]), sequence_length=8, mode="single")
    assert pieces(plan) == [[(0, 3)], [(3, 2)], [(5, 8)], [(12, 2)]]


def test_sequences_without_targets_are_dropped():
    plan = plan_sequences(np.array([0, 3, 6, 9]), sequence_length=4, mode="single")
    is_learnt = np.array([0, 0, 1, 1, 0, 0, 0, 1, 0], dtype=np.uint8)
    # The second document's only learnt token is its first, which nothing predicts.
    assert pieces(drop_without_targets(plan, is_learnt)) == [[(0, 3)], [(6, 3)]]


def test_packed_batch_by_hand(tmp_path):
    cache = make_cache(tmp_path / "c", [[1, 2, 3], [4, 5, 6, 7, 8]])
    sequences = TrainingSequences(cache, sequence_length=5, packing=True, pad_id=9)
    assert len(sequences) == 2
    batch = sequences.batch([0, 1])
    assert batch.keys() == {"input_ids", "labels", "position_ids"}
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [5, 6, 7, 8, 9]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 5], [-100, 6, 7, 8, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert all(values.dtype == np.int64 for values in batch.values())


def test_padded_batch_by_hand(tmp_path):
    cache = make_cache(tmp_path / "c", [[1, 2, 3], [4, 5]], [[0, 0, 1], [0, 1]])
    sequences = TrainingSequences(cache, sequence_length=8, packing=False, pad_id=9)
    batch = sequences.batch([1, 0], [False, True])
    assert batch["input_ids"].tolist() == [[4, 5, 9], [1, 2, 3]]
    assert batch["labels"].tolist() == [[-100, 5, -100], [-100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_only_answers_have_labels_when_packed(tmp_path):
    cache = make_cache(tmp_path / "c", [[1, 2, 3], [4, 5]], [[0, 1, 1], [0, 1]])
    sequences = TrainingSequences(cache, sequence_length=6, packing=True, pad_id=0)
    batch = sequences.batch([0])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 5, -100]]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("is_text", [True, False])
def test_every_token_but_the_first_of_a_document_is_a_target_once(tmp_path, packing, is_text):
    generator = np.random.default_rng(0)
    lengths = generator.integers(2, 40, size=50)
    token = iter(range(100, 10_000))
    documents = [[next(token) for _ in range(n)] for n in lengths]
    # A document of which the very first token is not learnt is not plain text.
    learnt = [[int(is_text)] + [1] * (len(d) - 1) for d in documents]
    cache = make_cache(tmp_path / "c", documents, learnt)
    sequences = TrainingSequences(cache, sequence_length=16, packing=packing, pad_id=0)
    labels = sequences.batch(range(len(sequences)))["labels"][:, 1:]
    targets = sorted(labels[labels != -100].tolist())
    assert targets == [t for document in documents for t in document[1:]]


def test_packed_documents_do_not_see_each_other(tmp_path):
    """The reference is transformers' own model, which gets each document alone."""
    from transformers import AutoModelForCausalLM

    from moe_lightning.demo.random_checkpoint import make_checkpoint

    path = make_checkpoint(
        tmp_path / "model", hidden_size=32, num_layers=2, expert_size=16, num_heads=2
    )
    model = AutoModelForCausalLM.from_pretrained(path)
    documents = [[5, 6, 7], [8, 9, 10, 11], [12, 13]]
    cache = make_cache(tmp_path / "c", documents)
    sequences = TrainingSequences(cache, sequence_length=12, packing=True, pad_id=0)
    batch = {k: torch.from_numpy(v) for k, v in sequences.batch([0]).items()}
    with torch.no_grad():
        packed = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits[0]
        alone = [model(input_ids=torch.tensor([d])).logits[0] for d in documents]
    torch.testing.assert_close(packed[:9], torch.cat(alone), rtol=1e-5, atol=1e-5)
