"""What the verbs share: a LightningCLI without subcommands."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import ArgumentError, Namespace
from jsonargparse.typing import lazy_instance
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from typing_extensions import override

from moe_lightning.callbacks import CommunicationTime, RoutingBalance, RunReport
from moe_lightning.cli.configs import resolve_configs
from moe_lightning.cli.plain_words import plain_words
from moe_lightning.cli.ranks import settle_ranks
from moe_lightning.cli.strategy_names import offer_all_devices, spell_out_strategies
from moe_lightning.errors import MoELightningError, UsageError
from moe_lightning.extras import with_extra
from moe_lightning.files import write_atomically
from moe_lightning.jobs.storages import is_url
from moe_lightning.modeling.training_checkpoint import check_training_checkpoint, find_sharded
from moe_lightning.module import MoELightningModule
from moe_lightning.strategies import STRATEGIES, MoEStrategy
from moe_lightning.tasks import Generate

REPORTING: tuple[type[L.Callback], ...] = (RoutingBalance, CommunicationTime, RunReport)


class SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the output directory, whatever the logger."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"save_to_log_dir": False}))

    @override
    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        directory = Path(trainer.default_root_dir)
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / "config.yaml", self.parser.dump(self.config, skip_none=False))


def _keep_older_log(path: Path) -> None:
    """CSVLogger begins its file anew; the log of a run that goes on must not be lost."""
    if path.is_file():
        number = len(list(path.parent.glob("metrics-*.csv"))) + 1
        path.rename(path.with_name(f"metrics-{number}.csv"))


def _newest(ckpt_path: str | None, output_dir: Path) -> str | None:
    """What ``last`` stands for: the newest checkpoint of the output directory, if it has one."""
    if ckpt_path != "last":
        return ckpt_path
    newest = output_dir / "checkpoints" / "last.ckpt"
    return str(newest) if newest.is_file() or find_sharded(newest) is not None else None


class MoECLI(LightningCLI):
    """One verb's command line: parses, checks the output directory, and builds module, data and
    trainer.

    Args:
        datamodule_class: The verb's data.
        output_dir: Default of ``--output_dir``.
        callbacks: Callback classes with options, by name of their options; each is told the output
            directory by the parameter named.
        trainer_defaults: Defaults of ``--trainer.*``.
        skip: Parameters of the module that the verb has no use for.
        arguments: The command line after the verb.
    """

    def __init__(
        self,
        *,
        verb: str,
        datamodule_class: type[L.LightningDataModule],
        output_dir: str,
        callbacks: dict[str, tuple[type[L.Callback], str]],
        trainer_defaults: dict[str, Any],
        skip: set[str],
        arguments: Sequence[str],
    ) -> None:
        self._skip: set[str | int] = {*skip}
        self._default_output_dir = output_dir
        self._configurable_callbacks = callbacks
        super().__init__(
            model_class=MoELightningModule,
            datamodule_class=datamodule_class,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults=trainer_defaults,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            run=False,
            parser_kwargs={
                "prog": f"python -m moe_lightning {verb}",
                "exit_on_error": False,
            },
            args=offer_all_devices(spell_out_strategies(resolve_configs(arguments))),
        )

    @override
    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # As in Lightning 2.6.6, which cannot leave out parameters.
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults(
            {f"trainer.{k}": v for k, v in self.trainer_defaults.items() if k != "callbacks"}
        )
        parser.add_class_arguments(
            MoELightningModule, "model", fail_untyped=False, sub_configs=True, skip=self._skip
        )
        parser.add_lightning_class_args(self._datamodule_class, "data")

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--output_dir",
            type=str,
            default=self._default_output_dir,
            help="Everything the run writes goes into this directory, and nowhere else.",
        )
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="A training checkpoint of fit to start from; last is the newest one in "
            "--output_dir, if there is one, so that the same command goes on after a failure. The "
            "default is the weights of --model.checkpoint.",
        )
        parser.add_argument(
            "--report",
            type=bool,
            default=False,
            help="Whether predict and fit count routing and time communication, and write "
            "report.html, a page of the run. The default is not to.",
        )
        parser.link_arguments("output_dir", "trainer.default_root_dir")
        for name, (callback, parameter) in self._configurable_callbacks.items():
            parser.add_lightning_class_args(callback, name)
            parser.link_arguments("output_dir", f"{name}.{parameter}")
        parser.set_defaults({"model.task": lazy_instance(Generate)})

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            message = plain_words(str(error))
            if '"model.task"' in message:
                message += "\nThe tasks are Generate, Score and Embed."
            raise UsageError(f"{message}\nSee all options with --help.") from error

    @override
    def before_instantiate_classes(self) -> None:
        settle_ranks(self.config.trainer)
        if is_url(self.config.output_dir):
            raise UsageError(
                f"--output_dir {self.config.output_dir}: only predict writes to URLs. Choose a "
                "directory."
            )
        directory = Path(self.config.output_dir)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"--output_dir {directory}: cannot be made ({error.strerror})."
            ) from error
        if not os.access(directory, os.W_OK):
            raise UsageError(
                f"--output_dir {directory}: no permission to write there. Choose another directory."
            )
        ckpt_path = self.config.ckpt_path = _newest(self.config.ckpt_path, directory)
        if ckpt_path is not None:
            if not Path(ckpt_path).exists() and find_sharded(Path(ckpt_path)) is None:
                raise UsageError(f"--ckpt_path {ckpt_path}: no such checkpoint.")
            check_training_checkpoint(ckpt_path)

    @override
    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except MoELightningError:
            raise
        except (
            ValueError,
            TypeError,
            ImportError,
            L.fabric.utilities.exceptions.MisconfigurationException,
        ) as error:
            # What options mean together is checked by the classes they go to.
            if "invalid strategy name" in str(error):
                raise UsageError(
                    f"--trainer.strategy {self.config.trainer.strategy}: there is no such "
                    f"strategy. This package's are {', '.join(STRATEGIES)}; of Lightning's, auto "
                    "(one device) and ddp run its models."
                ) from error
            message = plain_words(str(error))
            if isinstance(error, ImportError):
                message = with_extra(message)
            raise UsageError(message) from error
        strategy = self.trainer.strategy
        if self.config.ckpt_path is not None and isinstance(strategy, MoEStrategy):
            strategy.check_ckpt_path()

    @override
    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        if self.config.trainer.logger in (None, True):
            # Lightning's default would write into the working directory, or need TensorBoard.
            _keep_older_log(Path(self.config.output_dir) / "logs" / "metrics.csv")
            kwargs["logger"] = CSVLogger(self.config.output_dir, name="", version="logs")
        return super().instantiate_trainer(**kwargs)

    @override
    def _instantiate_trainer(
        self, config: dict[str, Any], callbacks: list[L.Callback]
    ) -> L.Trainer:
        # Lightning 2.6.6: it refuses callbacks of a kind that its own flags switch off.
        unwanted: tuple[type[L.Callback], ...] = ()
        if config.get("enable_progress_bar") is False or config.get("barebones"):
            unwanted += (ProgressBar,)
        if config.get("enable_checkpointing") is False or config.get("barebones"):
            unwanted += (Checkpoint,)
        defaults = self.trainer_defaults.get("callbacks", [])
        defaults = [c for c in defaults if not isinstance(c, unwanted)]
        if self.config.report:
            given = [*(config.get("callbacks") or []), *callbacks, *defaults]
            kinds = {type(callback) for callback in given}
            # The page comes last: it is made of what the others write.
            defaults += [make() for make in REPORTING if make not in kinds]
        self.trainer_defaults["callbacks"] = defaults
        trainer: L.Trainer = super()._instantiate_trainer(
            config, [c for c in callbacks if not isinstance(c, unwanted)]
        )
        return trainer

    @property
    def options(self) -> Namespace:
        """The parsed options."""
        config: Namespace = self.config
        return config
