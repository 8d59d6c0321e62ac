"""Configs by path, or by the names of those that ship with the package."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from moe_lightning.errors import UsageError

PACKAGE = Path(__file__).resolve().parent.parent


def config_directory() -> Path:
    """Where the shipped configs are: inside the installed package, or at the root of a checkout."""
    inside = PACKAGE / "configs"
    return inside if inside.is_dir() else PACKAGE.parent / "configs"


def resolve_configs(arguments: Sequence[str]) -> list[str]:
    """Replace names of shipped configs by their paths; files of that name in the working directory
    come first.

    Args:
        arguments: The command line after the verb.

    Returns:
        The command line with paths.

    Raises:
        UsageError: If a config is neither a file nor shipped.
    """
    resolved = list(arguments)
    for position, argument in enumerate(arguments):
        if argument in ("--config", "-c") and position + 1 < len(arguments):
            resolved[position + 1] = _find_config(arguments[position + 1])
        elif argument.startswith("--config="):
            resolved[position] = f"--config={_find_config(argument.removeprefix('--config='))}"
    return resolved


def _find_config(name: str) -> str:
    if Path(name).is_file():
        _check_yaml(name)
        return name
    shipped = config_directory() / name
    if shipped.is_file():
        return str(shipped)
    names = ", ".join(sorted(path.name for path in config_directory().glob("*.yaml")))
    raise UsageError(
        f"--config {name}: no such file here, and no shipped config of that name. Shipped: {names}."
    )


def _check_yaml(path: str) -> None:
    """The parser's own errors do not name the file."""
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(
            f"--config {path} must hold options as 'name: value', like --print_config prints them; "
            f"it holds a {type(content).__name__}."
        )
