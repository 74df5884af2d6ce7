"""Train the embedded pair from nothing and write it into the package.

    python -m pgp_lightning.embedded.build --folder build/embedded

Every stage keeps checkpoints in the folder; the same command continues where it was interrupted. `docs/embedded.md`
has the recipe and the figures of the shipped files.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pgp_lightning.embedded.corpus import Corpus
from pgp_lightning.embedded.language import Answerer, accuracy, make_rows
from pgp_lightning.embedded.pair import build_model, build_processor
from pgp_lightning.embedded.probe import probe_recall
from pgp_lightning.embedded.stages import run_stage, step_rng
from pgp_lightning.embedded.tower import train_tower
from pgp_lightning.embedded.world import TYPES, WORLD_VERSION
from pgp_lightning.vlm.processor import Processor

__all__ = ["main"]

TOWER_STEPS = 7000
SCENES, HELD_OUT = 6000, 512
_UNIFORM = -1.0  # a keep ratio drawn from U(0.05, 1) at every step


@dataclass(frozen=True)
class Phase:
    """A part of a stage.

    Attributes:
        until: where it ends, as a share of the stage.
        keep: share of visual tokens that stay.
        turns: questions of a row at most.
        hard: how much likelier the types of `HARD` are drawn, which look up by glyph or by form.
        scenes: how many scenes it reads.
    """

    until: float
    keep: float
    turns: int
    hard: float = 1.0
    scenes: int = SCENES


@dataclass(frozen=True)
class Recipe:
    """How a language stage is trained.

    Attributes:
        steps: length.
        learning_rate: peak.
        question_first: share of steps with the question before the picture (one question a row).
        blind: share of those in which the answer cannot see the question.
        phases: the curriculum of dropped tokens.
        alignment: weight of the alignment loss, falling to a tenth over the first half.
        ships: the package's model that it leaves; None if it is only where the next stage starts.
    """

    steps: int
    learning_rate: float
    question_first: float
    blind: float
    phases: tuple[Phase, ...]
    alignment: float
    ships: str | None = None


_CURRICULUM = (Phase(0.2, 0.1, 4), Phase(0.55, 0.3, 8), Phase(1.0, _UNIFORM, 8))
# Lookups are learnt among few objects, with few distractors and on few scenes first, and among all of them later.
_ANSWER_CURRICULUM = (Phase(0.22, 0.1, 3, scenes=1500), Phase(0.6, 0.3, 8), Phase(1.0, _UNIFORM, 8))
_LOOKUP_CURRICULUM = (
    Phase(0.35, 0.1, 3, hard=4.0, scenes=1500),
    Phase(0.75, 0.3, 8, hard=3.0),
    Phase(1.0, _UNIFORM, 8, hard=2.0),
)
_BLIND_CURRICULUM = (
    Phase(0.3, 0.1, 4, hard=3.0),
    Phase(0.8, 0.3, 8, hard=3.0),
    Phase(1.0, _UNIFORM, 8, hard=3.0),
)
HARD = ("color_of_char", "bar")  # the types that look up by glyph
RECIPES = {
    "answer_model": {
        "answer_model": Recipe(4500, 2e-3, 0.0, 0.0, _ANSWER_CURRICULUM, 0.3),
        "answer_model_lookups": Recipe(3000, 1.5e-3, 0.0, 0.0, _LOOKUP_CURRICULUM, 0.1, ships="answer_model"),
    },
    "guide": {
        "guide_before_question_blind": Recipe(
            3000, 2e-3, 0.25, 0.0, _CURRICULUM, 0.3, ships="guide_before_question_blind"
        ),
        "guide": Recipe(3500, 1.5e-3, 0.75, 0.7, _BLIND_CURRICULUM, 0.03, ships="guide"),
    },
}


def train_language(
    stage: str,
    recipe: Recipe,
    answerer: Answerer,
    corpora: tuple[Corpus, Corpus],
    processor: Processor,
    folder: Path,
    seed: int,
) -> bool:
    """Train one language stage in place on the first corpus, with reports on the second; say if it was unfinished."""
    corpus, held_out = corpora
    end = processor.encode("<|im_end|>")[0]

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = step_rng(seed, stage, step)
        share = step / recipe.steps
        phase = next(phase for phase in recipe.phases if share < phase.until)
        question_first = bool(rng.random() < recipe.question_first)
        blind = question_first and bool(rng.random() < recipe.blind)
        keep, turns = phase.keep, phase.turns
        if keep == _UNIFORM:
            keep, turns = float(rng.uniform(0.05, 1.0)), int(rng.choice([1, 2, 4, 8]))
        # Rows are short when few tokens stay or few questions are asked; more of them fill the step.
        size = int(16 * min(4.0, keep**-0.6)) if question_first else int(16 * (8 / turns) ** 0.5)
        rows = make_rows(
            corpus,
            rng.integers(0, min(phase.scenes, len(corpus)), size),
            processor,
            rng,
            order="question_first" if question_first else "image_first",
            turns=1 if question_first else turns,
            keep=keep,
            weights={TYPES.index(kind): phase.hard for kind in HARD} if phase.hard != 1 else None,
        )
        with torch.autocast("cpu", torch.bfloat16):
            logits, targets, _, visual = answerer(rows, blind)
        answer = answerer.answer_loss(logits, targets, end)
        alignment = answerer.alignment_loss(visual, rows.labels)
        kind = "blind" if blind else "question_first" if question_first else "image_first"
        figures = {kind: answer.item(), "alignment": alignment.item()}
        return answer + recipe.alignment * max(0.1, 1 - share / 0.5) * alignment, figures

    def report(step: int) -> str:
        scenes = None if step == recipe.steps else 96
        modes = [("image_first", False)]
        modes += [("question_first", False)] if recipe.question_first else []
        modes += [("question_first", True)] if recipe.blind else []
        lines = []
        for order, blind in modes:
            figures = accuracy(answerer, held_out, processor, order=order, blind=blind, scenes=scenes)  # type: ignore[arg-type]
            lines.append(f"{order}{' blind' if blind else ''} " + " ".join(f"{k} {v:.3f}" for k, v in figures.items()))
        return " | ".join(lines)

    return run_stage(
        stage,
        folder,
        answerer,
        loss,
        steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        seed=seed,
        report=report,
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the stages that are not yet done, then write models and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/embedded"), help="checkpoints, features and logs")
    parser.add_argument("--models", type=Path, help="where the models go, by default into the package")
    parser.add_argument("--only", choices=("tower", *RECIPES), help="stop after the tower, or train this model alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, help="steps of every stage, to try the script out")
    parser.add_argument("--scenes", type=int, default=SCENES, help="scenes that the language stages read")
    given = parser.parse_args(arguments)
    if given.steps and given.models is None:
        parser.error("--steps tries the script out: give --models a folder, so that the package's own models stay")
    models = given.models or Path(__file__).parent / "models"
    torch.set_num_threads(given.threads)
    given.folder.mkdir(parents=True, exist_ok=True)
    processor = build_processor("guide")
    towered = build_model("guide", given.seed)
    train_tower(towered, given.folder, steps=given.steps or TOWER_STEPS, seed=given.seed)
    if given.only == "tower":
        return
    held_out = min(given.scenes, HELD_OUT)
    corpora = (
        Corpus("pretrain", given.scenes, given.folder, towered, processor),
        Corpus("pretrain_val", held_out, given.folder, towered, processor),
    )
    for name, stages in RECIPES.items():
        if given.only not in (None, name):
            continue
        model, processor = build_model(name, given.seed), build_processor(name)
        model.model.vision_tower.load_state_dict(towered.model.vision_tower.state_dict())
        answerer, steps = Answerer(model, processor), 0
        for stage, recipe in stages.items():
            if given.steps:
                recipe = Recipe(**{**vars(recipe), "steps": given.steps})
            steps += recipe.steps
            trained = train_language(stage, recipe, answerer, corpora, processor, given.folder, given.seed)
            if recipe.ships is None:
                continue
            target = models / recipe.ships
            if not trained and (target / "report.json").exists():
                continue
            figures = measure(answerer, processor, given.folder, towered, min(given.scenes, 1000), name == "guide")
            figures |= {"world": WORLD_VERSION, "seed": given.seed, "steps": steps}
            shutil.rmtree(target, ignore_errors=True)
            model.save_pretrained(target)
            processor.save(target)
            (target / "report.json").write_text(json.dumps(figures, indent=2) + "\n")
            print(f"{recipe.ships} written to {target}: {json.dumps(figures)}")


def measure(
    answerer: Answerer,
    processor: Processor,
    folder: Path,
    towered: torch.nn.Module,
    scenes: int,
    guide: bool,
) -> dict[str, object]:
    """Measure a finished stage on scenes of the test split, and a guide's visual states with the probe."""
    corpus = Corpus("test", scenes, folder, towered, processor)  # type: ignore[arg-type]
    figures: dict[str, object] = {"image_first": accuracy(answerer, corpus, processor)}
    if guide:
        figures["question_first"] = accuracy(answerer, corpus, processor, order="question_first")
        figures["question_blind"] = accuracy(answerer, corpus, processor, order="question_first", blind=True)
        training = Corpus("pretrain", len(corpus), folder, towered, processor)  # type: ignore[arg-type]
        figures["probe_recall"] = probe_recall(answerer, training, corpus, processor)
    return {key: _rounded(value) for key, value in figures.items()}


def _rounded(value: object) -> object:
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return round(value, 4) if isinstance(value, float | np.floating) else value


if __name__ == "__main__":
    main()
