"""Which piece of which document goes into which training sequence, and the batches made of them.

    documents   aaaaaaaaaaaa bbb cccc                    sequence_length 8
    packed      [aaaaaaaa] [aaaaabbb] [cccc....]        text: every sequence is filled
    positions    01234567   01234012   01230123

A document that goes on in another sequence starts there with the last token of its previous piece,
so that every token but a document's first is predicted exactly once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moe_lightning.data.token_cache import TokenCache

NO_TARGET = -100  # what cross-entropy leaves out
_NUM_OPEN = 64

PackMode = Literal["fill", "whole", "single"]


@dataclass(frozen=True, slots=True)
class SequencePlan:
    """Pieces of documents, grouped to N sequences; P pieces in all.

    Args:
        starts_P: Where each piece starts among the tokens of the file.
        lengths_P: How many tokens it has.
        first_piece: The first piece of each sequence; N + 1 entries.
    """

    starts_P: NDArray[np.int64]
    lengths_P: NDArray[np.int64]
    first_piece: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.first_piece) - 1


@dataclass(slots=True)
class _OpenSequence:
    space: int
    pieces: list[tuple[int, int]] = field(default_factory=list)


def plan_sequences(
    document_starts: NDArray[np.int64], *, sequence_length: int, mode: PackMode
) -> SequencePlan:
    """Cut documents to pieces and put them into sequences.

    Args:
        document_starts: Where each document starts; one more entry than documents.
        sequence_length: The most tokens of a sequence, at least 2.
        mode: `fill` cuts documents wherever a sequence is full. `whole` cuts only documents longer
            than a sequence, and puts each piece into the fullest of the last sequences that has
            room (best fit). `single` gives each piece a sequence of its own.

    Returns:
        The plan. Sequences are in the order in which they became full.
    """
    done: list[list[tuple[int, int]]] = []
    open_sequences: list[_OpenSequence] = []
    bounds = document_starts.tolist()
    for start, end in pairwise(bounds):
        while end - start >= 2:  # a single token predicts nothing
            sequence = _choose(open_sequences, end - start, mode)
            if sequence is None:
                sequence = _OpenSequence(sequence_length)
                open_sequences.append(sequence)
            length = min(end - start, sequence.space)
            sequence.pieces.append((start, length))
            sequence.space -= length
            if sequence.space < 2 or mode == "single":
                open_sequences.remove(sequence)
                done.append(sequence.pieces)
            elif len(open_sequences) > _NUM_OPEN:
                done.append(open_sequences.pop(0).pieces)
            start = end if start + length == end else start + length - 1
    done += [sequence.pieces for sequence in open_sequences]
    pieces = np.array([piece for group in done for piece in group], dtype=np.int64).reshape(-1, 2)
    first_piece = np.cumsum([0, *map(len, done)], dtype=np.int64)
    return SequencePlan(pieces[:, 0], pieces[:, 1], first_piece)


def _choose(
    open_sequences: list[_OpenSequence], length: int, mode: PackMode
) -> _OpenSequence | None:
    if mode == "fill":
        return open_sequences[-1] if open_sequences else None
    fitting = [sequence for sequence in open_sequences if sequence.space >= length]
    return min(fitting, key=lambda sequence: sequence.space, default=None)


def drop_without_targets(plan: SequencePlan, is_learnt: NDArray[np.uint8]) -> SequencePlan:
    """Leave out the sequences in which nothing is to be learnt: their mean loss is undefined.

    Args:
        plan: A plan.
        is_learnt: Whether each token of the file is to be learnt.

    Returns:
        The plan of the other sequences.
    """
    has_target_P = [
        bool(is_learnt[start + 1 : start + length].any())
        for start, length in zip(plan.starts_P.tolist(), plan.lengths_P.tolist(), strict=True)
    ]
    bounds = plan.first_piece.tolist()
    kept = [range(first, last) for first, last in pairwise(bounds) if any(has_target_P[first:last])]
    pieces = np.array([piece for group in kept for piece in group], dtype=np.int64)
    first_piece = np.cumsum([0, *map(len, kept)], dtype=np.int64)
    return SequencePlan(plan.starts_P[pieces], plan.lengths_P[pieces], first_piece)


class TrainingSequences:
    """The training sequences of a file.

    Args:
        cache: The tokens of the file.
        sequence_length: The number of tokens of a packed sequence, and the most of another.
        packing: Whether a sequence holds several documents.
        pad_id: The token id behind the last document of a sequence.
    """

    def __init__(
        self, cache: TokenCache, *, sequence_length: int, packing: bool, pad_id: int
    ) -> None:
        self.cache = cache
        self.sequence_length = sequence_length
        self.packing = packing
        self.pad_id = pad_id
        # Where only an answer is learnt, it must see its whole prompt.
        mode: PackMode = "single" if not packing else "fill" if cache.is_all_learnt else "whole"
        self.plan = plan_sequences(
            cache.document_starts, sequence_length=sequence_length, mode=mode
        )
        if not cache.is_all_learnt:
            self.plan = drop_without_targets(self.plan, cache.is_learnt)

    def __len__(self) -> int:
        return len(self.plan)

    def batch(
        self, indices_B: Sequence[int], is_repeat_B: Sequence[bool] | None = None
    ) -> dict[str, NDArray[np.int64]]:
        """Put sequences together.

        Args:
            indices_B: The numbers of the sequences.
            is_repeat_B: The sequences that only fill up a batch and have no targets.

        Returns:
            `input_ids`, `labels` and `position_ids`, each `[B, S]` int64; when not packed, an
            `attention_mask` as well. `labels` are `input_ids` or -100, not shifted. Packed, S is
            the sequence length, positions start again at each document, and what is left over at
            the end is a document without targets; else S is the longest length of the batch.
        """
        plan = self.plan
        pieces_B = [range(plan.first_piece[i], plan.first_piece[i + 1]) for i in indices_B]
        length = self.sequence_length
        if not self.packing:
            length = max(int(plan.lengths_P[pieces[0]]) for pieces in pieces_B)
        shape = (len(indices_B), length)
        input_ids = np.full(shape, self.pad_id, dtype=np.int64)
        labels = np.full(shape, NO_TARGET, dtype=np.int64)
        position_ids = np.zeros(shape, dtype=np.int64)
        attention_mask = np.zeros(shape, dtype=np.int64)
        for b, pieces in enumerate(pieces_B):
            offset = 0
            for piece in pieces:
                start, num = int(plan.starts_P[piece]), int(plan.lengths_P[piece])
                here, there = slice(offset, offset + num), slice(start, start + num)
                ids = self.cache.tokens[there].astype(np.int64)
                input_ids[b, here] = ids
                labels[b, here] = np.where(self.cache.is_learnt[there], ids, NO_TARGET)
                labels[b, offset] = NO_TARGET  # nothing of its document comes before
                position_ids[b, here] = np.arange(num)
                offset += num
            attention_mask[b, :offset] = 1
            position_ids[b, offset:] = np.arange(length - offset)
            if is_repeat_B is not None and is_repeat_B[b]:
                labels[b] = NO_TARGET
        batch = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
        return batch if self.packing else batch | {"attention_mask": attention_mask}
