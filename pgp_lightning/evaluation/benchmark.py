"""Many pruners on the same questions: one pass over the data, every method at every budget, a line per answer.

A batch is read and encoded once and answered by all methods, so that they are paired sample by sample and a guide is
asked once for all budgets. Results are appended batch by batch; a run that was stopped goes on where it was, and a
method that is added later is the only one that runs.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TextIO

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from pgp_lightning.data.collate import Batch
from pgp_lightning.data.module import InstructionData
from pgp_lightning.errors import ConfigError, DataError
from pgp_lightning.evaluation.cost import Schedule, prune_cost
from pgp_lightning.evaluation.guide_cost import scoring_flops
from pgp_lightning.evaluation.latency import PhaseTimes, median_times, phase_times
from pgp_lightning.evaluation.report import describe_method
from pgp_lightning.evaluation.resume import (
    Part,
    alike,
    attributes,
    check_settings,
    done_samples,
    fingerprint,
    read_json,
    take_parts,
)
from pgp_lightning.evaluation.scoring import Answer, Sample, exact_match, load_answers
from pgp_lightning.guides.base import Guide, Remember
from pgp_lightning.guides.simple import OracleGuide, RandomGuide, UniformGuide
from pgp_lightning.prefill import KeepAll, Pruner, pruned
from pgp_lightning.pruners.guided import Guided
from pgp_lightning.vlm.family import VLM, Attention
from pgp_lightning.vlm.inputs import answer_lengths, generate, prompt_inputs, read_answers
from pgp_lightning.vlm.loading import load_vlm
from pgp_lightning.vlm.processor import PromptOrder
from pgp_lightning.vlm.request import Request

__all__ = ["Benchmark", "Method"]

SETTINGS = "benchmark.json"
METHODS = "methods.json"
ALONE: dict[str, PromptOrder] = {"guide_image_first": "image_first", "guide_question_first": "question_first"}
"""Rows of a small model that answers by itself, in either prompt order."""


@dataclass(frozen=True)
class Method:
    """A pruner at a budget: a row of the table.

    Args:
        label: the pruner's name in the configuration.
        pruner: with its budget.
        done: samples that are answered already.
    """

    label: str
    pruner: Pruner
    done: set[Sample] = field(default_factory=set)

    @property
    def name(self) -> str:
        """The label and the budget in per cent: pgp@5; the full model has no budget."""
        return self.label if self.pruner.keep_ratio == 1 else f"{self.label}@{100 * self.pruner.keep_ratio:g}"


class Benchmark:
    """Runs pruners on the question turns of a manifest's split.

    The full model, random tokens, a uniform grid and, where relevant tokens are known, an oracle always run as well.

    Args:
        methods: pruners by the names that the report will use. A `keep_ratio` of their own means nothing here: every
            pruner runs at the budgets of `keep_ratios`. Of guides that are alike one is kept, for all methods.
        answer_model: the model that is pruned: `embedded:answer_model`, a folder, or a repository on the hub.
        keep_ratios: budgets; every method runs at each.
        manifest: the data.
        split: of the manifest.
        images: use so many images, from all sources in proportion; by default all.
        questions_per_image: use so many of an image's question turns, the first ones; by default all.
        batch_size: images per batch.
        max_tiles: greatest number of tiles of an image, the thumbnail apart; by default the model's.
        root: folder of the shards, in place of the manifest's.
        order: prompt order of the answer model; its family's own is `image_first`.
        max_new_tokens: longest answer.
        dtype: of the answer model.
        attention: attention implementation of the answer model.
        guide_alone: a small model that answers by itself with all its tokens, as rows of its own, one for each prompt
            order; differences can be split by whether it is right.
        keep_importance: methods whose importance maps are kept for the failure explorer.
        timed_images: so many images are answered once more by every method, one question at a time from pixels, to
            time guide, vision tower, prefill and decoding.

    Raises:
        ConfigError: if a number is out of range or a name is used twice or unknown.
    """

    def __init__(
        self,
        methods: dict[str, Pruner],
        answer_model: str = "embedded:answer_model",
        keep_ratios: tuple[float, ...] = (0.05, 0.11, 0.2),
        manifest: str = "data_manifests/embedded.yaml",
        split: str = "test",
        images: int | None = None,
        questions_per_image: int | None = None,
        batch_size: int = 8,
        max_tiles: int | None = None,
        root: str | None = None,
        order: PromptOrder = "image_first",
        max_new_tokens: int = 16,
        dtype: Literal["float32", "bfloat16"] = "float32",
        attention: Attention = "auto",
        guide_alone: str | None = None,
        keep_importance: tuple[str, ...] = (),
        timed_images: int = 0,
    ) -> None:
        numbers = {
            "images": images,
            "timed_images": timed_images or None,
            "questions_per_image": questions_per_image,
            "max_new_tokens": max_new_tokens,
        }
        for name, value in numbers.items():
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        budgets = {f"{100 * ratio:g}" for ratio in keep_ratios}
        if not keep_ratios or len(budgets) < len(keep_ratios) or not all(0 < ratio < 1 for ratio in keep_ratios):
            raise ConfigError(
                f"keep_ratios must be different budgets in (0, 1), at least one, got {list(keep_ratios)}; "
                "the full model always runs"
            )
        if unknown := set(keep_importance) - {*methods, "random", "uniform", "oracle"}:
            raise ConfigError(f"keep_importance names {sorted(unknown)}, which are no methods")
        for name in methods:
            if name in ("full", "random", "uniform", "oracle", *ALONE) or not name or set(name) & set("/\\@"):
                raise ConfigError(f"a method cannot be called {name!r}: the name is taken or holds one of / \\ @")
        self.pruners, self.keep_ratios = methods, tuple(keep_ratios)
        self.answer_model, self.dtype, self.attention = answer_model, dtype, attention
        self.manifest, self.split, self.images, self.root = manifest, split, images, root
        self.questions_per_image, self.max_new_tokens, self.order = questions_per_image, max_new_tokens, order
        self.guide_alone, self.keep_importance, self.timed_images = guide_alone, set(keep_importance), timed_images
        # Tiles are the answer model's: `pruned` refuses a guide that tiles otherwise.
        self.data = InstructionData(
            manifest, answer_model, val_batch_size=batch_size, turns="all", max_tiles=max_tiles, root=root
        )

    def run(self, folder: Path, described: Mapping[str, Any] | None = None, part: Part | None = None) -> None:
        """Answer every question with every method.

        Args:
            folder: where results go; what is there already, or in a part's folder, is not run again.
            described: the configuration, noted and compared beside what the benchmark knows of itself.
            part: answer with a share of the methods only, in a folder of its own, and describe and time none.

        Raises:
            ConfigError: if a folder holds results of other settings or weights, or no method is left for the part.
            DataError: if too many records cannot be used.
        """
        described, folder = described or {}, part.inside(folder) if part else folder
        folder.mkdir(parents=True, exist_ok=True)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        models = [load_vlm(base, getattr(torch, self.dtype), self.attention) for base in self._bases()]
        settings = self._settings(models, described)
        check_settings(folder / SETTINGS, settings)
        take_parts(folder, SETTINGS, settings)
        self.data.prepare_data()
        for vlm in models:
            vlm.model.eval().to(device)
        loader = self.data.sample(self.split, self.images)
        batches = _with_other_questions(iter(loader))
        first = next(batches, None)
        if first is None:
            raise DataError(f"none of the records of {self.split!r} in {self.manifest} can be used")
        methods = self._methods(folder, device, first.request.relevant is not None, part)
        rejected: Counter[str] = Counter()
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, disable=not sys.stdout.isatty()) as bar, ExitStack() as stack:
            files = {m.name: stack.enter_context(_lines(folder, m.name).open("a", encoding="utf-8")) for m in methods}
            task = bar.add_task("comparing", total=len(loader))
            for batch in chain([first], batches):
                rejected.update(batch.rejected)
                rows = [row for row, turn in enumerate(batch.turns) if turn < (self.questions_per_image or turn + 1)]
                self._batch(models, methods, files, batch.select(rows).to(device))
                bar.advance(task)
        for reason, count in sorted(rejected.items()):
            print(f"left out: {count} records, {reason}")
        if part is not None:
            return
        # Methods that were left out this time stay described, and so do times that were not taken again.
        before, times = read_json(folder / METHODS), self._times(models, methods)
        for method in methods:
            latency = times.get(method.name) or before.get(method.name, {}).get("latency", {})
            answers, configured = load_answers(_lines(folder, method.name)), described.get("methods", {})
            about = describe_method(answers, method.label, method.pruner, configured.get(method.label, {}))
            before[method.name] = about | {"latency": latency}
        (folder / METHODS).write_text(json.dumps(before, indent=2) + "\n", encoding="utf-8")

    def row_names(self) -> list[str]:
        """Return the names of all rows: methods and controls at every budget, the full model, the guide alone.

        The oracle is none of them where the first batch does not say which tokens are relevant.
        """
        self.data.prepare_data()
        first = next(iter(self.data.sample(self.split, self.images)), None)
        oracle = [] if first is None or first.request.relevant is None else ["oracle"]
        labels = [*oracle, *self.pruners, "uniform", "random"]
        budgets = [Method(name, KeepAll().at(ratio)).name for name in labels for ratio in self.keep_ratios]
        return ["full", *budgets, *(ALONE if self.guide_alone else ())]

    def _settings(self, models: list[VLM], described: Mapping[str, Any]) -> dict[str, Any]:
        """Return all that answers depend on, for the note beside them."""
        own = ("answer_model", "dtype", "manifest", "split", "images", "questions_per_image", "order", "max_new_tokens",
               "root", "guide_alone")  # fmt: skip
        configured = described.get("methods", {})
        methods = {
            label: {"attributes": attributes(pruner), "weights": fingerprint(pruner)}
            | ({"configuration": configured[label]} if label in configured else {})
            for label, pruner in self.pruners.items()
        }
        weights = dict(zip(("answer_model", "guide_alone"), (fingerprint(vlm.model) for vlm in models), strict=False))
        noted = {name: getattr(self, name) for name in own} | {"max_tiles": self.data.max_tiles, "weights": weights}
        return {**described, **noted, "methods": methods}

    def _bases(self) -> list[str]:
        return [self.answer_model, *([self.guide_alone] if self.guide_alone else [])]

    def _methods(self, folder: Path, device: torch.device, relevant: bool, part: Part | None) -> list[Method]:
        """Return the rows of the table: every pruner at every budget, the controls among them; or a part's share."""
        oracle: dict[str, Pruner] = {"oracle": Guided(OracleGuide())} if relevant else {}
        pruners = {**oracle, **self.pruners, "uniform": Guided(UniformGuide()), "random": Guided(RandomGuide())}
        alone = ALONE if self.guide_alone else {}
        own = (part or Part(1, 1)).share(["full", *pruners, *alone])
        known: dict[str, Guide] = {}
        shared: dict[Guide, Remember] = {}
        found = [Method("full", KeepAll())] if "full" in own else []
        for label, pruner in pruners.items():
            if label not in own:
                continue
            if isinstance(pruner, Guided):
                # In the pruner that was given, too: else it would hold on to a model that nobody asks.
                pruner.guide = known.setdefault(alike(pruner.guide), pruner.guide)
            pruner = pruner.at(pruner.keep_ratio).to(device).eval()
            if isinstance(pruner, Guided):
                # Budgets share a guide's scores, and so do methods whose guides are alike.
                pruner.guide = shared.setdefault(pruner.guide, Remember(pruner.guide))
            found += [Method(label, pruner.at(ratio)) for ratio in self.keep_ratios]
        found += [Method(label, KeepAll()) for label in alone if label in own]
        return [replace(method, done=done_samples(_lines(folder, method.name))) for method in found]

    def _batch(self, models: list[VLM], methods: list[Method], files: Mapping[str, TextIO], batch: Batch) -> None:
        """Answer a batch with every method that has not, and write the answers."""
        samples = list(zip(batch.sources, batch.keys, batch.turns, strict=True))
        features: dict[int, Tensor] = {}
        for method in methods:
            if all(sample in method.done for sample in samples):
                continue
            which = int(method.label in ALONE)
            if not method.pruner.reads_vision_tower and which not in features:
                with torch.no_grad():
                    features[which] = models[which].visual_tokens(batch.request.tiles)
            given = None if method.pruner.reads_vision_tower else features[which]
            answers = self._answers(models[which], method, batch, given)
            lines = [a.to_json() + "\n" for a in answers if a.sample not in method.done]
            files[method.name].write("".join(lines))
            files[method.name].flush()

    def _answers(self, vlm: VLM, method: Method, batch: Batch, features: Tensor | None) -> list[Answer]:
        """Answer a batch with one method."""
        request, pruner = _asked(method, batch.request), method.pruner
        inputs = prompt_inputs(vlm, request, ALONE.get(method.label, self.order), features)
        with pruned(vlm, pruner, inputs, request) as run:
            tokens = generate(vlm, inputs, self.max_new_tokens)
        steps = answer_lengths(tokens, vlm.processor.stop_id)
        text = (run.slots[0] - run.kept[0].sum(dim=1)).tolist()
        scoring = scoring_flops(pruner, vlm, request, text)
        found = []
        for row, given in enumerate(read_answers(vlm, tokens)):
            n, grid = request.counts[row], request.grids[request.images[row]]
            kept = torch.stack([mask[row, :n] for mask in run.kept]).cpu()
            seen = kept.sum(dim=1).tolist()
            slots, cached = ([int(count[row]) for count in counts] for counts in (run.slots, run.cached))
            needed = int(kept[0].view(grid.tiles, -1).any(dim=1).sum()) if pruner.skip_tiles else grid.tiles
            cost = prune_cost(
                vlm.model.config,
                Schedule(n, tuple(seen)),
                tiles=grid.tiles,
                text=text[row],
                new_tokens=steps[row],
                tiles_encoded=needed,
                slots=slots,
                cached=cached,
            )
            relevant = None if request.relevant is None else request.relevant[row, :n].cpu()
            ranked = pruner.importance if method.label in self.keep_importance else None
            found.append(
                Answer(
                    source=batch.sources[row],
                    key=batch.keys[row],
                    turn=batch.turns[row],
                    type=batch.types[row],
                    question=request.questions[row],
                    truth=batch.answers[row],
                    given=given,
                    correct=exact_match(given, batch.answers[row]),
                    n=n,
                    kept=seen[-1],
                    layer_average=sum(seen) / len(seen),
                    kv_entries=sum(cached),
                    recall=_recall(kept[-1], relevant),
                    importance=None if ranked is None else ranked[row, :n].float().cpu().numpy(),
                    keep=kept[-1].numpy(),
                    extra={
                        "flops": cost.answer_model,
                        "guide_flops": scoring[row],
                        "tiles": grid.tiles,
                        "tiles_encoded": needed,
                        "new_tokens": steps[row],
                    },
                )
            )
        return found

    def _times(self, models: list[VLM], methods: list[Method]) -> dict[str, dict[str, float]]:
        """Return what each method takes for one question, by phase; methods take turns."""
        runs: dict[str, list[PhaseTimes]] = {method.name: [] for method in methods}
        if not self.timed_images:
            return {}
        one = [0]
        for batch in _with_other_questions(iter(self.data.sample(self.split, self.timed_images, batch_size=1))):
            for method in methods:
                vlm = models[int(method.label in ALONE)]
                # A new request for each, so that no guide remembers it.
                request = _asked(method, batch.select(one).to(vlm.model.device).request)
                inputs = prompt_inputs(vlm, request, ALONE.get(method.label, self.order))
                runs[method.name].append(phase_times(vlm, inputs, method.pruner, request, self.max_new_tokens))
        return {name: median_times(found) for name, found in runs.items()}


