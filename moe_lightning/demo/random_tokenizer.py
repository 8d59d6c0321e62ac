"""A byte-level tokenizer of any size that needs no text to train on; lossless on any input."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from moe_lightning.errors import UsageError

SPECIAL_TOKENS = ("<|endoftext|>", "<|pad|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- '<|assistant|>' -}}"
    "{%- generation -%}{{- message['content'] + '<|endoftext|>' -}}{%- endgeneration -%}"
    "{%- else -%}"
    "{{- '<|user|>' + message['content'] -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

_LETTERS = "etaoinshrdlucmwfgypbvkxjqz"
_SPACE = "Ġ"  # how a byte-level BPE writes the blank


def make_tokenizer(vocab_size: int, *, max_positions: int) -> Any:
    """Build a byte-level BPE tokenizer with a chat template and exactly `vocab_size` tokens.

    The merges are made up: every pair of letters, then every triple, and so on.

    Args:
        vocab_size: The number of tokens: 256 bytes, 4 special tokens and as many merges as fit.
        max_positions: The longest input that the tokenizer warns above.

    Returns:
        A `transformers` fast tokenizer.

    Raises:
        UsageError: `vocab_size` has no room for the bytes and the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    num_base = 256 + len(SPECIAL_TOKENS)
    if vocab_size < num_base:
        raise UsageError(
            f"vocab_size {vocab_size} is too small for a byte-level tokenizer (256 bytes and "
            f"{len(SPECIAL_TOKENS)} special tokens): give at least {num_base}."
        )
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = list(islice(_merges(), vocab_size - num_base))
    tokens += [left + right for left, right in merges]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return wrap_tokenizer(backend, max_positions=max_positions)


def wrap_tokenizer(backend: Any, *, max_positions: int) -> Any:
    """Give a `tokenizers.Tokenizer` this project's special tokens and chat template.

    Args:
        backend: A tokenizer whose vocabulary has `SPECIAL_TOKENS`.
        max_positions: The longest input that the tokenizer warns above.

    Returns:
        A `transformers` fast tokenizer.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        clean_up_tokenization_spaces=False,
        model_max_length=max_positions,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _merges() -> Iterator[tuple[str, str]]:
    """Endless (left, right) pairs, each made of tokens that exist by then."""
    words = [_SPACE, *_LETTERS]
    while True:
        longer = []
        for word in words:
            for letter in _LETTERS:
                yield word, letter
                longer.append(word + letter)
        words = longer
