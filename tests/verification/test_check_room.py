import pytest
import torch

from moe_lightning.errors import UsageError
from moe_lightning.verification import check_room


def test_what_fits_is_let_through() -> None:
    check_room(10**9, torch.device("cpu"), 10**9)


def test_what_does_not_fit_is_refused_with_both_sizes_and_a_way_out() -> None:
    with pytest.raises(UsageError, match=r"needs 30\.0 GB.*room for 2\.5 GB.*fewer layers"):
        check_room(30 * 10**9, torch.device("cpu"), 25 * 10**8)
