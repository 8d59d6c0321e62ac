"""Strategies by the names that users know, in a form that takes options."""

from collections.abc import Sequence

from moe_lightning.strategies import SHARDED_PRESETS, STRATEGIES

OPTION = "--trainer.strategy"
RUNS_ON_ALL_DEVICES = ("moe_auto", *SHARDED_PRESETS)


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
    spelled_out: list[str] = []
    is_value = False
    for argument in arguments:
        prefix, value = "", argument
        if argument.startswith(f"{OPTION}="):
            prefix, value, is_value = f"{OPTION}=", argument.partition("=")[2], True
        if not is_value:
            spelled_out.append(argument)
        elif has_options:
            spelled_out += [f"{prefix}{_class_path(value)}", *_options(value)]
        else:
            spelled_out.append(f"{prefix}{_name(value)}")
        is_value = argument == OPTION
    return spelled_out


def offer_all_devices(arguments: Sequence[str]) -> list[str]:
    """Let strategies that are for several devices have all of the machine; others begin with one.

    Args:
        arguments: The command line after the verb.

    Returns:
        The command line; what it says of devices, in a config or not, comes later and counts.
    """
    # Whatever way it is given, the value is the last word.
    names = [
        argument.removeprefix(f"{OPTION}=")
        for before, argument in zip(("", *arguments), arguments, strict=False)
        if before == OPTION or argument.startswith(f"{OPTION}=")
    ]
    is_for_all = bool(names) and _name(names[-1]) in RUNS_ON_ALL_DEVICES
    return ["--trainer.devices=auto", *arguments] if is_for_all else list(arguments)


def _name(name: str) -> str:
    classes: dict[str, str] = {}
    for known, strategy in STRATEGIES.items():
        classes.setdefault(strategy.__name__, known)
    return classes.get(name.rpartition(".")[2], name)


def _class_path(name: str) -> str:
    strategy = STRATEGIES.get(name)
    return name if strategy is None else f"{strategy.__module__}.{strategy.__qualname__}"


def _options(name: str) -> list[str]:
    """What a preset is besides its class; options that follow count more."""
    preset = SHARDED_PRESETS.get(name, {})
    return [f"{OPTION}.{option}={value}" for option, value in preset.items()]
