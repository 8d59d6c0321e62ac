"""A module under each of the backends: predicting, training, saving, and one after the other."""

import lightning as L
import pytest
import torch
from quiet_trainer import quiet_trainer
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from moe_lightning import MoELightningModule
from moe_lightning.errors import UsageError
from moe_lightning.experts.packed_weights import OneDnnWeights
from moe_lightning.modeling.packing import PackedLinear
from moe_lightning.modeling.seam import find_moe_layers
from moe_lightning.tasks import Embed, Generate, Score

PROMPTS = ["To be, or", "Once upon a time", "x", "It was the best of times, it was"]
EXACT = ("auto", "reference", "grouped_mm", "cpu_packed")
# Of log-probabilities that sum to -30 to -150: fp32 sums in another order; float16 weights; int8
# weights and rows, which now and then send a token to another expert.
TOLERANCES = dict.fromkeys(EXACT, 1e-4) | {"cpu_half": 5e-3, "cpu_int8": 0.7}


@pytest.fixture
def trainer(tmp_path):
    return quiet_trainer(tmp_path)


def predict(trainer, module, task=None, **options):
    module.task = task or Score()
    loader = DataLoader(PROMPTS, batch_size=4)
    return [row for batch in trainer.predict(module, loader, **options) for row in batch]


def logprobs(rows):
    return [row["logprob"] for row in rows]


def plain_logprobs(plain, module):
    return [plain.logprob(module.tokenizer(prompt).input_ids) for prompt in PROMPTS]


def training_batches():
    ids_BS = torch.randint(4, 320, (2, 16), generator=torch.Generator().manual_seed(0))
    return DataLoader([{"input_ids": row, "labels": row} for row in ids_BS], batch_size=2)


def module_of(path, backend="auto"):
    return MoELightningModule(
        str(path),
        experts_backend=backend,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    )


def weights_on_disk(path):
    return load_file(path / "model.safetensors")


def assert_same_tensors(got, want):
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


# Predicting.


def test_every_family_predicts_as_transformers(
    family, family_checkpoint, plain_transformers, trainer
):
    path = family_checkpoint(family)
    plain, module = plain_transformers(path), module_of(path)
    scores = logprobs(predict(trainer, module))
    assert scores == pytest.approx(plain_logprobs(plain, module), abs=1e-4)
    prompts = [module.tokenizer(prompt).input_ids for prompt in PROMPTS]
    answers = predict(trainer, module, Generate(max_new_tokens=6))
    assert [row["token_ids"] for row in answers] == [plain.greedy(ids, 6) for ids in prompts]
    vectors = torch.tensor([row["embedding"] for row in predict(trainer, module, Embed())])
    want = torch.stack([plain.embedding(ids) for ids in prompts])
    torch.testing.assert_close(vectors, want, atol=1e-5, rtol=1e-5)
    # Experts and dense layers, all of them packed.
    for layer in find_moe_layers(module.model):
        assert layer.experts.down_proj.untyped_storage().nbytes() == 4
    assert not any(type(m) is torch.nn.Linear for m in module.model.modules())
    assert any(type(m) is PackedLinear for m in module.model.modules())


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("backend", TOLERANCES)
def test_every_backend_predicts_as_transformers(
    backend, family, family_checkpoint, plain_transformers, trainer
):
    path = family_checkpoint(family)
    plain, module = plain_transformers(path), module_of(path, backend)
    got, want = logprobs(predict(trainer, module)), plain_logprobs(plain, module)
    assert got == pytest.approx(want, abs=TOLERANCES[backend])
    assert (got == pytest.approx(want, abs=1e-4)) == (backend in EXACT)
    answers = predict(trainer, module, Generate(max_new_tokens=6))
    if backend in EXACT:
        prompts = [module.tokenizer(prompt).input_ids for prompt in PROMPTS]
        assert [row["token_ids"] for row in answers] == [plain.greedy(ids, 6) for ids in prompts]
    assert all("error" not in row for row in answers)


@pytest.mark.parametrize("backend", ["auto", "cpu_half"])
@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("bf16-mixed", torch.float32),
        ("bf16-true", torch.bfloat16),
        ("16-true", torch.float16),
    ],
)
def test_predict_in_every_precision_of_the_trainer(
    precision, dtype, backend, family_checkpoint, plain_transformers, tmp_path
):
    path = family_checkpoint("qwen3_moe")
    module = module_of(path, backend)
    rows = predict(quiet_trainer(tmp_path, precision=precision), module)
    # bfloat16 has 8 bits; sums of up to 30 log-probabilities of about -6.
    want = plain_logprobs(plain_transformers(path), module)
    assert logprobs(rows) == pytest.approx(want, abs=1.0)
    # Loaded in that dtype: converted later, what was packed would have its memory again.
    is_packed = backend == "cpu_half" or OneDnnWeights.why_not(torch.zeros(1, dtype=dtype)) is None
    for layer in find_moe_layers(module.model):
        weight = layer.experts.down_proj
        assert weight.dtype == dtype
        assert (weight.untyped_storage().nbytes() == dtype.itemsize) == is_packed


@pytest.mark.parametrize(
    ("precision", "dtype"), [("64-true", "auto"), ("bf16-true", "float32"), ("16-true", "bfloat16")]
)
def test_a_precision_for_another_dtype_is_refused(precision, dtype, family_checkpoint, tmp_path):
    module = MoELightningModule(str(family_checkpoint("qwen3_moe")), dtype=dtype)
    with pytest.raises(UsageError, match=rf"precision {precision}.*dtype {dtype}"):
        predict(quiet_trainer(tmp_path, precision=precision), module)


# Then training, and predicting again.


