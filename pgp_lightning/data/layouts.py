"""The layouts in which instruction data is published, read as one: system text, questions with answers, image.

Turns stand under `conversations` or `messages`, each with `from` or `role` and `value` or `content`; a content may be a
list of parts, texts and images. Or a record is one turn: `question` and `answer`, or `query` and `response` (after the
pairs of `history`). A system text is the first turn, or stands under `system`. Images are named under `image` or
`images`, by parts of a content, or inside a text as `<img>PATH</img>`, as Qwen-VL has it.

Tables written as JSON have every key in every record, so a null is no value: its key counts as absent. For the same
reason an empty text under `system` is none; a first turn that is empty is meant.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from pgp_lightning.data.records import UnusableRecord

__all__ = ["PLACEHOLDER", "Exchange", "Laid", "read_layout"]

PLACEHOLDER = "<image>"
_ROLES = {
    **dict.fromkeys(("human", "user"), "question"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "bing", "bot", "model"), "answer"),
    "system": "system",
}
_TURNS = ("conversations", "messages")
_PAIRS = (("question", "answer"), ("query", "response"))
_OTHER_MEDIA = ("audio", "audios")
# What stands in texts for images, ours and others'; without an image such a text is about one that is not named.
_MARKS = (PLACEHOLDER, "<IMG_CONTEXT>", "<|image_pad|>", "<|vision_start|>")
_INLINE = re.compile(r"(?:Picture \d+: ?)?<img>([^<>]*)</img>")
_PICTURE_FILE = re.compile(r".+\.(?:jpe?g|png|webp|gif|bmp|tiff?)", re.IGNORECASE)


@dataclass(frozen=True)
class Exchange:
    """A question and its answer as they stand there, of whatever type, and the entries that boxes may stand in."""

    question: Any
    answer: Any
    entries: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Laid:
    """A raw record, in whichever layout: its image's path, its turns, its system text (None if there is none)."""

    image: str
    exchanges: tuple[Exchange, ...]
    system: Any = None


