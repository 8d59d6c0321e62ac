"""The data module of `fit` and `validate`: a training file as batches of token sequences.

prepare_data (one process a node):  file ─ documents ─▶ targets ─▶ <root>/data_cache/<key>/*.bin
setup (every process):              memory maps ─▶ plan of sequences ─▶ loaders
"""

from pathlib import Path
from typing import Any, Literal, cast

from lightning.pytorch import LightningDataModule
from typing_extensions import override

from moe_lightning.data.documents import DocumentFile, TrainingFormat
from moe_lightning.data.packing import TrainingSequences
from moe_lightning.data.resumable import TrainLoader, ValidationLoader
from moe_lightning.data.token_cache import TokenCache, cache_key, write_cache
from moe_lightning.demo import finetune_path
from moe_lightning.errors import UsageError

Part = Literal["train", "val"]


class TextData(LightningDataModule):
    """Text or conversations to fine-tune on, as sequences of tokens.

    Args:
        train: The training file: JSON Lines of {"text"}, {"prompt", "answer"} or {"messages"} (only
            answers and the assistant's messages are learnt), or a text file whose documents are
            separated by lines that say <|endoftext|>. demo means the small sample that ships with
            the package. validate needs none.
        val: The held-out file, of the same kind; demo means the shipped one, and null that there is
            no validation.
        format: The format of both files; auto goes by the ending of their names.
        sequence_length: The number of tokens of a training sequence; longer documents are cut.
        batch_size: The number of sequences of a step on each rank.
        packing: Whether a sequence holds several documents one after the other, which don't see
            each other. It wastes no computation on padding.
        num_workers: The number of processes on each rank that make batches ahead of time; 0 makes
            them in the training process.
        seed: The seed of the order of the training sequences, which differs in every epoch.
    """

    def __init__(
        self,
        train: str | None = None,
        *,
        val: str | None = None,
        format: TrainingFormat = "auto",
        sequence_length: int = 512,
        batch_size: int = 8,
        packing: bool = True,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("sequence_length", sequence_length, 2),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
        ):
            if value < least:
                raise UsageError(f"--data.{name} is {value}: give {least} or more.")
        self.paths: dict[Part, str | None] = {
            "train": str(finetune_path("train")) if train == "demo" else train,
            "val": str(finetune_path("val")) if val == "demo" else val,
        }
        self.format: TrainingFormat = format
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.packing = packing
        self.num_workers = num_workers
        self.seed = seed
        self.sequences: dict[Part, TrainingSequences] = {}

    @override
    def prepare_data(self) -> None:
        """Tokenise the files that this run needs, unless that has been done before."""
        trainer, module = self._trainer_and_module()
        files = self._files()
        self._check_length(module.encoder.max_positions)
        is_quiet = not trainer.is_global_zero or trainer.progress_bar_callback is None
        for file in files.values():
            write_cache(
                file,
                module.tokenizer,
                self._cache_directory(file),
                vocab_size=module.encoder.vocab_size,
                is_quiet=is_quiet,
            )

    @override
    def setup(self, stage: str) -> None:
        """Map the tokens and plan the sequences of the files that this run needs."""
        if stage not in ("fit", "validate"):
            raise UsageError(
                f"--data TextData only serves fit and validate, not {stage}: use PromptData."
            )
        _, module = self._trainer_and_module()
        self._check_length(module.encoder.max_positions)
        tokenizer = module.tokenizer
        pad_ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        for part, file in self._files().items():
            directory = self._cache_directory(file)
            if not (directory / "meta.json").is_file():
                raise UsageError(
                    f"{directory} is missing on this machine, where the tokens of {file.path} "
                    "should be. The file changed since the start, or the nodes share no disk and "
                    "another one tokenised: start again with the file left alone."
                )
            self.sequences[part] = TrainingSequences(
                TokenCache(directory),
                sequence_length=self.sequence_length,
                packing=self.packing,
                pad_id=next(pad_id for pad_id in pad_ids if pad_id is not None),
            )
            if len(self.sequences[part]) == 0:
                raise UsageError(
                    f"{file.path} has nothing to learn: no document of two tokens or more in it "
                    "has a token with a loss. Give longer documents or answers."
                )

    @override
    def train_dataloader(self) -> TrainLoader:
        """Return the training batches of this rank."""
        trainer, _ = self._trainer_and_module()
        rank, num_ranks = self._data_rank()
        num_sequences = len(self.sequences["train"])
        if num_sequences < self.batch_size * num_ranks:
            raise UsageError(
                f"{self.paths['train']} has {num_sequences:,} sequences of up to "
                f"{self.sequence_length:,} tokens, fewer than one step takes (--data.batch_size "
                f"{self.batch_size} on {num_ranks} ranks): lower --data.batch_size or "
                "--data.sequence_length, or give more text."
            )
        # Lightning 2.6.6 counts epochs wrongly after a run that max_steps stopped (one too many),
        # and `ready` counts a batch that an exception broke off; `total.completed` is right always.
        progress = trainer.fit_loop.epoch_loop.batch_progress
        return TrainLoader(
            self.sequences["train"],
            batch_size=self.batch_size,
            rank=rank,
            num_ranks=num_ranks,
            seed=self.seed,
            num_workers=self.num_workers,
            num_done=lambda: progress.total.completed,
        )

    @override
    def val_dataloader(self) -> ValidationLoader | list[ValidationLoader]:
        """Return the validation batches of this rank; no loader where there is no file."""
        if "val" not in self.sequences:
            return []
        rank, num_ranks = self._data_rank()
        return ValidationLoader(
            self.sequences["val"],
            batch_size=self.batch_size,
            rank=rank,
            num_ranks=num_ranks,
            num_workers=self.num_workers,
        )

    def _check_length(self, max_positions: int | None) -> None:
        if max_positions is not None and self.sequence_length > max_positions:
            raise UsageError(
                f"--data.sequence_length is {self.sequence_length:,}, but the model has "
                f"{max_positions:,} positions: give {max_positions} or less."
            )

    def _trainer_and_module(self) -> tuple[Any, Any]:
        assert self.trainer is not None, "a trainer calls this"
        return self.trainer, cast(Any, self.trainer.lightning_module)

    def _data_rank(self) -> tuple[int, int]:
        """This rank and the number of ranks that get different data (of a mesh, not all do)."""
        trainer, _ = self._trainer_and_module()
        places = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        return places["rank"], places["num_replicas"]

    def _files(self) -> dict[Part, DocumentFile]:
        trainer, _ = self._trainer_and_module()
        is_fit = trainer.state.fn == "fit"
        needed: Part = "train" if is_fit else "val"
        if self.paths[needed] is None:
            raise UsageError(
                "--data.train is not given: fit needs a training file."
                if is_fit
                else "--data.val is not given: validate needs a held-out file."
            )
        parts: tuple[Part, ...] = ("train", "val") if is_fit else ("val",)
        return {
            part: DocumentFile(Path(path), format=self.format)
            for part in parts
            if (path := self.paths[part]) is not None
        }

    def _cache_directory(self, file: DocumentFile) -> Path:
        trainer, module = self._trainer_and_module()
        return Path(trainer.default_root_dir) / "data_cache" / cache_key(file, module.tokenizer)
