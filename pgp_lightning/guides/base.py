"""What every guide is: a module that gives each visual token of a request an importance."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from pgp_lightning.vlm.request import Request

__all__ = ["Guide"]


class Guide(nn.Module, ABC):
    """Scores visual tokens by how much they matter for a question."""

    @abstractmethod
    def forward(self, request: Request) -> Tensor:
        """Return the importance (B, M) in float32, tile-raster order, -inf on padding."""
