"""Which of many alike cases run in CI; ``scripts/test.sh --wide`` runs the others too."""

import pytest


def sampled(cases, *in_ci):
    """Mark all cases but some as wide.

    Args:
        cases: Values of a parameter.
        in_ci: Those that run always.

    Returns:
        The same, for ``parametrize``.
    """
    return [c if c in in_ci else pytest.param(c, marks=pytest.mark.wide) for c in cases]
