from types import SimpleNamespace

import pytest
import torch

from moe_lightning.verification.tolerances import choose_tolerance, lossy_wires


def test_an_exact_configuration_keeps_the_promise_end_to_end() -> None:
    chosen = choose_tolerance(dtype=torch.float32, experts_backend="auto")
    assert (chosen.part, chosen.end_to_end) == (1e-4, 1e-4)


@pytest.mark.parametrize(
    ("dtype", "backend", "wires", "part", "num_reasons"),
    [
        (torch.float32, "cpu_half", (), 1e-4 + 5e-3, 2),
        (torch.float32, "cpu_int8", (), 1e-4 + 1e-1, 2),
        (torch.float32, "auto", ("bfloat16", "int8"), 1e-4 + 2e-2 + 5e-2, 3),
        (torch.bfloat16, "auto", (), 5e-2, 1),
        (torch.float16, "auto", ("float16",), 1e-2 + 5e-3, 2),
    ],
)
def test_what_is_lossy_adds_up(dtype, backend, wires, part, num_reasons) -> None:
    chosen = choose_tolerance(dtype=dtype, experts_backend=backend, wires=wires)
    assert chosen.part == pytest.approx(part)
    assert chosen.end_to_end == pytest.approx(4 * part)
    assert len(chosen.reasons) == num_reasons


def test_the_users_own_holds_for_all() -> None:
    chosen = choose_tolerance(dtype=torch.bfloat16, experts_backend="cpu_int8", given=0.25)
    assert (chosen.part, chosen.end_to_end, chosen.reasons) == (0.25, 0.25, ("--tolerance",))


def test_wires_are_read_from_either_kind_of_strategy() -> None:
    wire = SimpleNamespace(dispatch_dtype="bfloat16", combine_dtype="working")
    assert lossy_wires(SimpleNamespace(wire=wire)) == ("bfloat16",)
    exchange = SimpleNamespace(wire_dtype=torch.bfloat16)
    assert lossy_wires(SimpleNamespace(exchange=exchange)) == ("bfloat16", "bfloat16")
    assert lossy_wires(SimpleNamespace()) == ()
