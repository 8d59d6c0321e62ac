"""The packages that only some uses need, and the extra of this one that installs each."""

EXTRAS = {
    "peft": "lora",
    "s3fs": "s3",
    "gcsfs": "gcs",
    "adlfs": "azure",
    "tensorboard": "tensorboard",
    "triton": "triton",
}


def how_to_install(package: str) -> str:
    """The command that installs an optional package in a version that goes with this one.

    Args:
        package: One of :data:`EXTRAS`.

    Returns:
        The command.
    """
    return f"pip install 'moe-lightning[{EXTRAS[package]}]'"


def with_extra(message: str) -> str:
    """Add to an error about a missing package how to install it, if an extra does.

    Args:
        message: What the library that wants the package says.

    Returns:
        The message; it ends without a full stop.
    """
    message = message.strip().removesuffix(".")
    packages = [package for package in EXTRAS if package in message.lower()]
    if not packages or names_extra(message):
        return message
    return f"{message}: {how_to_install(packages[0])}"


def names_extra(message: str) -> bool:
    """Whether a message says which extra to install."""
    return "moe-lightning[" in message
