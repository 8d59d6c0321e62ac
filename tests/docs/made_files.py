"""What a command made in a folder, kept so that another page that begins alike need not run it."""

import shutil
from dataclasses import dataclass
from pathlib import Path

Snapshot = dict[str, tuple[int, int] | None]


def snapshot(folder: Path) -> Snapshot:
    """Every path of a folder, and of files the size and the time of their last change."""
    found: Snapshot = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_symlink():
            facts = path.stat()
            is_file = path.is_file()
            found[str(path.relative_to(folder))] = (
                (facts.st_size, facts.st_mtime_ns) if is_file else None
            )
    return found


@dataclass(frozen=True)
class Outcome:
    """The exit code of a command, and what it wrote to the terminal."""

    code: int
    output: str


@dataclass(frozen=True)
class _Made:
    outcome: Outcome
    roots: list[str]
    copy: Path


class MadeFiles:
    """Outcomes of commands that depended on nothing, for all pages of a session of tests.

    Args:
        directory: Where copies are kept.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._made: dict[str, _Made] = {}

    def again(self, command: str, folder: Path) -> Outcome | None:
        """Put what the command made elsewhere into a folder; None if it must run here."""
        made = self._made.get(command)
        if made is None or _mentions(command, snapshot(folder)):
            return None
        if any((folder / root).exists() for root in made.roots):
            return None
        for root in made.roots:
            (folder / root).parent.mkdir(exist_ok=True)
            _copy(made.copy / root, folder / root)
        return made.outcome

    def keep(self, command: str, folder: Path, before: Snapshot, outcome: Outcome) -> None:
        """Keep what the command has just made, if all of it is new and none of it built on
        anything.
        """
        after = snapshot(folder)
        roots = [
            path
            for path in after
            if path not in before and ((up := str(Path(path).parent)) == "." or up in before)
        ]
        if "outputs" in roots:
            roots.remove("outputs")
            roots += [path for path in after if str(Path(path).parent) == "outputs"]
        is_changed = any(before[path] != after.get(path) for path in before)
        is_inside = any(str(Path(root).parent) not in (".", "outputs") for root in roots)
        if is_changed or is_inside or _mentions(command, before):
            return
        copy = self._directory / str(len(self._made))
        for root in roots:
            (copy / root).parent.mkdir(parents=True, exist_ok=True)
            _copy(folder / root, copy / root)
        self._made[command] = _Made(outcome, roots, copy)


def _mentions(command: str, paths: Snapshot) -> bool:
    """Whether a command names anything that is there, but for what every page begins with."""
    return any(path in command for path in paths if path not in ("outputs", "prompts.jsonl"))


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy2(source, target)
