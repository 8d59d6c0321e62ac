"""OneProcessStrategy: one process runs the model; some of its experts may be elsewhere."""

from typing import Any, TypeVar

from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor
from typing_extensions import override

from moe_lightning.errors import UsageError
from moe_lightning.strategies.hosting import HostingOptions
from moe_lightning.strategies.moe_strategy import MoEStrategy

T = TypeVar("T")


class OneProcessStrategy(MoEStrategy, ParallelStrategy):
    """What strategies for inference with one process that runs the model have in common."""

    def check_is_inference(self, options: HostingOptions) -> None:
        """Refuse to train, and to run adapters.

        Raises:
            UsageError: If the model is going to be trained, or has adapters.
        """
        if options.is_training:
            raise UsageError(
                f"the strategy {self.strategy_name} is for inference and does not train. For fit, "
                "use --trainer.strategy auto, ddp, moe_fsdp or moe_ep."
            )
        if options.adaptation is not None:
            raise UsageError(
                f"the strategy {self.strategy_name} places the checkpoint's own experts, without "
                "adapters (--model.lora). Merge them first (PEFT's merge_and_unload, on what "
                "python -m moe_lightning export writes), or use --trainer.strategy auto, moe_fsdp "
                "or moe_ep."
            )

    @override
    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        self.check_ckpt_path()

    @override
    def check_ckpt_path(self) -> None:
        raise UsageError(
            f"--ckpt_path does not work with the strategy {self.strategy_name}, whose experts are "
            "not all in one model. Write the checkpoint as a Hugging Face directory first (python "
            "-m moe_lightning export), and give that as --model.checkpoint."
        )

    # Nothing to exchange.

    @override
    def model_to_device(self) -> None:
        """Weights went straight to their devices; an earlier run's teardown has moved home's."""
        assert self.lightning_module is not None, "connect comes first"
        self.lightning_module.to(self.root_device)

    @property
    @override
    def global_rank(self) -> int:
        return 0

    @property
    @override
    def local_rank(self) -> int:
        return 0

    @property
    @override
    def node_rank(self) -> int:
        return 0

    @property
    @override
    def world_size(self) -> int:
        return 1

    @property
    @override
    def is_global_zero(self) -> bool:
        return True

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": 1, "rank": 0}  # Lightning counts the trainer's devices

    @override
    def reduce(self, tensor: Tensor | Any, *args: Any, **kwargs: Any) -> Tensor | Any:
        return tensor

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        return tensor

    @override
    def barrier(self, name: str | None = None) -> None:
        pass

    @override
    def broadcast(self, obj: T, src: int = 0) -> T:
        return obj
