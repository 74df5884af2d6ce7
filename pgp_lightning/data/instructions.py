r"""Instruction data as it is published, made into records: `build:` of the public mixtures.

An annotation file has one record a line, or is one list of them (LLaVA's `.json`):

    {"id": 17, "image": "coco/train2017/000000000009.jpg",
     "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]}

or has another of the layouts of `layouts.py`.

Records are kept whole or left out, under these reasons:

- `bad-encoding`, `bad-json`, `record-too-large`: the line is not UTF-8, no JSON object, or longer than 4 MiB;
- `unknown-layout`: it is laid out in none of the ways that are read, or in two of them at once;
- `no-conversation`: there are no turns;
- `bad-turns`: they do not alternate human, gpt, ..., gpt, or are no turns;
- `empty-question`, `empty-answer`: a turn lacks its text;
- `bad-text`: a text holds a placeholder of images, apart from one `<image>` in the first question;
- `bad-boxes`: boxes that are none;
- `text-only`, `several-images`, `video`: there is not exactly one image;
- `image-not-named`: a text, or an unknown key, speaks of an image, but no known key names one;
- `image-no-file`: it is a URL, or stands in the record itself;
- `unsafe-path`, `missing-image`, `image-too-large`, `bad-image`: it cannot be had, see `image_files.py`.
"""

from __future__ import annotations

import os
import re
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from pgp_lightning.data.annotations import Annotations
from pgp_lightning.data.conversation import stated_size
from pgp_lightning.data.image_files import ImageFolder, Picture, check_picture
from pgp_lightning.data.layouts import PLACEHOLDER, Laid, read_layout
from pgp_lightning.data.records import UnusableRecord
from pgp_lightning.errors import ConfigError

__all__ = ["InstructionRecords"]

BoxFormat = Literal["pixels", "thousandths", "fractions"]

_FORMAT = 3  # part of the identity: raise it when the same annotations make other records
_PLACEHOLDERS = (PLACEHOLDER, "<IMG_CONTEXT>", "<img>", "</img>")
_REASONS = (
    "bad-encoding", "bad-json", "record-too-large", "unknown-layout", "no-conversation", "bad-turns", "empty-question",
    "empty-answer", "bad-text", "bad-boxes", "text-only", "several-images", "video", "image-not-named", "image-no-file",
    "unsafe-path", "missing-image", "image-too-large", "bad-image",
)  # fmt: skip
_FARTHEST = 1e9  # of a corner from the image's own: NaN and integers that are no floats are beyond
_BOX_KEYS = ("boxes", "bboxes", "bboxs", "bbox")


