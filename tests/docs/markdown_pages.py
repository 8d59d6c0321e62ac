"""Pages of Markdown: their fenced blocks, the commands of these, links and anchors."""

import re
import textwrap
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<info>[^`\n]*)$")
TITLE = re.compile(r"\btitle=\"([^\"]+)\"")
EXIT_CODE = re.compile(r"#.*\bexit code (\d)")
COMMENT = re.compile(r"\s+#\s.*$")


def all_pages() -> list[str]:
    """The README and the site's pages, as paths from the root of the repository."""
    pages = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
    return ["README.md", *pages]


@dataclass
class Command:
    """A line after ``$``, and what the page shows below it."""

    line: int
    text: str
    exit_code: int | None
    shown: list[str] = field(default_factory=list)

    @property
    def may_end_with(self) -> set[int]:
        if self.exit_code is not None:
            return {self.exit_code}
        fails = any(line.startswith("error:") for line in self.shown)
        return set(range(1, 7)) if fails else {0}


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        line: Number of its first line in the page.
        language: The first word after the fence.
        title: The file that the page says it is; empty if it says none.
        text: What is in it, without the block's own indentation.
    """

    line: int
    language: str
    title: str
    text: str

    @cached_property
    def commands(self) -> list[Command]:
        """The commands of a console block."""
        found: list[Command] = []
        lines = self.text.splitlines()
        for number, line in enumerate(lines):
            if number and found and lines[number - 1].endswith("\\") and not found[-1].shown:
                found[-1].text = found[-1].text.removesuffix("\\") + COMMENT.sub("", line).strip()
            elif line.startswith("$ "):
                code = EXIT_CODE.search(line)
                text = COMMENT.sub("", line[2:]).strip()
                found.append(Command(self.line + number, text, int(code[1]) if code else None))
            elif found:
                found[-1].shown.append(line)
        return found


@dataclass(frozen=True)
class Page:
    """A page of Markdown."""

    name: str

    @property
    def path(self) -> Path:
        return ROOT / self.name

    @cached_property
    def _parts(self) -> tuple[list[Block], list[str]]:
        """Blocks, and the lines that are in none."""
        blocks, prose = [], []
        lines = iter(enumerate(self.path.read_text().splitlines(), start=1))
        for number, line in lines:
            if (opening := FENCE.match(line)) is None:
                prose.append(line)
                continue
            content = []
            for _, line in lines:
                if line.strip() == opening["fence"]:
                    break
                content.append(line)
            else:
                raise AssertionError(f"{self.name}:{number}: the fence is not closed")
            info = opening["info"].strip()
            title = TITLE.search(info)
            text = textwrap.dedent("\n".join(content)) + "\n"
            blocks.append(
                Block(number + 1, info.partition(" ")[0], title[1] if title else "", text)
            )
        return blocks, prose

    @property
    def blocks(self) -> list[Block]:
        return self._parts[0]

    @property
    def prose(self) -> list[str]:
        return self._parts[1]

    @cached_property
    def links(self) -> list[str]:
        """Targets of all links and pictures."""
        text = re.sub(r"`[^`]*`", "", "\n".join(self.prose))
        return re.findall(r"\]\(\s*<?([^)\s>]+)", text) + re.findall(
            r"(?:src|href)=\"([^\"]+)\"", text
        )

    @cached_property
    def anchors(self) -> set[str]:
        """What a link may name after ``#``: its headings, as GitHub and Python-Markdown slug them,
        and explicit ids."""
        headings = [line for line in self.prose if re.match(r"#{1,6} ", line)]
        slugs: set[str] = set()
        for heading in headings:
            text = re.sub(r"\{[^}]*\}\s*$", "", heading.lstrip("#").strip())
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).replace("`", "")
            slug = re.sub(r"[^\w\s-]", "", text.lower()).strip()
            slugs |= {re.sub(r"\s", "-", slug), re.sub(r"[-\s]+", "-", slug)}
        explicit = re.findall(r"\{[^}]*#([\w-]+)[^}]*\}|id=\"([\w-]+)\"", "\n".join(self.prose))
        return slugs | {name for pair in explicit for name in pair if name}
