"""What `pgp probe` prints: measurements, verdict and advice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pgp_lightning.evaluation.scoring import Interval
from pgp_lightning.evaluation.text import as_json, interval, percent

__all__ = ["RATIOS", "Findings", "Recalls", "verdict"]

RATIOS = (0.05, 0.11, 0.20)
# Verdicts: between what guides with and without the question in their V' were measured to have (see probe.py).
CARRIES_GAP = 0.1  # least lower end of the interval of (own minus another question's) recall at 5 %
CARRIES_INTERACTION = 0.1  # least share of interaction, where no truth is known

Recalls = dict[str, dict[str, Interval]]


@dataclass(frozen=True)
class Findings:
    """What was measured; shares and recalls are between 0 and 1, intervals are 95 % over images."""

    guide: str
    artefact: bool
    base: str
    device: str
    dtype: str
    data: str
    images: int
    questions: int
    left_out: dict[str, int]
    shares: dict[str, float]
    """Token, question and interaction: means over images."""
    recalls: Recalls
    """"probe", "another question", "difference", "random" and, of an artefact, "scores", "scores, another question";
    each by keep ratio. Empty where the truth is not known."""
    overlap: dict[str, Interval]
    """Jaccard index between two questions of an image: of an artefact's top 5 % and of the truth, where there are."""
    carries: bool
    notes: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Return tables, verdict and advice as aligned text."""
        kind = "guide artefact" if self.artefact else "base model"
        out = "".join(f"; left out: {count} {why}" for why, count in self.left_out.items() if count)
        lines = [
            f"{kind:<16}{self.guide}, {self.dtype} on {self.device}",
            f"{'data':<16}{self.data}: {self.questions} questions about {self.images} images{out}",
            "",
            *_aligned([["variance of V'", *self.shares], ["share, %", *map(percent, self.shares.values())]]),
        ]
        if self.recalls:
            rows = [[name, *(interval(value, name == "difference") for value in of.values())]
                    for name, of in self.recalls.items()]  # fmt: skip
            lines += ["", *_aligned([["recall, %", *(f"at {100 * ratio:g} %" for ratio in RATIOS)], *rows])]
        if self.overlap:
            rows = [[name, interval(value)] for name, value in self.overlap.items()]
            lines += ["", *_aligned([["overlap of two questions, %", "Jaccard"], *rows])]
        return "\n".join([*lines, "", *self.notes])

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON has it."""
        return {name: as_json(value) for name, value in vars(self).items()}


def verdict(interaction: float, recalls: Recalls) -> tuple[bool, list[str]]:
    """Say whether V' carry the question, from recalls where the truth is known, else from the interaction."""
    if recalls:
        gap = recalls["difference"][f"{RATIOS[0]:g}"]
        carries = gap.low >= CARRIES_GAP
        reason = (
            f"reading V' of the question itself a probe recalls {100 * gap.mean:.1f} points more at 5 % than reading "
            f"V' of another question of the image; at least {100 * CARRIES_GAP:g} are asked of the interval's lower end"
        )
    else:
        carries = interaction >= CARRIES_INTERACTION
        reason = (
            f"{percent(interaction)} % of the variance of V' is what the question changes token by token, "
            f"{100 * CARRIES_INTERACTION:g} % are asked for; the relevant tokens are not known (or of too few images), "
            "so that whether it changes the right tokens was not measured"
        )
    if carries:
        return True, [f"The visual states carry the question: {reason}."]
    return False, [
        f"The visual states do not carry the question: {reason}.",
        "PGP would learn which tokens show some object, whatever is asked. Take another guide, or train this one first "
        "to answer where only its visual tokens see the question (docs/embedded.md). PGP's own question-blind "
        "reconstruction (model.question_blind) was not enough in 800 steps (docs/reproduction.md).",
    ]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of cells as lines, the first column left and the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
