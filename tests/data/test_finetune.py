"""TextData in a real Trainer: order, ranks, errors, and going on where a run stopped."""

import json
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from moe_lightning.data.finetune import TextData
from moe_lightning.demo.random_tokenizer import make_tokenizer
from moe_lightning.errors import UsageError

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Recorder(LightningModule):
    """Keeps the batches it gets; raises once before a given step."""

    def __init__(self, fail_at: int | None = None, vocab_size: int = 300):
        super().__init__()
        self.tokenizer = make_tokenizer(300, max_positions=64)
        self.encoder = SimpleNamespace(max_positions=64, vocab_size=vocab_size)
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.fail_at = fail_at
        self.train_batches: list[tuple[int, int, list]] = []
        self.val_batches: list[dict] = []

    def training_step(self, batch, batch_idx):
        if self.fail_at == self.global_step:
            raise KeyboardInterrupt
        self.train_batches.append((self.current_epoch, batch_idx, batch["input_ids"].tolist()))
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.val_batches.append({name: values.tolist() for name, values in batch.items()})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_trainer(root, **options) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    checkpointing = {"enable_checkpointing": bool(options.get("callbacks"))}
    quiet |= {"accelerator": "cpu", "devices": 1, "default_root_dir": root}
    return Trainer(**(quiet | checkpointing | options))


@pytest.fixture
def train_file(tmp_path):
    """Twenty-six documents of eight tokens: seven different letters and the end."""
    path = tmp_path / "train.jsonl"
    rows = ({"text": c.upper() + "0123456"[i % 7] + "!?.,;"} for i, c in enumerate(LETTERS))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def first_letters(batches) -> list[str]:
    tokenizer = make_tokenizer(300, max_positions=64)
    return [tokenizer.decode(row[:1]) for _, _, rows in batches for row in rows]


def test_every_epoch_has_all_documents_in_another_order(tmp_path, train_file):
    module = Recorder()
    data = TextData(train_file, sequence_length=8, batch_size=2)
    make_trainer(tmp_path, max_epochs=2).fit(module, data)
    assert [(epoch, i) for epoch, i, _ in module.train_batches] == [
        (epoch, i) for epoch in range(2) for i in range(13)
    ]
    letters = first_letters(module.train_batches)
    assert sorted(letters[:26]) == sorted(letters[26:]) == list(LETTERS.upper())
    assert letters[:26] != letters[26:]
    again = Recorder()
    data = TextData(train_file, sequence_length=8, batch_size=2)
    make_trainer(tmp_path, max_epochs=2).fit(again, data)
    assert again.train_batches == module.train_batches
    other = Recorder()
    data = TextData(train_file, sequence_length=8, batch_size=2, seed=1)
    make_trainer(tmp_path, max_epochs=2).fit(other, data)
    assert first_letters(other.train_batches) != letters


class SaveAtEnd(Callback):
    def on_train_end(self, trainer, pl_module):
        trainer.save_checkpoint(trainer.default_root_dir + "/stopped.ckpt")


class SaveWhenInterrupted(Callback):
    def on_exception(self, trainer, pl_module, exception):
        trainer.save_checkpoint(trainer.default_root_dir + "/stopped.ckpt")


@pytest.mark.parametrize(
    ("num_steps", "num_workers"), [(1, 0), (4, 0), (4, 2), (5, 0), (6, 0), (8, 0), (10, 0)]
)
def test_run_stopped_by_max_steps_goes_on_with_the_same_batches(
    tmp_path, train_file, num_steps, num_workers
):
    """Five steps an epoch: the run stops within an epoch, at its end, or one step after."""
    options = {"sequence_length": 8, "batch_size": 5, "num_workers": num_workers}
    whole = Recorder()
    make_trainer(tmp_path, max_steps=12).fit(whole, TextData(train_file, **options))
    first, second = Recorder(), Recorder()
    make_trainer(tmp_path, max_steps=num_steps, callbacks=[SaveAtEnd()]).fit(
        first, TextData(train_file, **options)
    )
    make_trainer(tmp_path, max_steps=12).fit(
        second, TextData(train_file, **options), ckpt_path=str(tmp_path / "stopped.ckpt")
    )
    assert len(first.train_batches) == num_steps
    # The epoch is not compared: Lightning 2.6.6 is one ahead after a stop by max_steps.
    batches = [batch[1:] for batch in first.train_batches + second.train_batches]
    assert batches == [batch[1:] for batch in whole.train_batches]


@pytest.mark.parametrize("every", [3, 5])
def test_every_checkpoint_of_a_run_by_epochs_goes_on_with_the_same_batches(
    tmp_path, train_file, every
):
    options = {"val": train_file, "sequence_length": 8, "batch_size": 5}
    whole = Recorder()
    saver = ModelCheckpoint(
        tmp_path / "ckpt", filename="{step}", every_n_train_steps=every, save_top_k=-1
    )
    make_trainer(tmp_path, max_epochs=3, callbacks=[saver]).fit(
        whole, TextData(train_file, **options)
    )
    for step in range(every, 15, every):
        resumed = Recorder()
        make_trainer(tmp_path, max_epochs=3).fit(
            resumed,
            TextData(train_file, **options),
            ckpt_path=str(tmp_path / "ckpt" / f"step={step}.ckpt"),
        )
        assert resumed.train_batches == whole.train_batches[step:]