def _asked(method: Method, request: Request) -> Request:
    """Return the request, for the oracle with no token marked if none of a batch are known: it is random there."""
    if method.label != "oracle" or request.relevant is not None:
        return request
    shape, device = (len(request), max(request.counts)), request.tiles.device
    return replace(request, relevant=torch.zeros(shape, dtype=torch.bool, device=device))


def _recall(kept: Tensor, relevant: Tensor | None) -> float | None:
    """Return the share of the relevant tokens that were kept, out of those that the budget could hold."""
    if relevant is None or not relevant.any():
        return None
    return float((kept & relevant).sum()) / min(int(kept.sum()), int(relevant.sum()))


def _with_other_questions(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Give every question one about the image before it, another text if there is one; the first takes from behind.

    A pure function of the order of images, so that it does not depend on the batch size.
    """
    first = next(batches, None)
    if first is None:
        return
    waiting = [first]
    if len(first.request.grids) == 1 and (second := next(batches, None)) is not None:
        waiting.append(second)
    behind = [_by_image(batch) for batch in waiting]
    before = [questions for part in behind for questions in part][1:2] or behind[0][:1]
    previous = before[0]
    for batch in chain(waiting, batches):
        others: list[str] = []
        of_images = _by_image(batch)
        for question, image in zip(batch.request.questions, batch.request.images, strict=True):
            candidates = of_images[image - 1] if image else previous
            others.append(next((other for other in candidates if other != question), candidates[0]))
        previous = of_images[-1]
        yield replace(batch, request=replace(batch.request, other_questions=others))


def _by_image(batch: Batch) -> list[list[str]]:
    found: list[list[str]] = [[] for _ in batch.request.grids]
    for question, image in zip(batch.request.questions, batch.request.images, strict=True):
        found[image].append(question)
    return found


def _lines(folder: Path, name: str) -> Path:
    return folder / f"{name}.jsonl"
