"""What `pgp doctor` has to say: the outcome of one check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding", "failed"]


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    state: Literal["ok", "warn", "fail"]
    what: str
    detail: str

    def __str__(self) -> str:
        return f"{self.state:<4}  {self.what:<12}  {self.detail}"


def failed(what: str, error: object) -> Finding:
    """Return an error as a finding of one line."""
    return Finding("fail", what, " ".join(str(error).split()))
