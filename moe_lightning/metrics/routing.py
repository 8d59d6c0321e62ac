"""The metrics as classes: they collect over batches, and over ranks when they are computed."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from moe_lightning.metrics.functional import (
    ImbalanceKind,
    expert_coactivation,
    expert_load,
    load_imbalance,
    router_entropy,
)


class _Counts(Metric):
    """Counts of one layer, added up over batches and ranks."""

    full_state_update = False
    is_differentiable = False
    counts: Tensor

    def __init__(self, num_experts: int, shape: tuple[int, ...], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_experts < 1:
            raise ValueError(f"num_experts={num_experts}, but there must be one at least.")
        self.num_experts = num_experts
        zeros = torch.zeros(shape, dtype=torch.int64)
        self.add_state("counts", default=zeros, dist_reduce_fx="sum")

    @override
    def update(self, index_TK: Tensor) -> None:
        """Count a batch.

        Args:
            index_TK: Chosen experts, ``[T, K]``; numbers that are no expert are not counted.
        """
        self.counts = self.counts + self._count(index_TK)

    @override
    def compute(self) -> Tensor:
        """What was counted, on all ranks."""
        return self.counts

    @abstractmethod
    def _count(self, index_TK: Tensor) -> Tensor:
        """The counts of one batch."""


class ExpertLoad(_Counts):
    """Rows of every expert of one layer, ``[E]`` int64; see :func:`expert_load`.

    Args:
        num_experts: E.
        kwargs: Those of every torchmetrics metric.
    """

    def __init__(self, num_experts: int, **kwargs: Any) -> None:
        super().__init__(num_experts, (num_experts,), **kwargs)

    @override
    def _count(self, index_TK: Tensor) -> Tensor:
        return expert_load(index_TK, self.num_experts)

    @override
    def plot(self, val: Tensor | None = None, ax: Any = None) -> Any:
        """Draw a bar for each expert, and the mean.

        Args:
            val: What :meth:`compute` gave; None computes it.
            ax: Matplotlib axes to draw on; None makes a figure.

        Returns:
            The figure and the axes.
        """
        load_E = (self.compute() if val is None else val).cpu()
        figure, axes = _axes(ax)
        axes.bar(range(len(load_E)), load_E.tolist(), width=0.9)
        mean = float(load_E.double().mean())
        axes.axhline(mean, color="black", linewidth=0.8, label=f"mean {mean:,.0f}")
        axes.set(xlabel="expert", ylabel="rows", title="Rows of each expert")
        axes.legend()
        return figure, axes


class LoadImbalance(ExpertLoad):
    """How unevenly rows are spread over experts; see :func:`load_imbalance`.

    Args:
        num_experts: E.
        kind: ``max_over_mean`` or ``cv``.
        kwargs: Those of every torchmetrics metric.
    """

    higher_is_better = False

    def __init__(
        self, num_experts: int, kind: ImbalanceKind = "max_over_mean", **kwargs: Any
    ) -> None:
        super().__init__(num_experts, **kwargs)
        self.kind: ImbalanceKind = kind
        load_imbalance(torch.ones(1), kind)  # refuses an unknown kind now

    @override
    def compute(self) -> Tensor:
        """The imbalance over all that was counted, on all ranks."""
        return load_imbalance(self.counts, self.kind)

    @override
    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw values; torchmetrics' own plot, whose arguments these are."""
        return self._plot(val, ax)


class RouterEntropy(ExpertLoad):
    """Entropy of the experts' shares of the rows; see :func:`router_entropy`.

    Args:
        num_experts: E.
        normalise: Whether 1 is even and 0 is one expert for all; otherwise it is in nats.
        kwargs: Those of every torchmetrics metric.
    """

    higher_is_better = True

    def __init__(self, num_experts: int, *, normalise: bool = True, **kwargs: Any) -> None:
        super().__init__(num_experts, **kwargs)
        self.normalise = normalise

    @override
    def compute(self) -> Tensor:
        """The entropy over all that was counted, on all ranks."""
        return router_entropy(self.counts, normalise=self.normalise)

    @override
    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw values; torchmetrics' own plot, whose arguments these are."""
        return self._plot(val, ax)


class ExpertCoactivation(_Counts):
    """Tokens that chose both of two experts of one layer, ``[E, E]`` int64; see
    :func:`expert_coactivation`.

    Args:
        num_experts: E.
        kwargs: Those of every torchmetrics metric.
    """

    def __init__(self, num_experts: int, **kwargs: Any) -> None:
        super().__init__(num_experts, (num_experts, num_experts), **kwargs)

    @override
    def _count(self, index_TK: Tensor) -> Tensor:
        return expert_coactivation(index_TK, self.num_experts)

    @override
    def plot(self, val: Tensor | None = None, ax: Any = None) -> Any:
        """Draw a heat map of the share of an expert's tokens that had the other one too.

        Args:
            val: What :meth:`compute` gave; None computes it.
            ax: Matplotlib axes to draw on; None makes a figure.

        Returns:
            The figure and the axes.
        """
        both_EE = (self.compute() if val is None else val).cpu().double()
        share_EE = both_EE / both_EE.diagonal().clamp(min=1)[:, None]
        share_EE.fill_diagonal_(float("nan"))
        figure, axes = _axes(ax)
        image = axes.imshow(100 * share_EE.numpy(), cmap="viridis")
        axes.set(xlabel="other expert", ylabel="expert", title="Experts chosen together")
        figure.colorbar(image, ax=axes, label="% of the expert's tokens")
        return figure, axes


def _axes(ax: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    if ax is not None:
        return ax.get_figure(), ax
    figure = Figure(layout="constrained")
    return figure, figure.subplots()
