"""Which of many alike cases run in CI; ``scripts/test.sh --wide`` runs the others too."""

import pytest


def sampled(cases, *in_ci):
    """Mark all cases but some as wide.

    Args:
        cases: Values of a parameter; tuples are values of several.
        in_ci: Those that run always.

    Returns:
        The same, for ``parametrize``.
    """

    def wide(case):
        return pytest.param(*case if isinstance(case, tuple) else (case,), marks=pytest.mark.wide)

    return [case if case in in_ci else wide(case) for case in cases]
