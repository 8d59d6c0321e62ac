"""What the lines of a training file become: documents, token ids, and what is learnt."""

import json
from pathlib import Path

import numpy as np
import pytest

from moe_lightning.data.documents import MAX_PART_CHARS, Document, DocumentFile
from moe_lightning.data.targets import TargetEncoder
from moe_lightning.data.token_cache import TokenCache, cache_key, write_cache
from moe_lightning.demo.random_tokenizer import make_tokenizer
from moe_lightning.errors import UsageError

END = "<|endoftext|>"
MESSAGES = [
    {"role": "user", "content": "who"},
    {"role": "assistant", "content": "me"},
    {"role": "user", "content": "why"},
    {"role": "assistant", "content": "so"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(300, max_positions=64)


def write(path: Path, text: str | bytes) -> DocumentFile:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return DocumentFile(path)


def write_jsonl(path: Path, *rows: object) -> DocumentFile:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def cached(file: DocumentFile, tokenizer, directory: Path, vocab_size: int = 300) -> TokenCache:
    write_cache(file, tokenizer, directory, vocab_size=vocab_size, is_quiet=True)
    return TokenCache(directory)


def test_text_file_is_split_at_separator_lines(tmp_path):
    file = write(tmp_path / "a.txt", f"\nfirst\n\nstill first\n{END}\n\n{END}\nsecond {END} line\n")
    assert [(d.line, d.text) for d in file] == [
        (1, "first\n\nstill first"),
        (8, f"second {END} line"),
    ]


def test_text_file_without_separator_is_one_document(tmp_path):
    file = write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo")
    assert [d.text for d in file] == ["one\ntwo"]


def test_long_text_document_comes_in_parts_and_is_cached_as_one(tmp_path, tokenizer):
    text = "to be or not\n" * (2 * MAX_PART_CHARS // 13) + "é"
    file = write(tmp_path / "a.txt", text + f"\n{END}\nnext")
    parts = list(file)
    assert [(d.is_start, d.is_end) for d in parts] == [
        (True, False),
        (False, True),
        (True, True),
    ]
    assert "".join(d.text for d in parts[:2]) == text
    cache = cached(file, tokenizer, tmp_path / "cache")
    assert cache.num_documents == 2
    first = cache.tokens[: cache.document_starts[1]].tolist()
    assert tokenizer.decode(first) == text + END
    assert cache.is_all_learnt


def test_jsonl_reads_three_kinds_and_skips_blank_lines_and_empty_texts(tmp_path):
    file = write_jsonl(
        tmp_path / "a.jsonl",
        {"text": "one", "kind": "ignored"},
        {"text": ""},
        {"prompt": "p", "answer": "a"},
        {"messages": MESSAGES},
    )
    file.path.write_text(file.path.read_text().replace("\n", "\n\n"))
    documents = list(file)
    assert [d.line for d in documents] == [1, 5, 7]
    assert documents[0].text == "one"
    assert (documents[1].prompt, documents[1].text) == ("p", "a")
    assert documents[2].messages == MESSAGES
    assert file.num_bytes_read == file.path.stat().st_size


def test_text_ends_with_the_end_token_and_all_is_learnt(tokenizer):
    [(ids, is_learnt)] = TargetEncoder(tokenizer).encode([Document(line=1, text="to be")])
    assert tokenizer.decode(ids) == "to be" + END
    assert is_learnt == [True] * len(ids)


def test_only_the_answer_is_learnt_and_the_prompt_is_tokenised_as_in_predict(tokenizer):
    documents = [
        Document(line=1, text="plain"),
        Document(line=2, prompt="to be", text="or not"),
    ]
    ids, is_learnt = TargetEncoder(tokenizer).encode(documents)[1]
    prompt = tokenizer("to be")["input_ids"]
    assert ids[: len(prompt)] == prompt
    assert tokenizer.decode(ids[len(prompt) :]) == "or not" + END
    assert is_learnt == [False] * len(prompt) + [True] * (len(ids) - len(prompt))


PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|endoftext|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.mark.parametrize("template", ["marked", "plain"])
def test_only_assistant_messages_are_learnt(template):
    tokenizer = make_tokenizer(300, max_positions=64)
    if template == "plain":
        tokenizer.chat_template = PLAIN_TEMPLATE
    [(ids, is_learnt)] = TargetEncoder(tokenizer).encode([Document(line=1, messages=MESSAGES)])
    text = f"<|user|>who<|assistant|>me{END}<|user|>why<|assistant|>so{END}"
    assert tokenizer.decode(ids) == text
    learnt = [token for token, use in zip(ids, is_learnt, strict=True) if use]
    assert tokenizer.decode(learnt) == f"me{END}so{END}"


def test_template_that_rewrites_earlier_messages_is_refused(tmp_path):
    tokenizer = make_tokenizer(300, max_positions=64)
    tokenizer.chat_template = "{{ messages | length }}" + PLAIN_TEMPLATE
    file = write_jsonl(tmp_path / "a.jsonl", {"text": "x"}, {"messages": MESSAGES})
    with pytest.raises(UsageError, match=r"a\.jsonl, line 2: the chat template writes the first"):
        cached(file, tokenizer, tmp_path / "cache")
    assert list(tmp_path.iterdir()) == [file.path]


def test_messages_without_a_chat_template_are_refused(tmp_path):
    tokenizer = make_tokenizer(300, max_positions=64)
    tokenizer.chat_template = None
    file = write_jsonl(tmp_path / "a.jsonl", {"messages": MESSAGES})
    with pytest.raises(UsageError, match='line 1: has "messages", but the tokenizer has no chat'):
        cached(file, tokenizer, tmp_path / "cache")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "unfinished', "line 2: is not JSON"),
        (b'["text"]', "line 2: is a list, not an object"),
        (b'{"txt": "a"}', r"line 2: has the keys \['txt'\]: give either \"text\""),
        (b'{"prompt": "a"}', r"line 2: has the keys \['prompt'\]"),
        (b'{"prompt": "a", "text": "b"}', r"line 2: has the keys \['prompt', 'text'\]"),
        (b'{"text": 3}', 'line 2: "text" is a int, not a string'),
        (b'{"prompt": "a", "answer": ""}', 'line 2: "answer" is empty'),
        (b'{"messages": "hi"}', 'line 2: "messages" is not a list'),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "line 2: no message has the role"),
        (b'{"text": "\xff"}', "line 2: is not UTF-8"),
    ],
)
def test_damaged_line_is_named_and_nothing_is_left(tmp_path, tokenizer, line, message):
    file = write(tmp_path / "a.jsonl", b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(UsageError, match=rf"a\.jsonl, {message}"):
        cached(file, tokenizer, tmp_path / "cache")
    assert list(tmp_path.iterdir()) == [file.path]


def test_undecodable_line_of_a_text_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"a\.txt, line 3: is not UTF-8"):
        list(write(tmp_path / "a.txt", b"one\ntwo\nthr\xff\xfe e\n"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"x", "can't tell from '.csv'"),
        ("a.jsonl", b"\x1f\x8b\x08", "is not a text file"),
        ("a.txt", b"ab\0c", "is not a text file"),
        ("a.parquet", b"PAR1", "is not a text file"),
    ],
)
def test_file_that_is_no_text_is_refused(tmp_path, name, content, message):
    with pytest.raises(UsageError, match=message):
        write(tmp_path / name, content)


