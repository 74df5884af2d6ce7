"""Scores of answers: what a run writes down for each question, matching, and intervals that know of scenes.

A sample is one question turn; the turns of one record (a *scene*, named by source and key) share their picture and are
no independent draws, so every interval resamples whole scenes. Differences between methods are paired: taken per sample
first, resampled after.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pgp_lightning.errors import ConfigError, DataError

__all__ = [
    "Answer",
    "Interval",
    "Results",
    "Sample",
    "Scene",
    "accuracy",
    "accuracy_by_type",
    "agreement",
    "exact_match",
    "load_answers",
    "load_results",
    "mean_recall",
    "paired_bootstrap",
]

Scene = tuple[str, str]  # source and key: keys name records within a source only
Sample = tuple[str, str, int]  # source, key and turn

HALF_MAX = 65504.0  # greatest finite float16
BLOCK = 2**22  # scenes drawn at once: 32 MiB of indices

# Field of a line -> what it must be; `answer` is the truth, `given` what the model said.
_TYPES: dict[str, tuple[type, ...]] = {
    "source": (str,),
    "key": (str,),
    "turn": (int,),
    "type": (str,),
    "question": (str,),
    "answer": (str,),
    "given": (str,),
    "correct": (bool,),
    "n": (int,),
    "kept": (int,),
    "layer_average": (int, float),
    "kv_entries": (int,),
}
_OPTIONAL = ("recall", "importance", "kept_mask")


def exact_match(given: str, truth: str) -> bool:
    """Say whether two answers are the same text, apart from letter case and the amount of white space.

    White space at the ends is dropped and any run of it inside counts as one blank; case is compared by Unicode case
    folding. Punctuation, articles and number words are compared as they stand: "yes." is not "yes".
    """
    return _normal(given) == _normal(truth)


def _normal(text: str) -> str:
    return " ".join(text.split()).casefold()


@dataclass(frozen=True)
class Answer:
    """One line of a method's results: a question turn and how it was answered.

    Args:
        source: the source of the data that the record is from.
        key: the record, and so with its source the scene, that the question is about.
        turn: which of the record's question turns.
        type: kind of question.
        question: its text.
        truth: the right answer (`answer` in the file).
        given: the model's answer.
        correct: whether it counts as right.
        n: visual tokens M of the image.
        kept: visual tokens that the last layer saw.
        layer_average: visual tokens that a layer saw, mean over the layers.
        kv_entries: prompt slots, text and visual, in the caches of all layers together.
        recall: share of the relevant tokens that were kept, where they are known; NaN, as `selection.recall` returns
            without any, becomes None.
        importance: float16 (M,) what the method ranked by; -inf where a token had no score.
        keep: bool (M,) the tokens that the last layer saw (`kept_mask` in the file).
        extra: further fields of the line, e.g. booleans to split by.

    Raises:
        DataError: if a number is not finite, an array is not (M,), or an importance is NaN.
    """

    source: str
    key: str
    turn: int
    type: str
    question: str
    truth: str
    given: str
    correct: bool
    n: int
    kept: int
    layer_average: float
    kv_entries: int
    recall: float | None = None
    importance: np.ndarray | None = field(default=None, compare=False)
    keep: np.ndarray | None = field(default=None, compare=False)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.recall is not None and math.isnan(self.recall):
            object.__setattr__(self, "recall", None)
        if not all(math.isfinite(value) for value in (self.layer_average, self.recall or 0.0)):
            raise DataError(f"{self}: expected finite numbers, got {self.layer_average=} and {self.recall=}")
        if taken := self.extra.keys() & {*_TYPES, *_OPTIONAL}:
            raise DataError(f"{self}: extra fields must not be called {', '.join(sorted(taken))}, as fields of its own")
        for name, values in (("importance", self.importance), ("kept mask", self.keep)):
            if values is not None and values.shape != (self.n,):
                raise DataError(f"{self}: expected a {name} of {self.n} visual tokens, got shape {values.shape}")
        if self.importance is not None and np.isnan(self.importance).any():
            raise DataError(f"{self}: the importance holds NaN; look for overflow in the guide or the pruner")

    def __str__(self) -> str:
        return f"turn {self.turn} of {f'{self.source}/{self.key}'!r}"

    @property
    def scene(self) -> Scene:
        """What a record is known by: source and key."""
        return self.source, self.key

    @property
    def sample(self) -> Sample:
        """What a sample is known by: source, key and turn."""
        return self.source, self.key, self.turn

    def to_json(self) -> str:
        """Return the line, without its newline: ASCII JSON.

        The importance becomes base64 of little-endian float16, with finite values beyond its range brought back to
        it; the mask base64 of `numpy.packbits` (first token in the highest bit).
        """
        line: dict[str, Any] = {name: getattr(self, "truth" if name == "answer" else name) for name in _TYPES}
        line["recall"] = self.recall
        if self.importance is not None:
            values = np.asarray(self.importance, dtype=np.float32)
            half = np.where(np.isfinite(values), values.clip(-HALF_MAX, HALF_MAX), values).astype("<f2")
            line["importance"] = base64.b64encode(half.tobytes()).decode()
        if self.keep is not None:
            line["kept_mask"] = base64.b64encode(np.packbits(self.keep.astype(bool)).tobytes()).decode()
        return json.dumps({**line, **self.extra}, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Answer:
        """Read a line.

        Raises:
            DataError: if it is not a JSON object with the fields of an answer.
        """
        try:
            found = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"not JSON ({error})") from None
        if not isinstance(found, dict):
            raise DataError(f"expected an object, got {type(found).__name__}")
        if missing := [name for name in _TYPES if name not in found]:
            raise DataError(f"without {', '.join(missing)}")
        for name, types in _TYPES.items():
            # A Python bool is an int, and a count of `true` is a mistake.
            if not isinstance(found[name], types) or (isinstance(found[name], bool) and bool not in types):
                raise DataError(f"{name} must be of type {types[-1].__name__}, got {found[name]!r}")
        recall = found.get("recall")
        if recall is not None and (isinstance(recall, bool) or not isinstance(recall, (int, float))):
            raise DataError(f"recall must be a number or null, got {recall!r}")
        values = {"truth" if name == "answer" else name: found[name] for name in _TYPES}
        importance, mask = _bytes(found, "importance"), _bytes(found, "kept_mask")
        if importance is not None and len(importance) != 2 * found["n"]:
            raise DataError(f"the importance has {len(importance)} bytes, expected 2 for each of {found['n']} tokens")
        if mask is not None and len(mask) != math.ceil(found["n"] / 8):
            raise DataError(f"the kept mask has {len(mask)} bytes, expected a bit for each of {found['n']} tokens")
        return cls(
            **values,
            recall=recall,
            importance=None if importance is None else np.frombuffer(importance, "<f2"),
            keep=None if mask is None else np.unpackbits(np.frombuffer(mask, np.uint8), count=found["n"]).astype(bool),
            extra={name: value for name, value in found.items() if name not in _TYPES and name not in _OPTIONAL},
        )


def _bytes(found: Mapping[str, Any], name: str) -> bytes | None:
    if found.get(name) is None:
        return None
    try:
        return base64.b64decode(found[name], validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise DataError(f"{name} is not base64") from None


def load_answers(file: Path, partial: bool = False) -> list[Answer]:
    """Read a method's results.

    Args:
        file: one line per sample.
        partial: leave out an unfinished last line (without its newline, and not JSON), as a run leaves that was killed
            while writing; by default that is an error like any other line that cannot be read.

    Raises:
        DataError: naming file and line, if a line cannot be read or a sample is there twice.
    """
    answers: dict[Sample, Answer] = {}
    # Not splitlines: JSON may hold other line separators than the newline.
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            answer = Answer.from_json(line)
        except DataError as error:
            unfinished = number == len(lines) and str(error).startswith("not JSON")
            if unfinished and partial:
                break
            hint = "; the line breaks off: the run was stopped while writing it, resume it" if unfinished else ""
            raise DataError(f"{file}, line {number}: {error}{hint}") from None
        if answer.sample in answers:
            raise DataError(f"{file}, line {number}: {answer} is there twice; two runs wrote into one file, start anew")
        answers[answer.sample] = answer
    return list(answers.values())


@dataclass(frozen=True)
class Results:
    """A results folder: the answers of several methods to the same questions.

    Args:
        answers: for each method its answers, all in one order.
        info: for each method what `methods.json` says about it.
    """

    answers: dict[str, list[Answer]]
    info: dict[str, dict[str, Any]]

    @property
    def samples(self) -> list[Sample]:
        """The samples in their order."""
        return [answer.sample for answer in next(iter(self.answers.values()))]


def load_results(folder: str | Path, methods: Sequence[str] | None = None) -> Results:
    """Read `<folder>/<method>.jsonl` and `<folder>/methods.json`, which may be missing.

    Args:
        folder: where a comparison wrote.
        methods: which of them, in this order; by default all, in the order of `methods.json`.

    Raises:
        ConfigError: if there are no results, a method has none, or methods do not have the same samples.
        DataError: if a file cannot be read, or one sample is not the same question everywhere.
    """
    folder = Path(folder)
    described = folder / "methods.json"
    try:
        info = json.loads(described.read_text(encoding="utf-8")) if described.exists() else {}
    except ValueError as error:
        raise DataError(f"{described}: not JSON ({error})") from None
    if not isinstance(info, dict) or not all(isinstance(value, dict) for value in info.values()):
        raise DataError(f"{described}: expected an object with an object for each method")
    found = [file.name.removesuffix(".jsonl") for file in sorted(folder.glob("*.jsonl"))]
    if not found:
        raise ConfigError(f"{folder} holds no results (<method>.jsonl); run `pgp compare` into it first")
    chosen = list(methods) if methods is not None else [*info, *(name for name in found if name not in info)]
    if missing := ", ".join(name for name in chosen if name not in found):
        raise ConfigError(f"{folder} holds no results of {missing}; run them, or choose among {', '.join(found)}")
    if not chosen:
        raise ConfigError(f"no methods chosen; {folder} has {', '.join(found)}")
    answers = {name: load_answers(folder / f"{name}.jsonl") for name in chosen}
    return Results(_paired(answers), {name: info.get(name, {}) for name in chosen})


def _paired(answers: dict[str, list[Answer]]) -> dict[str, list[Answer]]:
    """Bring all methods into the order of the first.

    Raises:
        ConfigError: if one lacks samples that another has, or there are none.
        DataError: if question, truth or type of a sample differ.
    """
    everywhere: dict[Sample, Answer] = {}
    for rows in answers.values():
        for answer in rows:
            known = everywhere.setdefault(answer.sample, answer)
            if (known.question, known.truth, known.type) != (answer.question, answer.truth, answer.type):
                raise DataError(f"{answer} is not the same question for all methods; run them all on the same data")
    if not everywhere:
        raise ConfigError(f"the results of {', '.join(answers)} are empty; run the comparison to its end")
    complaints = []
    for name, rows in answers.items():
        have = {answer.sample for answer in rows}
        if lacking := [answer for sample, answer in everywhere.items() if sample not in have]:
            complaints.append(f"{name} lacks {len(lacking)} of {len(everywhere)} samples (first: {lacking[0]})")
    if complaints:
        raise ConfigError(
            f"methods are compared on the same samples only: {'; '.join(complaints)}; run them to their end"
        )
    order = {answer.sample: place for place, answer in enumerate(next(iter(answers.values())))}
    return {name: sorted(rows, key=lambda answer: order[answer.sample]) for name, rows in answers.items()}


class Interval(NamedTuple):
    """A mean and an interval around it; the ends are NaN where nothing can be said about the spread."""

    mean: float
    low: float
    high: float


def paired_bootstrap(
    difference: np.ndarray | Sequence[float],
    clusters: Sequence[Any] | np.ndarray,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Return the mean of per-sample differences and its percentile interval under resampling of whole clusters.

    A draw takes as many clusters as there are, with replacement, and the mean over all their samples (a ratio of
    sums, for clusters differ in size). Cluster bootstrap: A. C. Davison, D. V. Hinkley, Bootstrap Methods and their
    Application, 1997, section 3.8. Percentile intervals are a little narrow for few clusters, and of no width where
    all clusters have one mean, e.g. an accuracy of 100 %.

    Args:
        difference: (n,) a value for each sample: of one method minus another, or of one method.
        clusters: (n,) the scene of each sample, whatever can be sorted.
        draws: number of resamples.
        seed: of the draws; the same data and seed give the same interval.
        level: probability that the interval aims at.

    Returns:
        The mean over samples (not over draws) and the interval; with a single cluster its ends are NaN.

    Raises:
        ValueError: if there are no samples, shapes differ, a value is not finite, or an argument is out of range.
    """
    values = np.asarray(difference, dtype=np.float64)
    names = {name: place for place, name in enumerate(sorted(set(clusters)))}
    member = np.array([names[name] for name in clusters], dtype=np.int64)
    if values.ndim != 1 or not len(values) or member.shape != values.shape:
        raise ValueError(f"expected (n,) differences and (n,) clusters, n > 0, got {values.shape} and {member.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{np.sum(~np.isfinite(values))} of {len(values)} differences are not finite; leave them out")
    if draws < 1 or not 0 < level < 1:
        raise ValueError(f"expected draws of at least 1 and a level in (0, 1), got {draws} and {level}")
    mean, count = float(values.mean()), len(names)
    if count == 1:
        return Interval(mean, math.nan, math.nan)
    sums, sizes = np.bincount(member, weights=values), np.bincount(member)
    generator, means = np.random.default_rng(seed), np.empty(draws)
    block = max(1, BLOCK // count)
    for start in range(0, draws, block):
        drawn = generator.integers(count, size=(min(block, draws - start), count))
        means[start : start + block] = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high))


