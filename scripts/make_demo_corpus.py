"""Make the training text and the tokenizer of the demo checkpoint from three public-domain files.

    plays.txt, verse.txt, prose.txt ──▶ documents of 2-4 kB ──┬─ nine of ten ─▶ train.jsonl
                                                              └─ one of ten ──▶ val*.jsonl
    train text ──byte-level BPE──▶ tokenizer/

The same input always gives the same files. Run it with

    python scripts/make_demo_corpus.py --corpus DIR --out DIR
"""

import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from jsonargparse import CLI

from moe_lightning.demo.random_tokenizer import SPECIAL_TOKENS, wrap_tokenizer

# The three kinds differ a lot in size; repeating the small ones in training (never in the held-out
# part) lets a small model see enough of each.
REPEATS = {"plays": 1, "verse": 3, "prose": 4}
MIN_CHARS, MAX_CHARS = 1500, 3500

_ODD_CHARACTERS = {
    "\u2018": "'",
    "\u2019": "'",
    "\u201c": '"',
    "\u201d": '"',
    "\u2014": "--",
    "\x1a": "",
}
_SCAN_MARKS = re.compile(r"^(#{3,4} .*|p\.\d+:\d+.*|\[\[.*\]\]\s*)$", re.MULTILINE)
_LICENCE_START = re.compile(r"^\*\*\* ?START OF .*?$", re.MULTILINE)
_LICENCE_END = re.compile(r"^\*\*\* ?END OF .*", re.MULTILINE | re.DOTALL)
_VERSE_NUMBER = re.compile(r"[ \t]{2,}\d+[ \t]*$", re.MULTILINE)
_PLAIN_WORD = re.compile(r"""["'(\[*_-]*[A-Za-z]+(['-]+[A-Za-z]+)*[.,;:!?)\]"'*_-]*""")
_SCENE = re.compile(r"^\s*(ACT|SCENE|Scene|Act|PROLOGUE|EPILOGUE)\b")


def clean(text: str, kind: str) -> str:
    """Drop what is not the author's text: licences, scan marks, printed line numbers."""
    text = text.lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if match := _LICENCE_START.search(text):
        text = text[match.end() :]
    text = _LICENCE_END.sub("", text)
    for odd, plain in _ODD_CHARACTERS.items():
        text = text.replace(odd, plain)
    text = _SCAN_MARKS.sub("", text)
    if kind == "verse":
        text = _VERSE_NUMBER.sub("", text)
    if kind == "prose":  # markdown of the transcription: *titles* and "21\\."
        text = text.replace("*", "").replace("\\.", ".")
    return re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)


def is_readable(paragraph: str) -> bool:
    """False for tables, bibliographies and badly scanned paragraphs: mostly words that are none."""
    words = paragraph.split()
    num_plain = sum(
        _PLAIN_WORD.fullmatch(w) is not None and (len(w) > 1 or w in "aIO") for w in words
    )
    return num_plain >= 0.9 * len(words)


def paragraphs_of(text: str, kind: str) -> Iterator[str]:
    """Blocks between blank lines, cut at a line end where one alone is longer than a document."""
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = paragraph.strip("\n")
        if not paragraph.strip() or (kind == "prose" and not is_readable(paragraph)):
            continue
        lines: list[str] = []
        for line in paragraph.split("\n"):
            if sum(map(len, lines)) + len(lines) + len(line) > MAX_CHARS:
                yield "\n".join(lines)
                lines = []
            lines.append(line)
        yield "\n".join(lines)


def documents_of(text: str, kind: str) -> list[str]:
    """Group paragraphs to documents of 1.5-3.5 kB; in plays a scene starts a new one."""
    documents: list[str] = []
    group: list[str] = []
    for paragraph in paragraphs_of(clean(text, kind), kind):
        num_chars = sum(map(len, group)) + 2 * len(group)
        starts_scene = kind == "plays" and _SCENE.match(paragraph) is not None
        if group and (
            num_chars + len(paragraph) > MAX_CHARS or (starts_scene and num_chars >= MIN_CHARS)
        ):
            documents.append("\n\n".join(group))
            group = []
        group.append(paragraph)
    if group:
        documents.append("\n\n".join(group))
    return documents


def train_tokenizer(texts: Iterable[str], vocab_size: int, out: Path) -> None:
    """Train a byte-level BPE on `texts` and save it as a Hugging Face tokenizer directory."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrap_tokenizer(tokenizer, max_positions=1024).save_pretrained(str(out))


def write_jsonl(path: Path, documents: Iterable[tuple[str, str]]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        for kind, text in documents:
            file.write(json.dumps({"text": text, "kind": kind}, ensure_ascii=False) + "\n")
    temporary.replace(path)


def make_demo_corpus(
    corpus: str, out: str, vocab_size: int = 2048, held_out: float = 0.1, seed: int = 0
) -> None:
    """Write train.jsonl, val.jsonl, val_KIND.jsonl and tokenizer/ to a directory.

    Args:
        corpus: The directory with plays.txt, verse.txt and prose.txt.
        out: The directory to write to; it is made if missing.
        vocab_size: The number of tokens of the tokenizer, its four special tokens included.
        held_out: The share of the documents of each kind kept out of training.
        seed: The seed of the order of the training documents.
    """
    if not 0 < held_out < 1:
        raise SystemExit(f"--held_out {held_out}: give a share between 0 and 1, such as 0.1.")
    if vocab_size < 256 + len(SPECIAL_TOKENS):
        raise SystemExit(f"--vocab_size {vocab_size}: a byte-level tokenizer needs at least 260.")
    target = Path(out)
    target.mkdir(parents=True, exist_ok=True)
    every = round(1 / held_out)
    train: list[tuple[str, str]] = []
    val: list[tuple[str, str]] = []
    for kind, repeats in REPEATS.items():
        path = Path(corpus) / f"{kind}.txt"
        if not path.is_file():
            raise SystemExit(f"{path} does not exist: --corpus needs plays, verse and prose .txt.")
        documents = documents_of(path.read_text(encoding="utf-8"), kind)
        kept = [(kind, d) for i, d in enumerate(documents) if i % every != every - 1]
        held = [(kind, d) for i, d in enumerate(documents) if i % every == every - 1]
        train += kept * repeats
        val += held
        write_jsonl(target / f"val_{kind}.jsonl", held)
        num_kept, num_held = (sum(len(d) for _, d in part) for part in (kept, held))
        print(
            f"{kind}: {len(kept)} documents ({num_kept:,} characters, x{repeats}) to train, "
            f"{len(held)} ({num_held:,}) held out"
        )
    random.Random(seed).shuffle(train)
    write_jsonl(target / "train.jsonl", train)
    write_jsonl(target / "val.jsonl", val)
    train_tokenizer((text for _, text in train), vocab_size, target / "tokenizer")
    print(f"Wrote {target}/train.jsonl, val.jsonl, val_*.jsonl and tokenizer/")


if __name__ == "__main__":
    CLI(make_demo_corpus, as_positional=False)
