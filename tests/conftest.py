"""Tiny random checkpoints, and two ways to run them: this package's, and unmodified transformers.

Fixtures are factories that keep what they made for the session.
"""

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

# Without a GPU, Triton's kernels run in its interpreter. transformers imports triton, which reads
# this only then.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from families import FAMILIES
from torch import Tensor
from transformers import AutoModelForCausalLM

from moe_lightning import MoELightningModule
from moe_lightning.data.records import Row, RowOptions
from moe_lightning.demo.random_checkpoint import make_checkpoint
from moe_lightning.modeling.runner import ModelRunner
from moe_lightning.tasks import Task

# Tests that watch the clock, run on ranks or start the program itself: one by one.
ALONE = (
    "cli/test_benchmark",
    "cli/test_environment",
    "cli/test_faults",
    "cli/test_finetune_configs",
    "cli/test_plan_from",
    "cli/test_rank",
    "cli/test_rpc",
    "cli/test_sharded",
    "cli/test_verify_processes",
    "cli/test_worker",
    "dispatch/test_collective",
    "dispatch/test_interleave",
    "dispatch/test_slots",
    "docs",
    "experts/test_packed_memory",
    "scripts/test_bench",
    "scripts/test_chaos",
    "scripts/test_fuzz_worker",
    "metrics",
    "modeling/test_ep_plugin",
    "strategies/test_lora_export",
    "strategies/test_rank_watch",
    "strategies/test_resume",
    "strategies/test_rpc",
    "strategies/test_sharded",
    "test_packaging",
    "workers/test_expert_host",
    "workers/test_fleet",
    "workers/test_joining",
    "workers/test_local_processes",
    "workers/test_long_messages",
    "workers/test_session",
)
# Tests that mostly wait for a clock: they may wait together, but nothing may compute beside them.
WAITING = (
    "transport/test_link",
    "transport/test_liveness",
    "transport/test_tensorpipe",
    "transport/test_transport_contract",
    "transport/test_zmq",
    "workers/test_faults",
    "workers/test_two_hosts",
    "workers/test_worker",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    root = Path(__file__).parent
    for item in items:
        path = item.path.relative_to(root).as_posix()
        if path.startswith(ALONE):
            item.add_marker("alone")
        if path.startswith(WAITING):
            item.add_marker("waiting")


TINY = {
    "hidden_size": 32,
    "num_layers": 3,  # the DeepSeek families begin with a dense layer
    "num_experts": 8,
    "top_k": 2,
    "expert_size": 24,
    "num_heads": 4,
    "num_kv_heads": 2,
    "vocab_size": 320,
    "max_positions": 64,  # gpt_oss then has a window of 16
}


class PlainTransformers:
    """A checkpoint in unmodified transformers, one row at a time: no padding, no refill."""

    @torch.inference_mode(False)  # it is kept, for tests with gradients too
    def __init__(self, path: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, experts_implementation="eager"
        ).eval()

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> Tensor:
        return self.model(torch.tensor([token_ids]), use_cache=False).logits[0]

    def logprob(self, token_ids: list[int]) -> float:
        logprobs = self.logits(token_ids)[:-1].double().log_softmax(1)
        return float(logprobs.gather(1, torch.tensor(token_ids[1:])[:, None]).sum())

    @torch.inference_mode()
    def embedding(self, token_ids: list[int]) -> Tensor:
        output = self.model(torch.tensor([token_ids]), use_cache=False, output_hidden_states=True)
        return output.hidden_states[-1][0].mean(0)

    @torch.inference_mode()
    def greedy(self, token_ids: list[int], max_new_tokens: int, **options: Any) -> list[int]:
        """New tokens of transformers' own ``generate``, the end-of-sequence token included."""
        output = self.model.generate(
            torch.tensor([token_ids]),
            attention_mask=torch.ones(1, len(token_ids), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            **options,
        )
        return output[0, len(token_ids) :].tolist()


@pytest.fixture(autouse=True)
def nobody_stays_a_rank() -> Iterator[None]:
    """A test that leaves this process a rank would have all later ones, and what they start, meet
    at its address."""
    yield
    os.environ.pop("MASTER_PORT", None)  # Lightning's launchers leave it
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        raise AssertionError("the test left its process group")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each of the promised families in turn."""
    return str(request.param)


@pytest.fixture(params=["reference", "grouped_mm", "cpu_packed"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each of the backends that are exact on a CPU in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def family_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Directory of a tiny checkpoint: ``family_checkpoint(family, seed=..., overrides={...})``."""
    made: dict[str, Path] = {}

    def make(family: str, **settings: Any) -> Path:
        key = repr((family, sorted(settings.items())))
        if key not in made:
            path = tmp_path_factory.mktemp("checkpoints") / family
            made[key] = make_checkpoint(path, family=family, **{**TINY, **settings})
        return made[key]

    return make


@pytest.fixture(scope="session")
def plain_transformers() -> Callable[[Path], PlainTransformers]:
    """The reference of most tests."""
    return cache(PlainTransformers)


@pytest.fixture(scope="session")
def loaded_module() -> Callable[..., MoELightningModule]:
    """A module with its model loaded, shared: tests must leave it as it was."""

    @cache
    def load(path: Path, backend: Any = "grouped_mm") -> MoELightningModule:
        module = MoELightningModule(str(path), experts_backend=backend)
        module.configure_model()
        if backend.startswith("cpu_"):
            module.hosted.pack()  # the dense layers as well, as predict does
        return module

    return load


@pytest.fixture(scope="session")
def loaded_runner(loaded_module: Any) -> Callable[..., ModelRunner]:
    """The runner of :func:`loaded_module`."""
    return lambda path, backend="grouped_mm": loaded_module(path, backend).runner


@pytest.fixture(scope="session")
def random_ids() -> Callable[..., list[int]]:
    """Token ids that are no special tokens: ``random_ids(length, seed)``."""

    def draw(length: int, seed: int = 0) -> list[int]:
        generator = torch.Generator().manual_seed(1000 * length + seed)
        return torch.randint(4, 320, (length,), generator=generator).tolist()

    return draw


@pytest.fixture(scope="session")
def run_task() -> Callable[..., list[Any]]:
    """Run a task over prompts of token ids; ``options`` are RowOptions, one for each."""

    @torch.inference_mode()
    def run(
        task: Task,
        runner: ModelRunner,
        prompts: list[list[int]],
        *,
        options: list[RowOptions] | None = None,
        budget_tokens: int = 4096,
    ) -> list[Any]:
        rows = [
            Row(n, n + 1, f"row-{n}", prompt, (options or [RowOptions()] * len(prompts))[n])
            for n, prompt in enumerate(prompts)
        ]
        return task.run(runner, rows, budget_tokens=budget_tokens, progress=lambda *_: None)

    return run
