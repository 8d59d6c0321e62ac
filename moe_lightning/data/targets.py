"""From training documents to token ids, and which of them are to be learnt.

{"text"}              tokens of the text, end        all learnt
{"prompt", "answer"}  tokens of the prompt │ answer, end       the answer is learnt
{"messages"}          the chat template    │ what the assistant says is learnt
"""

import re
from collections.abc import Sequence
from typing import Any

from moe_lightning.data.documents import Document

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class TargetError(ValueError):
    """A document that can't be turned into targets; the caller knows its file."""

    def __init__(self, document: Document, reason: str) -> None:
        super().__init__(reason)
        self.document = document


class TargetEncoder:
    """Tokenises training documents and marks the tokens to learn.

    Args:
        tokenizer: A transformers tokenizer. Texts and prompts get its special tokens, and every
            document ends with its end-of-text token if it has one.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._end: int | None = tokenizer.eos_token_id
        template = getattr(tokenizer, "chat_template", None)
        self._has_template = bool(template)
        self._marks_generation = isinstance(template, str) and bool(_GENERATION.search(template))

    def encode(self, documents: Sequence[Document]) -> list[tuple[list[int], list[bool]]]:
        """Tokenise documents.

        Args:
            documents: The documents.

        Returns:
            For each, its token ids, and for each of these whether it is to be learnt.

        Raises:
            TargetError: A conversation can't be tokenised, or not split into what is learnt.
        """
        # One call a group, because a fast tokenizer uses all cores for a list.
        texts = [d for d in documents if d.messages is None]
        starts = [d for d in texts if d.prompt is None and d.is_start]
        rests = [d for d in texts if d.prompt is not None or not d.is_start]
        prompts = [d for d in texts if d.prompt is not None]
        start_ids = self._ids([d.text for d in starts])
        rest_ids = self._ids([d.text for d in rests], special=False)
        prompt_ids = self._ids([d.prompt or "" for d in prompts])
        tokens = dict(zip(map(id, starts + rests), start_ids + rest_ids, strict=True))
        heads = dict(zip(map(id, prompts), prompt_ids, strict=True))
        encoded = []
        for document in documents:
            if document.messages is not None:
                encoded.append(self._encode_messages(document, document.messages))
                continue
            head, ids = heads.get(id(document), []), tokens[id(document)]
            if document.is_end and self._end is not None and ids[-1:] != [self._end]:
                ids = [*ids, self._end]
            encoded.append((head + ids, [False] * len(head) + [True] * len(ids)))
        return encoded

    def _ids(self, texts: list[str], *, special: bool = True) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(
            texts, add_special_tokens=special, return_attention_mask=False, verbose=False
        )["input_ids"]
        return ids

    def _encode_messages(
        self, document: Document, messages: list[dict[str, Any]]
    ) -> tuple[list[int], list[bool]]:
        if not self._has_template:
            raise TargetError(
                document,
                'has "messages", but the tokenizer has no chat template: give "prompt" and '
                '"answer", or add a chat_template.jinja to the checkpoint.',
            )
        try:
            ids, is_learnt = (
                self._by_marks(messages)
                if self._marks_generation
                else self._by_prefixes(document, messages)
            )
        except TargetError:
            raise
        except Exception as error:  # templates are code and raise what they like
            raise TargetError(
                document, f"the chat template refuses it: {type(error).__name__}: {error}"
            ) from error
        if not any(is_learnt):
            raise TargetError(
                document, "the chat template writes nothing for the assistant: nothing to learn."
            )
        return ids, is_learnt

    def _by_marks(self, messages: list[dict[str, Any]]) -> tuple[list[int], list[bool]]:
        encoded = self.tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return encoded["input_ids"], [bool(mark) for mark in encoded["assistant_masks"]]

    def _by_prefixes(
        self, document: Document, messages: list[dict[str, Any]]
    ) -> tuple[list[int], list[bool]]:
        """What the template adds for an assistant's message is what that message teaches."""
        ids = self._templated(messages)
        is_learnt = [False] * len(ids)
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._templated(messages[:i], add_generation_prompt=True)
            upto = self._templated(messages[: i + 1])
            if ids[: len(before)] != before or ids[: len(upto)] != upto:
                raise TargetError(
                    document,
                    f"the chat template writes the first {i + 1} messages differently when more "
                    "follow, so the assistant's tokens can't be told apart. Give one answer a "
                    "line, or a template that marks them with {% generation %}.",
                )
            is_learnt[len(before) : len(upto)] = [True] * (len(upto) - len(before))
        return ids, is_learnt

    def _templated(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = False
    ) -> list[int]:
        if not messages:
            return []
        ids: list[int] = self.tokenizer.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=False,
            add_generation_prompt=add_generation_prompt,
        )
        return ids
