"""Write a made-up instruction mixture in upstream's formats, and say exactly what is in it.

    python benchmarks/synthetic_mixture.py FOLDER --records 50000 [--seed 0]

Nine sources of skewed sizes (the largest has 40 times the records of the smallest): InternVL's jsonl, LLaVA's json
list, records with `width` and `height`, with boxes, with `question` and `answer`. Among the good records are some that
are left out by design (without an image, with several), and one in a hundred is broken in one of the ways of `FAULTS`.

    FOLDER/annotations/*.jsonl, *.json    the records
    FOLDER/images/SOURCE/                 their pictures, several records to each
    FOLDER/mixture.yaml                   a manifest that builds the shards into FOLDER/shards
    FOLDER/planted.json                   per source: records in = usable + rejected by reason

The reasons in `planted.json` are those of data_manifests/README.md, known from what was planted; nothing here reads
the records back. `long` are the numbers of usable records whose first answer has 600 words: too long for a small
model. The same arguments give the same files.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from synthetic_pictures import BROKEN_FILES, write_broken, write_pool

BROKEN_SHARE, LONG_SHARE = 0.01, 0.004
MOST_LARGE, LARGE_BYTES = 3, 4 << 20  # each of them is a file of its own size
PICTURES = 300
LONG_WORDS = 600

# Way to break a record -> the reason under which it is rejected.
FAULTS = {
    "json": "bad-json",
    "no object": "bad-json",
    "utf-8": "bad-encoding",
    "surrogate": "bad-encoding",
    "large": "record-too-large",
    "no turns": "no-conversation",
    "order": "bad-turns",
    "two answers": "bad-turns",
    "no question": "empty-question",
    "no answer": "empty-answer",
    "placeholder": "bad-text",
    "context": "bad-text",
    "boxes": "bad-boxes",
    "video": "video",
    "outside": "unsafe-path",
    "absolute": "unsafe-path",
    "missing": "missing-image",
    "folder": "missing-image",
    "truncated": "bad-image",
    "empty": "bad-image",
    "text": "bad-image",
    "bomb": "image-too-large",
}

WORDS = {
    "en": "the a small red green old bus dog table left of behind two people chart value street sign window",
    "zh": "图中 的 红色 小狗 在 桌子 左边 什么 颜色 有 两个 人 数值 最大 是 街道 窗户 多少",
    "mixed": "größte Straße café naïve Ångström ελιά день 東京 كتاب हिन्दी 한국 señal 🙂 ½ €5 “quoted” l'été",
}


@dataclass(frozen=True)
class Style:
    """What the records of a source look like.

    Args:
        name: of the source.
        parts: its size, in parts of the whole mixture.
        suffix: of the annotation file: `.jsonl`, or `.json` for one list.
        language: of its texts, a key of `WORDS`.
        turns: greatest number of question turns.
        roles: what the speakers are called; None for `question` and `answer` in place of a conversation.
        sized: whether a record states `width` and `height`.
        boxes: unit of its boxes, None if it has none.
        text_only: share of records without an image.
        several: share of records with two.
    """

    name: str
    parts: int
    suffix: str = ".jsonl"
    language: str = "en"
    turns: int = 1
    roles: tuple[str, str] | None = ("human", "gpt")
    sized: bool = False
    boxes: str | None = None
    text_only: float = 0.0
    several: float = 0.0


STYLES = (
    Style("captions", 102),
    Style("chinese", 158, language="zh", turns=3),
    Style("dialogue", 400, ".json", turns=5, text_only=0.06),
    Style("plots", 200, turns=4, sized=True),
    Style("charts", 18, turns=2, sized=True),
    Style("diagrams", 12, roles=("user", "assistant"), several=0.05),
    Style("documents", 10, sized=True, boxes="pixels"),
    Style("geometry", 72, language="zh", roles=None, boxes="thousandths"),
    Style("glyphs", 30, language="mixed", text_only=0.02, several=0.02),
)


@dataclass
class Tally:
    """What was planted in a source."""

    records: int
    usable: int = 0
    long: list[int] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)

    def facts(self) -> dict[str, Any]:
        """Return it as JSON values."""
        rejected = dict(sorted(self.rejected.items()))
        return {"in": self.records, "usable": self.usable, "rejected": rejected, "long": self.long}


def sizes_of(records: int) -> list[int]:
    """Return the number of records of every source, which add up."""
    parts = [style.parts for style in STYLES]
    ends = [round(records * sum(parts[: number + 1]) / sum(parts)) for number in range(len(parts))]
    return [end - first for first, end in zip([0, *ends[:-1]], ends, strict=True)]


def faults_of(sizes: list[int], rng: random.Random) -> list[dict[int, str]]:
    """Return for every source which records are broken, and how; every way is used at least once."""
    broken = max(round(BROKEN_SHARE * sum(sizes)), len(FAULTS))
    kinds = [list(FAULTS)[number % len(FAULTS)] for number in range(broken)]
    for place in [place for place, kind in enumerate(kinds) if kind == "large"][MOST_LARGE:]:
        kinds[place] = "json"
    chosen = iter(zip(sorted(rng.sample(range(sum(sizes)), broken)), rng.sample(kinds, broken), strict=True))
    found: list[dict[int, str]] = [{} for _ in sizes]
    bounds = [(number, sum(sizes[:number])) for number in range(len(sizes))]
    for place, kind in chosen:
        source, first = next((number, start) for number, start in reversed(bounds) if place >= start)
        found[source][place - first] = kind
    return found


class Writer:
    """Makes the records of one source.

    Args:
        style: what they look like.
        pool: path of a picture -> width and height.
        rng: of every choice.
    """

    def __init__(self, style: Style, pool: dict[str, tuple[int, int]], rng: random.Random) -> None:
        self.style, self.pool, self.rng = style, pool, rng
        self._names, self._vocabulary = list(pool), WORDS[style.language].split()

    def lines(self, faults: dict[int, str], tally: Tally) -> Iterator[bytes]:
        """Yield the records as they stand in the file, and count them."""
        style = self.style
        for number in range(tally.records):
            record = self._record(number)
            draw, long = self.rng.random(), self.rng.random() < LONG_SHARE
            if (fault := faults.get(number)) is not None:
                tally.rejected[FAULTS[fault]] += 1
                yield self._broken(record, fault)
                continue
            if draw < style.text_only:
                tally.rejected["text-only"] += 1
                del record["image"]
                self._ask(record, lambda question: question.replace("<image>\n", ""))
            elif draw < style.text_only + style.several:
                tally.rejected["several-images"] += 1
                record["image"] = [record["image"], self.rng.choice(self._names)]
                self._ask(record, lambda question: f"Image-1: <image>\nImage-2: {question}")
            else:
                tally.usable += 1
                if long:
                    tally.long.append(number)
                    self._answer(record, self._words(LONG_WORDS))
            yield _encoded(record, escaped=number % 3 == 0)  # upstream's files have letters as they are, or as \uXXXX

    def _words(self, number: int) -> str:
        return " ".join(self.rng.choices(self._vocabulary, k=number))

    def _record(self, number: int) -> dict[str, Any]:
        """Return a good record."""
        style, rng = self.style, self.rng
        name = rng.choice(self._names)
        record: dict[str, Any] = {"id": number if style.sized else f"{style.name}_{number}", "image": name}
        if style.sized:
            record |= dict(zip(("width", "height"), self.pool[name], strict=True))
        asked = [self._words(rng.randrange(2, 12)) + "?" for _ in range(rng.randint(1, style.turns))]
        asked[0] = f"<image>\n{asked[0]}"
        if style.roles is None:
            return record | {"question": asked[0], "answer": self._words(3), **self._boxes(name)}
        turns = [{"from": "system", "value": self._words(5)}] if rng.random() < 0.05 else []
        for question in asked:
            turns.append({"from": style.roles[0], "value": question})
            turns.append({"from": style.roles[1], "value": self._words(rng.randrange(1, 25))})
        return record | {"conversations": turns, **self._boxes(name)}

    def _boxes(self, name: str) -> dict[str, Any]:
        """Return the boxes of a record, if its source has any."""
        if self.style.boxes is None:
            return {}
        width, height = self.pool[name] if self.style.boxes == "pixels" else (1000, 1000)
        box = [width // 8, height // 8, width // 2, height // 2]
        return {"bboxs": [box, [0, 0, width, height]]} if self.rng.random() < 0.5 else {"bbox": box}

    def _ask(self, record: dict[str, Any], change: Callable[[str], str]) -> None:
        """Change the first question of a record."""
        entry, key = self._place(record, 0)
        entry[key] = change(entry[key])

    def _answer(self, record: dict[str, Any], text: str) -> None:
        """Replace the first answer of a record."""
        entry, key = self._place(record, 1)
        entry[key] = text

    def _place(self, record: dict[str, Any], which: int) -> tuple[dict[str, Any], str]:
        """Return where the first question (0) or answer (1) of a record stands."""
        if "conversations" not in record:
            return record, ("question", "answer")[which]
        turns = record["conversations"]
        return turns[which + (turns[0]["from"] == "system")], "value"

    def _broken(self, record: dict[str, Any], fault: str) -> bytes:
        """Return a record with one thing wrong."""
        if fault == "json":
            return _encoded(record).replace(b'": ', b'" ', 1)
        if fault == "no object":
            return _encoded([record])
        if fault == "utf-8":
            return _encoded(record).replace(b"<image>", b"<image>\xff\xfe", 1)
        if fault in BROKEN_FILES:
            record["image"] = BROKEN_FILES[fault]
        elif fault == "absolute":
            record["image"] = "/etc/hostname"
        elif fault == "video":
            record |= {"video": "clip.mp4"}
        elif fault == "boxes":
            record["bboxes"] = [[9, 9, 3, 3]]
        elif fault in ("no turns", "order", "two answers"):
            turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "that"}]
            wrong = {"no turns": [], "order": turns[::-1], "two answers": [*turns, turns[1]]}[fault]
            record = {"id": record["id"], "image": record["image"], "conversations": wrong}
        elif fault == "no question":
            self._ask(record, lambda question: "<image>\n")
        else:
            texts = {
                "no answer": " ",
                "placeholder": "it is an <image> of it",
                "context": "<IMG_CONTEXT>",
                "surrogate": "half a \ud83d smile",
                "large": "x" * LARGE_BYTES,
            }
            self._answer(record, texts[fault])
        return _encoded(record, escaped=fault == "surrogate")


def _encoded(value: object, escaped: bool = False) -> bytes:
    return json.dumps(value, ensure_ascii=escaped).encode()


def write_mixture(folder: Path, records: int, seed: int = 0) -> dict[str, Any]:
    """Write annotations, pictures and the manifest, and return what was planted.

    Args:
        folder: where they go; there must be nothing of that name.
        records: of all sources together, 500 at least.
        seed: of every choice.
    """
    if records < 500:
        raise SystemExit(f"--records must be at least 500, so that every source has some; got {records}")
    (folder / "annotations").mkdir(parents=True)
    sizes = sizes_of(records)
    faults = faults_of(sizes, random.Random(f"{seed} faults"))
    entries, planted = [], {}
    for style, size, broken in zip(STYLES, sizes, faults, strict=True):
        rng = random.Random(f"{seed} {style.name}")
        images = folder / "images" / style.name
        pool = write_pool(images, min(PICTURES, max(size // 3, 2)), rng)
        write_broken(images)
        tally = Tally(size)
        lines = Writer(style, pool, rng).lines(broken, tally)
        file = folder / "annotations" / f"{style.name}{style.suffix}"
        with file.open("wb") as out:
            opening, between, closing = (b"[\n", b",\n", b"\n]\n") if style.suffix == ".json" else (b"", b"\n", b"\n")
            out.write(opening)
            for number, line in enumerate(lines):
                out.write((between if number else b"") + line)
            out.write(closing)
        planted[style.name] = tally.facts()
        entries.append(_entry(style, tally, file, images, max(10, min(1000, records // 50))))
    manifest = {
        "name": "synthetic_mixture",
        "licence": "Apache-2.0",
        "root": str(folder / "shards"),
        "splits": {"train": entries},
    }
    (folder / "mixture.yaml").write_text(yaml.safe_dump(manifest, sort_keys=False))
    facts = {"records": records, "seed": seed, "sources": planted}
    (folder / "planted.json").write_text(json.dumps(facts, indent=1) + "\n")
    return facts


def _entry(style: Style, tally: Tally, file: Path, images: Path, samples_per_shard: int) -> dict[str, Any]:
    """Return a source's entry in the manifest."""
    left_out, too_long = (
        tally.rejected.total() / tally.records,
        2 * len(tally.long) / tally.usable,
    )  # by chance in heaps
    arguments = {"annotations": str(file), "images": str(images)}
    return {
        "name": style.name,
        "allowed_rejects": math.ceil(100 * max(left_out, too_long)) / 100 + 0.02,
        "upstream": {"records": tally.records, "licence": "Apache-2.0", "verified": True},
        "build": {
            "class_path": "pgp_lightning.data.instructions.InstructionRecords",
            "init_args": arguments | ({"boxes": style.boxes} if style.boxes else {}),
            "samples_per_shard": samples_per_shard,
        },
    }


def main() -> None:
    """Write a mixture and print what is in it."""
    parser = argparse.ArgumentParser(description="Write a made-up instruction mixture in upstream's formats.")
    parser.add_argument("folder", type=Path, help="where it goes; must not exist")
    parser.add_argument("--records", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    facts = write_mixture(arguments.folder.absolute(), arguments.records, arguments.seed)
    for name, planted in facts["sources"].items():
        listed = ", ".join(f"{reason} {number}" for reason, number in planted["rejected"].items())
        rejected = sum(planted["rejected"].values())
        print(f"{name}: {planted['in']:,} records in = {planted['usable']:,} usable + {rejected:,} rejected ({listed})")


if __name__ == "__main__":
    main()
