"""What every guide is: a module that gives each visual token of a request an importance."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from pgp_lightning.vlm.request import Request

__all__ = ["Guide", "Remember", "evaluating"]


class Guide(nn.Module, ABC):
    """Scores visual tokens by how much they matter for a question."""

    @abstractmethod
    def forward(self, request: Request) -> Tensor:
        """Return the importance (B, M) in float32, tile-raster order, -inf on padding."""


class Remember(Guide):
    """Asks a guide once for a request and gives the same importance to whoever asks about that request again.

    For comparisons, in which several budgets share a guide: what it remembers belongs to one request object, so a
    guide that is still being trained does not go in here.

    Args:
        guide: asked once.
    """

    def __init__(self, guide: Guide) -> None:
        super().__init__()
        self.guide = guide
        self._request: Request | None = None
        self._importance: Tensor | None = None

    def forward(self, request: Request) -> Tensor:
        """Return the importance (B, M) in float32, -inf on padding."""
        if self._importance is None or request is not self._request:
            self._request, self._importance = request, self.guide(request)
        return self._importance


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Hold a module in evaluation mode: dropout, of an adapter say, would make scores random."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