def read_layout(source: dict[str, Any]) -> Laid:
    """Read a raw record.

    Raises:
        UnusableRecord: if it has not exactly one image, no turns, or is laid out in another way.
    """
    shown: list[str] = []
    system, entries = _entries(source, shown)
    # Each of the three may name all of the images, one of them twice where a record has it twice.
    named = Counter(shown)
    for key in ("image", "images"):
        named |= Counter(_paths(key, source.get(key)))
    image = _image(source, list(named.elements()), entries)
    if not entries:
        raise UnusableRecord("no-conversation", f"expected turns, got {_first_of(source)!r:.80}")
    if entries[0].role == "system":
        if system is not None and system != entries[0].text:
            raise UnusableRecord("bad-turns", "there are two system texts, a turn and `system`")
        system, entries = entries[0].text, entries[1:]
        if not isinstance(system, str):
            raise UnusableRecord("bad-turns", f"the system prompt is no text, but {system!r:.80}")
    said = [entry.role for entry in entries]
    if not entries or said != ["question", "answer"] * (len(said) // 2):
        names = ", ".join(entry.called for entry in entries)
        raise UnusableRecord("bad-turns", f"expected human, gpt, ..., human, gpt, got {names:.80}")
    pairs = zip(entries[::2], entries[1::2], strict=True)
    exchanges = tuple(Exchange(asked.text, said.text, (asked.source, said.source)) for asked, said in pairs)
    return Laid(image, exchanges, system)


@dataclass
class _Entry:
    """A turn as it stands there: what it is, what the record calls that, its text, and where boxes may stand."""

    role: str | None
    called: str
    text: Any
    source: dict[str, Any]


def _entries(source: dict[str, Any], shown: list[str]) -> tuple[Any, list[_Entry]]:
    """Return a record's own system text and its turns; images that these show are added to those shown."""
    system = source.get("system")
    if system is not None and not isinstance(system, str):
        raise UnusableRecord("bad-turns", f"the system prompt is no text, but {system!r:.80}")
    system = system or None
    stated = [key for key in _TURNS if source.get(key) is not None]
    pairs = [pair for pair in _PAIRS if all(source.get(key) is not None for key in pair)]
    if len(several := [*stated, *map("/".join, pairs)]) > 1:
        raise UnusableRecord("unknown-layout", f"turns stand under both {' and '.join(several)}")
    if pairs or (empty := [pair for pair in _PAIRS if not stated and source.keys() >= {*pair}]):
        return system, _of_pair(source, *(pairs or empty)[0])
    if not stated and not any(key in source for key in _TURNS):
        keys = ", ".join(sorted(map(str, source)))
        known = "conversations, messages, question and answer, or query and response"
        raise UnusableRecord("unknown-layout", f"expected {known}, got the keys {keys or 'of nothing'}"[:300])
    turns = source[stated[0]] if stated else []
    if not isinstance(turns, list):
        raise UnusableRecord("no-conversation", f"expected a list of turns, got {turns!r:.80}")
    entries = []
    for turn in turns:
        called = _stated(turn, "from", "role") if isinstance(turn, dict) else None
        if not isinstance(called, str):
            raise UnusableRecord("bad-turns", f"expected turns with `from` and `value`, got {turn!r:.80}")
        text = _text_of(_stated(turn, "value", "content"), shown)
        entries.append(_Entry(_ROLES.get(called), called, text, turn))
    return system, entries


def _stated(entry: dict[str, Any], *keys: str) -> Any:  # noqa: ANN401 it is what a file says
    """Return what stands under any of some keys of one meaning, None if there is nothing."""
    values = [entry[key] for key in keys if entry.get(key) is not None]
    if any(value != values[0] for value in values):
        raise UnusableRecord("unknown-layout", f"{' and '.join(keys)} say different things in {entry!r:.80}")
    return values[0] if values else None


def _of_pair(source: dict[str, Any], asked: str, said: str) -> list[_Entry]:
    """Return the turns of a record that is a question and an answer, under these keys."""
    history = source.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise UnusableRecord("unknown-layout", f"expected a history of [query, response], got {history!r:.80}")
    pairs = [*map(tuple, history), (source[asked], source[said])]
    kinds = (("question", asked), ("answer", said))
    return [_Entry(role, key, text, {}) for pair in pairs for (role, key), text in zip(kinds, pair, strict=True)]


def _text_of(content: Any, shown: list[str]) -> Any:  # noqa: ANN401 what is no text is refused where it is used
    """Return a content as text with a placeholder for every image; images that its parts show are added."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, dict):
            raise UnusableRecord("unknown-layout", f"expected parts of a content, got {part!r:.80}")
        part = {key: value for key, value in part.items() if value is not None}
        if isinstance(part.get("text"), str) and part.get("type", "text") == "text":
            texts.append(part["text"])
        elif (kind := part.get("type", next(iter(part), None))) in ("image", "image_url"):
            shown += _paths(kind, _stated(part, kind, "image", "path", "url"))
            texts.append(PLACEHOLDER)
        elif kind == "video":
            raise UnusableRecord("video", f"a content has a video: {part!r:.80}")
        else:
            raise UnusableRecord("unknown-layout", f"expected texts and images in a content, got {part!r:.80}")
    return "".join(texts)


def _paths(key: str, value: Any) -> list[str]:  # noqa: ANN401 it is what a file says
    """Return the paths that a value names; nothing is no image."""
    if value is None or value == "" or value == []:
        return []
    if isinstance(value, list):
        return [path for entry in value for path in _paths(key, entry)]
    if isinstance(value, dict):
        path = next((value[name] for name in ("path", "url", "image") if isinstance(value.get(name), str)), None)
        if path is None:
            raise UnusableRecord("image-no-file", f"`{key}` names no file: {value!r:.80}")
        value = path
    if not isinstance(value, str):
        raise UnusableRecord("missing-image", f"expected a path under `{key}`, got {value!r:.80}")
    if re.match(r"(?:https?|data|s3|gs|hf):", value):
        raise UnusableRecord("image-no-file", f"expected the path of a file under `{key}`, got {value!r:.80}")
    return [unquote(value.removeprefix("file://")) if value.startswith("file://") else value]


def _image(source: dict[str, Any], named: list[str], entries: list[_Entry]) -> str:
    """Return the path of a record's one image."""
    for key in ("video", "videos"):
        if source.get(key):
            raise UnusableRecord("video", f"{source[key]!r:.80}")
    for key in _OTHER_MEDIA:
        if source.get(key):
            raise UnusableRecord("unknown-layout", f"there is `{key}`: {source[key]!r:.80}")
    if not named:
        named = _inline(entries)
    if len(named) > 1:
        raise UnusableRecord("several-images", f"{len(named)} images")
    if named:
        return named[0]
    texts = [entry.text for entry in entries if isinstance(entry.text, str)]
    if mark := next((mark for mark in _MARKS if any(mark in text for text in texts)), None):
        raise UnusableRecord("image-not-named", f"a text holds {mark!r}, but neither `image` nor `images` names a file")
    for key, value in source.items():
        if key != "id" and any(isinstance(one, str) and _PICTURE_FILE.fullmatch(one) for one in _listed(value)):
            raise UnusableRecord("image-not-named", f"expected `image` or `images`, got `{key}`: {value!r:.80}")
    raise UnusableRecord("text-only", "there is no image")


def _inline(entries: list[_Entry]) -> list[str]:
    """Return the paths of the images that stand in texts, and put placeholders in their place."""
    paths: list[str] = []
    for entry in entries:
        if entry.role == "question" and isinstance(entry.text, str):
            paths += (path.strip() for path in _INLINE.findall(entry.text))
            entry.text = _INLINE.sub(PLACEHOLDER, entry.text)
    return [path for path in paths if path]


def _listed(value: Any) -> list[Any]:  # noqa: ANN401 it is what a file says
    return value if isinstance(value, list) else [value]


def _first_of(source: dict[str, Any]) -> object:
    return next((source[key] for key in _TURNS if key in source), None)
