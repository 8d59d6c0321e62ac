import math

import torch

from moe_lightning.verification.differences import Largest, relative_differences


def test_the_relative_difference_of_a_position_is_that_of_its_vector() -> None:
    wanted_TX = torch.tensor([[3.0, 4.0], [3.0, 4.0], [0.0, 5.0]])
    got_TX = torch.tensor([[3.0, 4.0], [3.0, 4.5], [3.0, 1.0]])
    # 0; 0.5 of 5; a vector of length 5 (3 and -4) of 5
    torch.testing.assert_close(
        relative_differences(got_TX, wanted_TX), torch.tensor([0.0, 0.1, 1.0])
    )


def test_a_vanishing_vector_is_measured_against_the_typical_one() -> None:
    wanted_TX = torch.tensor([[1.0], [1.0], [1.0], [0.0]])
    got_TX = torch.tensor([[1.0], [1.0], [1.0], [1e-6]])
    # The typical length is sqrt(3 / 4); the least that counts is a hundredth of it.
    expected = 1e-6 / (0.01 * math.sqrt(0.75))
    torch.testing.assert_close(
        relative_differences(got_TX, wanted_TX), torch.tensor([0.0, 0.0, 0.0, expected])
    )


def test_what_is_not_finite_is_infinitely_far_off() -> None:
    wanted_TX = torch.ones(3, 2)
    got_TX = torch.tensor([[1.0, 1.0], [math.nan, 1.0], [math.inf, 1.0]])
    assert relative_differences(got_TX, wanted_TX).tolist() == [0.0, math.inf, math.inf]


def test_all_zeros_on_both_sides_are_equal() -> None:
    zeros_TX = torch.zeros(2, 3)
    assert relative_differences(zeros_TX, zeros_TX).tolist() == [0.0, 0.0]


def test_the_largest_keeps_its_place_and_counts() -> None:
    largest = Largest()
    wanted_TX = torch.tensor([[10.0], [10.0]])
    largest.see(torch.tensor([[10.0], [11.0]]), wanted_TX, row=3, tolerance=0.05)
    largest.see(
        torch.tensor([[15.0], [10.0]]),
        wanted_TX,
        row=4,
        tolerance=0.05,
        positions_T=torch.tensor([6, 9]),
    )
    largest.see(torch.tensor([[10.4], [10.0]]), wanted_TX, row=5, tolerance=0.05)
    largest.see(torch.zeros(0, 1), torch.zeros(0, 1), row=6, tolerance=0.05)
    assert (largest.absolute, largest.relative) == (5.0, 0.5)
    assert (largest.row, largest.position) == (4, 6)
    assert (largest.num_over, largest.num_positions) == (2, 6)


def test_infinity_is_no_json() -> None:
    largest = Largest()
    largest.see(torch.tensor([[math.nan]]), torch.tensor([[1.0]]), row=0, tolerance=1.0)
    assert largest.num_over == 1
    assert largest.to_json()["relative"] is None
    assert largest.to_json()["absolute"] is None