def accuracy(answers: Sequence[Answer], draws: int = 2000, seed: int = 0, level: float = 0.95) -> Interval:
    """Return the share of right answers with an interval over scenes."""
    return paired_bootstrap([a.correct for a in answers], [a.scene for a in answers], draws, seed, level)


def accuracy_by_type(answers: Iterable[Answer]) -> dict[str, float]:
    """Return the share of right answers of each type of question, types in alphabetical order."""
    found: dict[str, list[bool]] = {}
    for answer in answers:
        found.setdefault(answer.type, []).append(answer.correct)
    return {name: sum(found[name]) / len(found[name]) for name in sorted(found)}


def agreement(answers: Sequence[Answer], full: Sequence[Answer]) -> float:
    """Return the share of samples with the same given answer (by `exact_match`), right or wrong, as all tokens give.

    Args:
        answers: of a method.
        full: of the model that sees all tokens, to the same samples in the same order.
    """
    return sum(exact_match(a.given, b.given) for a, b in zip(answers, full, strict=True)) / len(answers)


def mean_recall(answers: Iterable[Answer]) -> float | None:
    """Return the mean recall over the samples whose relevant tokens are known, None without any."""
    known = [answer.recall for answer in answers if answer.recall is not None]
    return sum(known) / len(known) if known else None