def test_missing_file_and_directory_are_refused(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        DocumentFile(tmp_path / "none.txt")
    with pytest.raises(UsageError, match="is not a file"):
        DocumentFile(tmp_path)


def test_empty_file_is_refused(tmp_path, tokenizer):
    with pytest.raises(UsageError, match=r"a\.txt has no text"):
        cached(write(tmp_path / "a.txt", "\n\n"), tokenizer, tmp_path / "cache")


def test_token_outside_of_the_model_is_refused(tmp_path, tokenizer):
    file = write_jsonl(tmp_path / "a.jsonl", {"text": "fine"}, {"text": "zzz"})
    largest = max(tokenizer("zzz")["input_ids"])
    with pytest.raises(UsageError, match=f"the token id {largest}, but the model knows 0 to"):
        cached(file, tokenizer, tmp_path / "cache", vocab_size=largest)


def test_cache_is_written_once_and_keyed_by_what_it_depends_on(tmp_path, tokenizer):
    file = write(tmp_path / "a.txt", "to be")
    key = cache_key(file, tokenizer)
    cache = cached(file, tokenizer, tmp_path / key)
    assert cache.tokens.dtype == np.uint16
    stamp = (tmp_path / key / "tokens.bin").stat().st_mtime_ns
    cached(file, tokenizer, tmp_path / key)
    assert (tmp_path / key / "tokens.bin").stat().st_mtime_ns == stamp
    assert cache_key(file, make_tokenizer(301, max_positions=64)) != key
    assert cache_key(DocumentFile(file.path, format="jsonl"), tokenizer) != key
    file.path.write_text("or not to be")
    assert cache_key(file, tokenizer) != key


def test_large_vocabularies_take_four_bytes_a_token(tmp_path, tokenizer):
    cache = cached(write(tmp_path / "a.txt", "to be"), tokenizer, tmp_path / "c", vocab_size=70_000)
    assert tokenizer.decode(cache.tokens.tolist()) == "to be" + END
    assert (tmp_path / "c" / "tokens.bin").stat().st_size == 4 * cache.num_tokens
