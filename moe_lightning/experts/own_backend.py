"""A backend of the user's own, named by where Python finds it: ``my_module.make_backend``.

The named function is called with an experts module whose weights are in place, once for each layer
and device, and gives the backend. It leaves the weights where they are.
"""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

from torch import nn

from moe_lightning.errors import UsageError

if TYPE_CHECKING:
    from moe_lightning.experts.backends import Backend


def is_own(name: str) -> bool:
    """Whether a name of a backend is an import path."""
    return "." in name


def import_maker(path: str) -> "Callable[[nn.Module], Backend]":
    """The function that an import path names.

    Args:
        path: ``MODULE.FUNCTION``.

    Returns:
        What makes the backend for an experts module.

    Raises:
        UsageError: If there is no such function.
    """
    module, _, function = path.rpartition(".")
    try:
        maker = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"model.experts_backend={path!r} cannot be imported: {error}. It is MODULE.FUNCTION, "
            "of a module in the working directory or installed."
        ) from error
    if not callable(maker):
        raise UsageError(
            f"model.experts_backend={path!r} is no function. It is one that takes an experts "
            "module and gives a backend."
        )
    return maker  # type: ignore[no-any-return]