class InstructionRecords:
    """The single-image records of an annotation file.

    The image is a field of a record, so `<image>` and the space around it is taken out of the question. Boxes of a
    record or of a turn (`boxes`, `bboxes`, `bboxs` or `bbox`: one [x1, y1, x2, y2] or a list of them) are kept as
    `boxes`, in fractions of the image.

    Args:
        annotations: a `.jsonl` or `.json` file.
        images: the folder that the records' image paths are relative to; no path may leave it, an absolute one neither.
        linked: folders outside `images` to which symbolic links in it may lead.
        boxes: what the coordinates count: pixels (of the record's own `width` and `height`, where it has them),
            thousandths, or fractions of the image.
        max_pixels: largest image that is taken.

    Raises:
        ConfigError: if `boxes` or `max_pixels` is none of these, or a folder is the root of the file system.
    """

    reasons = _REASONS
    """What a record may be rejected for."""

    def __init__(
        self,
        annotations: str,
        images: str,
        linked: list[str] | None = None,
        boxes: BoxFormat = "pixels",
        max_pixels: int = 64_000_000,
    ) -> None:
        if boxes not in get_args(BoxFormat):
            raise ConfigError(f"boxes must be one of {', '.join(get_args(BoxFormat))}, got {boxes!r}")
        if max_pixels < 1:
            raise ConfigError(f"max_pixels must be at least 1, got {max_pixels}")
        for setting, folder in (("images", images), *(("linked", folder) for folder in linked or ())):
            if os.path.realpath(folder) == os.path.realpath(os.sep):
                raise ConfigError(
                    f"{setting}: {folder!r} is the root of the file system, so annotations could name any file of this "
                    f"machine: give the folder of the images; absolute paths that lead into it are accepted"
                )
        self.annotations, self.images, self.linked = annotations, images, list(linked or ())
        self.boxes, self.max_pixels = boxes, max_pixels
        # A key is made of file and position: ids are missing, repeated, or no names of files.
        self._stem = re.sub(r"[^A-Za-z0-9_-]", "-", Path(annotations).stem)[:60]

    def __len__(self) -> int:
        return len(self._lines)

    def identity(self) -> dict[str, Any]:
        """Return all that the records depend on, but for the images' contents.

        Raises:
            FileNotFoundError: if the annotations or the folder of the images are not there.
        """
        if not Path(self.images).is_dir():
            raise FileNotFoundError(f"{self.images} does not exist, or is no folder: give the folder of the images")
        settings = {key: value for key, value in vars(self).items() if key in _SETTINGS}
        return {"format": _FORMAT, "sha256": self._lines.sha256, **settings}

    def __getitem__(self, index: int) -> tuple[str, bytes, str, dict[str, Any]]:
        """Return key, image, extension and record.

        Raises:
            UnusableRecord: if it cannot be used, with the reason.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        key = f"{self._stem}-{index:08d}"
        source: dict[str, Any] = {}
        laid: Laid | None = None
        try:
            source = self._lines.read(index)
            laid = read_layout(source)
            record = _conversation(laid)
            picture = check_picture(self._images.read(laid.image), self.max_pixels)
            self._place_boxes(source, laid, record, picture)
        except UnusableRecord as error:
            where: dict[str, str | int] = {"file": self.annotations, "line": int(self._lines.lines[index])}
            where |= _known_as(source) | ({"image": laid.image} if laid else {})
            raise UnusableRecord(error.reason, error.detail, key, where) from error
        record |= {"width": picture.width, "height": picture.height, **_known_as(source)}
        if picture.reencoded:
            record["reencoded"] = picture.reencoded
        return key, picture.data, picture.extension, record

    @cached_property
    def _lines(self) -> Annotations:
        return Annotations.scan(Path(self.annotations))

    @cached_property
    def _images(self) -> ImageFolder:
        return ImageFolder(Path(self.images), tuple(Path(folder) for folder in self.linked))

    def _place_boxes(self, source: dict[str, Any], laid: Laid, record: dict[str, Any], picture: Picture) -> None:
        """Put the boxes of a source record and of its turns, in fractions, into ours."""
        frame: tuple[float, float] = {"fractions": (1, 1), "thousandths": (1000, 1000)}.get(
            self.boxes, stated_size(source) or (picture.width, picture.height)
        )
        for turn, exchange in zip(record["turns"], laid.exchanges, strict=True):
            if boxes := [box for entry in exchange.entries for box in _boxes(entry, frame)]:
                turn["boxes"] = boxes
        if boxes := _boxes(source, frame):
            record["boxes"] = boxes


_SETTINGS = ("annotations", "images", "linked", "boxes", "max_pixels")


def _known_as(source: dict[str, Any]) -> dict[str, str]:
    """Return the id that a source record has, if it has one."""
    return {"id": str(source["id"])} if isinstance(source.get("id"), str | int) else {}


def _conversation(laid: Laid) -> dict[str, Any]:
    """Return the turns of a record, and the system prompt if there is one."""
    turns = [_turn(number, exchange.question, exchange.answer) for number, exchange in enumerate(laid.exchanges)]
    return ({} if laid.system is None else {"system": _text("system prompt", laid.system)}) | {"turns": turns}


def _turn(number: int, question: object, answer: object) -> dict[str, Any]:
    """Check one turn; only the first question may name the image, once."""
    if number == 0 and isinstance(question, str) and question.count(PLACEHOLDER) == 1:
        question = question.replace(PLACEHOLDER, "").strip()
    for name, text in (("question", question), ("answer", answer)):
        if not isinstance(text, str) or not text.strip():
            raise UnusableRecord(f"empty-{name}", f"turn {number}: expected a text, got {text!r:.80}")
        _text(f"{name} of turn {number}", text)
    return {"question": question, "answer": answer}


def _text(what: str, text: str) -> str:
    """Return a text that a model can be given."""
    if found := next((mark for mark in _PLACEHOLDERS if mark in text), None):
        raise UnusableRecord("bad-text", f"the {what} holds {found!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnusableRecord("bad-encoding", f"the {what} holds half a surrogate pair") from error
    return text


def _boxes(entry: dict[str, Any], frame: tuple[float, float]) -> list[list[float]]:
    """Return the boxes under whichever key has them, as fractions cut to the image."""
    found: object = next((entry[key] for key in _BOX_KEYS if entry.get(key)), [])
    values = found if isinstance(found, list) and all(isinstance(box, list) for box in found) else [found]
    return [_box(value, frame) for value in values]


def _box(value: object, frame: tuple[float, float]) -> list[float]:
    """Return one box as fractions."""
    if (
        not isinstance(value, list)
        or len(value) != 4
        or not all(isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < _FARTHEST for x in value)
    ):
        raise UnusableRecord("bad-boxes", f"expected [x1, y1, x2, y2], got {value!r:.80}")
    width, height = frame
    left, top, right, bottom = (
        round(min(max(x / side, 0.0), 1.0), 6) for x, side in zip(value, (width, height) * 2, strict=True)
    )
    if left >= right or top >= bottom:
        raise UnusableRecord("bad-boxes", f"expected x1 < x2 and y1 < y2 inside the image, got {value!r:.80}")
    return [left, top, right, bottom]
