"""The demo's corpus: nothing held out is trained on, and the same input gives the same files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "make_demo_corpus.py"
KINDS = ("plays", "verse", "prose")


def paragraphs(kind: str, number: int) -> str:
    words = ["to", "be", "or", "not", "that", "is", "the", "question", "whether", "tis", "nobler"]
    lines = [
        " ".join(words[(i * 7 + j * number) % len(words)] for j in range(9)) for i in range(30)
    ]
    return f"{kind} paragraph {chr(97 + number)}\n" + "\n".join(lines) + "\n\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> list[Path]:
    """The output of two runs."""
    root = tmp_path_factory.mktemp("corpus")
    for kind in KINDS:
        text = "".join(paragraphs(kind, n) for n in range(26))
        if kind == "verse":
            text = text.replace("question", "question            630\n", 1)
        if kind == "prose":
            text = "### START: scan.tif ###\n\n\u2018quoted\u2019\n\n0l3 $ca# s:;* 1I|\n\n" + text
        (root / f"{kind}.txt").write_text(text.replace("\n", "\r\n"))
    outs = [root / "one", root / "two"]
    for out in outs:
        options = ["--corpus", str(root), "--out", str(out), "--vocab_size", "300"]
        subprocess.run(
            [sys.executable, str(SCRIPT), *options],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            check=True,
            capture_output=True,
        )
    return outs


def documents(path: Path) -> list[tuple[str, str]]:
    return [(row["kind"], row["text"]) for row in map(json.loads, path.open())]


def test_two_runs_write_the_same(made):
    one, two = ({p.name: p.read_bytes() for p in out.rglob("*") if p.is_file()} for out in made)
    assert one == two
    assert {"train.jsonl", "val.jsonl", "val_plays.jsonl", "tokenizer.json"} <= one.keys()


def test_a_tenth_is_held_out_and_only_training_repeats(made):
    train, val = documents(made[0] / "train.jsonl"), documents(made[0] / "val.jsonl")
    assert not set(train) & set(val)
    assert len(set(val)) == len(val) > 0
    for kind, repeats in zip(KINDS, (1, 3, 4), strict=True):
        kept = [d for d in train if d[0] == kind]
        held = [d for d in val if d[0] == kind]
        assert {kept.count(d) for d in kept} == {repeats}
        assert len(held) == (len(set(kept)) + len(held)) // 10
        assert held == documents(made[0] / f"val_{kind}.jsonl")


def test_marks_of_the_scan_and_line_numbers_are_gone(made):
    text = "\n".join(t for _, t in documents(made[0] / "train.jsonl"))
    assert "'quoted'" in text
    for gone in ("START", "$ca#", "630", "\r"):
        assert gone not in text


def test_tokenizer_has_its_size_and_special_tokens(made):
    tokenizer = AutoTokenizer.from_pretrained(made[0] / "tokenizer")
    assert len(tokenizer) == 300
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.bos_token is None
    chat = [{"role": "user", "content": "hi"}]
    assert (
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        == "<|user|>hi<|assistant|>"
    )
