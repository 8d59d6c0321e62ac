"""Strategies by the names that users know, in a form that takes options."""

from collections.abc import Sequence

from moe_lightning.strategies import STRATEGIES

OPTION = "--trainer.strategy"


def spell_out_strategies(arguments: Sequence[str]) -> list[str]:
    """Make names of our strategies work with options and without.

    Lightning takes a name without options or a class with options, not the other two.

    Args:
        arguments: The command line after the verb.

    Returns:
        The command line with classes where ``--trainer.strategy.slots`` or the like follows, and
        with names otherwise.
    """
    has_options = any(argument.startswith(f"{OPTION}.") for argument in arguments)
    spell = _class_path if has_options else _name
    spelled_out = list(arguments)
    for position, argument in enumerate(arguments):
        if argument == OPTION and position + 1 < len(arguments):
            spelled_out[position + 1] = spell(arguments[position + 1])
        elif argument.startswith(f"{OPTION}="):
            spelled_out[position] = f"{OPTION}={spell(argument.partition('=')[2])}"
    return spelled_out


def _name(name: str) -> str:
    classes = {strategy.__name__: known for known, strategy in STRATEGIES.items()}
    return classes.get(name.rpartition(".")[2], name)


def _class_path(name: str) -> str:
    strategy = STRATEGIES.get(name)
    return name if strategy is None else f"{strategy.__module__}.{strategy.__qualname__}"
