"""A backend of the user's own, by the name of the function that makes it."""

import sys

import pytest
import torch
from made_up_experts import make_experts

from moe_lightning.errors import UsageError
from moe_lightning.experts.adapters import add_experts_adapter
from moe_lightning.experts.backends import check_name, make_backend, plain_backend
from moe_lightning.experts.packed import PackedExperts

MODULE = """
from functools import partial

from moe_lightning.experts.backends import reference

NUMBER = 3
made = []


def make_backend(experts):
    made.append(experts)
    return partial(reference, experts)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_module.make_backend"
    sys.modules.pop("own_module", None)


def test_it_is_made_for_the_module_and_asked(own):
    experts = make_experts()
    backend = make_backend(own, experts)
    assert sys.modules["own_module"].made == [experts]
    rows_RD = torch.randn(5, experts.down_proj.shape[1])
    index_RK = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2], [1, 0]])
    weights_RK = torch.rand(5, 2)
    want_RD = plain_backend("reference", experts)(rows_RD, index_RK, weights_RK)
    torch.testing.assert_close(backend(rows_RD, index_RK, weights_RK), want_RD, rtol=0, atol=0)


def test_training_and_adapters_do_without_it(own):
    experts = make_experts()
    assert plain_backend(own, experts).func.__name__ == "grouped"
    add_experts_adapter(experts, "down_proj", rank=2, scale=1.0)
    assert not isinstance(make_backend(own, experts), PackedExperts)
    check_name(own)
    assert sys.modules["own_module"].made == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere_at_all.make", "cannot be imported"),
        ("own_module.other", "cannot be imported.*other"),
        ("own_module.NUMBER", "is no function"),
        (".make", "cannot be imported"),
    ],
)
def test_what_makes_no_backend_is_refused(own, name, words):
    with pytest.raises(UsageError, match=f"experts_backend='{name}' {words}"):
        check_name(name)