def test_batch_that_an_interrupt_broke_off_is_done_again(tmp_path, train_file):
    options = {"sequence_length": 8, "batch_size": 5}
    whole, broken, resumed = Recorder(), Recorder(fail_at=7), Recorder()
    make_trainer(tmp_path, max_epochs=3).fit(whole, TextData(train_file, **options))
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        make_trainer(tmp_path, max_epochs=3, callbacks=[SaveWhenInterrupted()]).fit(
            broken, TextData(train_file, **options)
        )
    make_trainer(tmp_path, max_epochs=3).fit(
        resumed, TextData(train_file, **options), ckpt_path=str(tmp_path / "stopped.ckpt")
    )
    assert len(broken.train_batches) == 7
    assert broken.train_batches + resumed.train_batches == whole.train_batches


def test_limited_epochs_go_on_through_the_data(tmp_path, train_file):
    module = Recorder()
    data = TextData(train_file, sequence_length=8, batch_size=2)
    make_trainer(tmp_path, max_epochs=3, limit_train_batches=5).fit(module, data)
    letters = first_letters(module.train_batches)
    assert sorted(letters[:26]) == list(LETTERS.upper())
    assert len(letters) == 30


def test_resuming_with_other_data_warns(tmp_path, train_file):
    make_trainer(tmp_path, max_steps=2, callbacks=[SaveAtEnd()]).fit(
        Recorder(), TextData(train_file, sequence_length=8, batch_size=5)
    )
    with pytest.warns(UserWarning, match=r"not that of the checkpoint \(batch_size 5 -> 4\)"):
        make_trainer(tmp_path, max_steps=3).fit(
            Recorder(),
            TextData(train_file, sequence_length=8, batch_size=4),
            ckpt_path=str(tmp_path / "stopped.ckpt"),
        )


def test_validation_sees_every_target_once(tmp_path, train_file):
    module = Recorder()
    data = TextData(train_file, val=train_file, sequence_length=8, batch_size=4)
    make_trainer(tmp_path).validate(module, data)
    assert [len(batch["labels"]) for batch in module.val_batches] == [4] * 7
    labels = [row for batch in module.val_batches for row in batch["labels"]]
    assert [sum(label != -100 for label in row) for row in labels] == [7] * 26 + [0] * 2
    assert [p.name for p in tmp_path.glob("data_cache/*/meta.json")] == ["meta.json"]


@pytest.mark.parametrize("num_ranks", [2, 3, 5])
def test_ranks_share_the_sequences_out(tmp_path, train_file, num_ranks):
    class Part(Recorder):
        """Asks for the loaders of every rank."""

        def on_train_start(self):
            data = self.trainer.datamodule
            self.parts, self.val_parts = [], []
            for rank in range(num_ranks):
                data._data_rank = lambda rank=rank: (rank, num_ranks)
                self.parts.append(list(data.train_dataloader()))
                self.val_parts.append(list(data.val_dataloader()))

    module = Part()
    data = TextData(train_file, val=train_file, sequence_length=8, batch_size=2)
    make_trainer(tmp_path, max_steps=1).fit(module, data)
    assert {len(part) for part in module.parts} == {26 // (2 * num_ranks)}
    rows = [tuple(row.tolist()) for part in module.parts for b in part for row in b["input_ids"]]
    assert len(set(rows)) == len(rows) == 26 // (2 * num_ranks) * 2 * num_ranks
    assert {len(part) for part in module.val_parts} == {-(-26 // (2 * num_ranks))}
    labels = torch.cat([b["labels"] for part in module.val_parts for b in part])
    assert int((labels != -100).sum()) == 26 * 7
    # What a rank gets to evaluate differs by at most one sequence.
    counts = [sum(int((b["labels"] != -100).sum()) for b in part) for part in module.val_parts]
    assert max(counts) - min(counts) <= 7


class WritesItsBatches(Recorder):
    def __init__(self, root):
        super().__init__()
        self.root = root

    def on_fit_end(self):
        torch.save(self.train_batches, f"{self.root}/rank{self.global_rank}.pt")


def test_two_processes_see_what_one_sees(tmp_path, train_file):
    one = Recorder()
    make_trainer(tmp_path, max_epochs=2).fit(
        one, TextData(train_file, sequence_length=8, batch_size=6)
    )
    make_trainer(tmp_path, max_epochs=2, devices=2, strategy="ddp_spawn").fit(
        WritesItsBatches(str(tmp_path)), TextData(train_file, sequence_length=8, batch_size=3)
    )
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for (epoch, i, rows), *parts in zip(one.train_batches, *ranks, strict=True):
        assert [(part[0], part[1]) for part in parts] == [(epoch, i)] * 2
        assert [row for pair in zip(*(p[2] for p in parts), strict=True) for row in pair] == rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 65}, "sequence_length is 65, but the model has 64 positions"),
        ({"sequence_length": 1}, "--data.sequence_length is 1: give 2 or more"),
        ({"batch_size": 0}, "--data.batch_size is 0: give 1 or more"),
        (
            {"sequence_length": 8, "batch_size": 27},
            "26 sequences of up to 8 tokens, fewer than one",
        ),
        ({"val": "none.txt", "sequence_length": 8}, "none.txt does not exist"),
    ],
)
def test_options_that_cannot_work_are_refused(tmp_path, train_file, options, message):
    with pytest.raises(UsageError, match=message):
        make_trainer(tmp_path, max_steps=1).fit(Recorder(), TextData(train_file, **options))


def test_validate_without_a_held_out_file_is_refused(tmp_path, train_file):
    with pytest.raises(UsageError, match=r"--data\.val is not given"):
        make_trainer(tmp_path).validate(Recorder(), TextData(train_file, sequence_length=8))


def test_predict_is_refused(train_file):
    with pytest.raises(UsageError, match="only serves fit and validate, not predict"):
        TextData(train_file).setup("predict")
