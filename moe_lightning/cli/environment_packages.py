"""The packages that this one needs: whether they are there, fit, and can be imported."""

import importlib
from importlib import metadata

from moe_lightning.extras import EXTRAS, how_to_install

Lines = list[tuple[str, str]]
DISTRIBUTION = "moe-lightning"
MODULES = {"pyzmq": "zmq", "pyyaml": "yaml"}  # where the name is another than the distribution's


def dependencies(problems: list[str]) -> Lines:
    """Import every required package, and compare its version.

    Args:
        problems: What is wrong is added.

    Returns:
        Name and words for each.
    """
    from packaging.requirements import Requirement

    try:
        declared = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        problems.append(
            "moe-lightning runs from a folder that is not installed, so that nothing says which "
            "packages it needs. pip install -e . in that folder"
        )
        declared = ["torch", "lightning", "transformers"]
    lines: Lines = []
    for requirement in map(Requirement, declared):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = requirement.name
        wanted = f"{name}{requirement.specifier}"
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            lines.append((name, "missing"))
            problems.append(f"{name} is missing. pip install '{wanted}'")
            continue
        line = version
        if not requirement.specifier.contains(version, prereleases=True):
            line += f", but {requirement.specifier} is needed"
            problems.append(f"{name} is {version}. pip install '{wanted}'")
        try:
            importlib.import_module(MODULES.get(name.lower(), name.replace("-", "_")))
        except Exception as error:
            line += f", cannot be imported: {words(error)}"
            problems.append(
                f"{name} {version} cannot be imported ({words(error)}). "
                f"pip install --force-reinstall '{wanted}'"
            )
        lines.append((name, line))
    return lines


def optional_packages(_: list[str]) -> Lines:
    """The packages that only some uses need, and how to install those that are missing."""
    lines: Lines = []
    for package in EXTRAS:
        try:
            lines.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            lines.append((package, f"not installed: {how_to_install(package)}"))
    return lines


def words(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
