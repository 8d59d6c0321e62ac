"""From records to token ids."""

from collections.abc import Sequence
from typing import Any

from moe_lightning.data.records import Record, Row, RowError

CHUNK_ROWS = 512


class Encoder:
    """Tokenises rows as `tokenizer(prompt)` and `tokenizer.apply_chat_template(messages)` do.

    Args:
        tokenizer: A transformers tokenizer.
        max_positions: Number of tokens that the model has positions for; None means no limit.
        vocab_size: Number of rows of the model's embedding.
        add_generation_prompt: Whether a conversation ends with the start of the model's answer.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_positions: int | None,
        vocab_size: int,
        add_generation_prompt: bool,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_positions = max_positions
        self.vocab_size = vocab_size
        self.add_generation_prompt = add_generation_prompt

    def encode(self, records: Sequence[Record]) -> list[Row | RowError]:
        """Tokenise records.

        Args:
            records: The records.

        Returns:
            For each of them, in order, its row, or the error with stage "encode".
        """
        results: dict[int, list[int] | str] = {}
        for is_chat in (False, True):
            positions = [i for i, r in enumerate(records) if (r.messages is not None) == is_chat]
            for start in range(0, len(positions), CHUNK_ROWS):
                chunk = positions[start : start + CHUNK_ROWS]
                encoded = self._encode_chunk([records[i] for i in chunk], is_chat=is_chat)
                results.update(zip(chunk, encoded, strict=True))
        return [self._to_row(record, results[i]) for i, record in enumerate(records)]

    def check_tokens(self, token_ids: Sequence[int]) -> str | None:
        """Say why the model cannot read these tokens.

        Args:
            token_ids: One row's tokens.

        Returns:
            The error, or None for a good row.
        """
        if not token_ids:
            return "the text has no tokens; write at least one word"
        if self.max_positions is not None and len(token_ids) > self.max_positions:
            return (
                f"the text has {len(token_ids):,} tokens, but the model has {self.max_positions:,} "
                "positions; shorten or split it"
            )
        largest, smallest = max(token_ids), min(token_ids)
        if largest >= self.vocab_size or smallest < 0:
            token_id = largest if largest >= self.vocab_size else smallest
            return (
                f"the tokenizer gave the token id {token_id}, but the model knows 0 to "
                f"{self.vocab_size - 1}; tokenizer and checkpoint do not belong together"
            )
        return None

    def _to_row(self, record: Record, result: list[int] | str) -> Row | RowError:
        error = result if isinstance(result, str) else self.check_tokens(result)
        if error is not None:
            return RowError(record.row, record.line, record.id, "encode", error, record.offset)
        assert not isinstance(result, str)
        return Row(
            row=record.row,
            line=record.line,
            id=record.id,
            token_ids=result,
            options=record.options,
            offset=record.offset,
        )

    def _encode_chunk(self, records: list[Record], *, is_chat: bool) -> list[list[int] | str]:
        if is_chat and not getattr(self.tokenizer, "chat_template", None):
            return [
                "the row has 'messages', but the checkpoint's tokenizer has no chat template; "
                "give a 'prompt' instead, or add a chat_template.jinja to the checkpoint"
            ] * len(records)
        # One bad text fails the call for all, with an error of any class: templates run code.
        try:
            return list(self._tokenize(records, is_chat=is_chat))
        except Exception as error:
            if len(records) > 1:
                return [self._encode_chunk([record], is_chat=is_chat)[0] for record in records]
            what = "chat template" if is_chat else "tokenizer"
            reason = f"{type(error).__name__}: {error}".encode(errors="backslashreplace").decode()
            return [f"the {what} refused the row: {reason}"]

    def _tokenize(self, records: list[Record], *, is_chat: bool) -> list[list[int]]:
        if is_chat:
            token_ids: list[list[int]] = self.tokenizer.apply_chat_template(
                [record.messages for record in records],
                add_generation_prompt=self.add_generation_prompt,
                tokenize=True,
                return_dict=False,
            )
        else:
            token_ids = self.tokenizer(
                [record.prompt for record in records], return_attention_mask=False, verbose=False
            )["input_ids"]
        return token_ids