class Weights(L.Callback):
    """What a module's parameters and gradients are when training begins."""

    def on_fit_start(self, trainer, module):
        self.start = {n: p.detach().clone() for n, p in module.model.named_parameters()}

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.without_gradient = [n for n, p in module.model.named_parameters() if p.grad is None]


@pytest.mark.parametrize("backend", ["auto", "grouped_mm"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_predict_fit_predict(
    family, backend, family_checkpoint, plain_transformers, trainer, tmp_path
):
    path = family_checkpoint(family)
    module, weights = module_of(path, backend), Weights()
    before = predict(trainer, module)
    quiet_trainer(tmp_path, max_steps=2, callbacks=[weights]).fit(module, training_batches())
    # It began with the checkpoint's weights, bitwise, and trained all of them.
    fresh = module_of(path)
    fresh.configure_model()
    assert_same_tensors(weights.start, dict(fresh.model.named_parameters()))
    assert weights.without_gradient == []

    after = predict(trainer, module)
    module.export(tmp_path / "trained")
    want = plain_logprobs(plain_transformers(tmp_path / "trained"), module)
    assert logprobs(after) == pytest.approx(want, abs=1e-4)
    assert logprobs(after) != pytest.approx(logprobs(before), abs=1.0)


def test_fit_after_predict_is_as_fit_alone(family_checkpoint, trainer, tmp_path):
    path = family_checkpoint("qwen3_moe")
    alone, after = module_of(path), module_of(path)
    predict(trainer, after)
    for module in (alone, after):
        quiet_trainer(tmp_path, max_steps=3).fit(module, training_batches())
    assert_same_tensors(after.state_dict(), alone.state_dict())


def test_validate_after_predict_gives_the_loss_of_validate_alone(family_checkpoint, trainer):
    path = family_checkpoint("qwen3_moe")
    losses = []
    for is_first in (True, False):
        module = module_of(path)
        if not is_first:
            predict(trainer, module)
        (metrics,) = trainer.validate(module, training_batches(), verbose=False)
        losses.append(metrics["val_loss"])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.parametrize("backend", ["cpu_half", "cpu_int8"])
def test_fit_after_predict_is_refused_where_the_weights_are_lost(
    backend, family_checkpoint, trainer, tmp_path
):
    module = module_of(family_checkpoint("qwen3_moe"), backend)
    before = predict(trainer, module)
    with pytest.raises(UsageError, match=rf"experts_backend={backend}.*neither trained"):
        quiet_trainer(tmp_path, max_steps=1).fit(module, training_batches())
    assert predict(trainer, module) == before  # it still predicts


@pytest.mark.parametrize("backend", ["cpu_half", "cpu_int8"])
def test_fit_and_then_predict_works_where_the_weights_are_lost(
    backend, family_checkpoint, plain_transformers, trainer, tmp_path
):
    module = module_of(family_checkpoint("qwen3_moe"), backend)
    quiet_trainer(tmp_path, max_steps=2).fit(module, training_batches())
    module.export(tmp_path / "trained")
    want = plain_logprobs(plain_transformers(tmp_path / "trained"), module)
    got = logprobs(predict(trainer, module))
    assert got == pytest.approx(want, abs=TOLERANCES[backend])


# Checkpoints.


@pytest.fixture(scope="module")
def trained(family_checkpoint, plain_transformers, tmp_path_factory):
    """A Lightning checkpoint, and the answers of unmodified transformers with its weights."""
    directory = tmp_path_factory.mktemp("trained")
    module = module_of(family_checkpoint("qwen3_moe"))
    trainer = quiet_trainer(directory, max_steps=2)
    trainer.fit(module, training_batches())
    trainer.save_checkpoint(directory / "trained.ckpt")
    module.export(directory / "exported")
    plain = plain_transformers(directory / "exported")
    return directory / "trained.ckpt", plain_logprobs(plain, module)


@pytest.mark.parametrize("was_used", [False, True])
@pytest.mark.parametrize("backend", ["auto", "grouped_mm", "cpu_half", "cpu_int8"])
def test_predict_with_the_weights_of_a_training_checkpoint(
    backend, was_used, trained, family_checkpoint, trainer
):
    ckpt_path, want = trained
    module = module_of(family_checkpoint("qwen3_moe"), backend)
    if was_used:  # packed weights make room
        old = logprobs(predict(trainer, module))
        assert old != pytest.approx(want, abs=1.0)
    got = logprobs(predict(trainer, module, ckpt_path=ckpt_path))
    assert got == pytest.approx(want, abs=TOLERANCES[backend])
    assert logprobs(predict(trainer, module)) == got


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "granitemoe"])
def test_an_export_after_predict_is_the_checkpoint(family, family_checkpoint, trainer, tmp_path):
    path = family_checkpoint(family)
    module = module_of(path)
    before = predict(trainer, module)
    module.export(tmp_path / "exported")
    assert_same_tensors(weights_on_disk(tmp_path / "exported"), weights_on_disk(path))
    assert predict(trainer, module) == before


@pytest.mark.parametrize("backend", ["cpu_half", "cpu_int8"])
def test_an_export_after_predict_is_refused_where_the_weights_are_lost(
    backend, family_checkpoint, trainer, tmp_path
):
    module = module_of(family_checkpoint("qwen3_moe"), backend)
    predict(trainer, module)
    with pytest.raises(UsageError, match=rf"experts_backend={backend}.*nor saved"):
        module.export(tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_the_state_dict_after_predict_holds_the_weights(family_checkpoint, trainer):
    module, fresh = (module_of(family_checkpoint("deepseek_v3")) for _ in range(2))
    fresh.configure_model()
    before = predict(trainer, module)
    assert_same_tensors(module.state_dict(), fresh.state_dict())
    assert predict(trainer, module) == before
