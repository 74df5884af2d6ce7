"""Settings of a checkpoint that may stand in several files: all are read, and have to agree.

transformers 4 writes `preprocessor_config.json`, transformers 5 one `processor_config.json` with an `image_processor`
inside; a chat template has four places. Whoever fine-tunes, saves and copies ends up with some of each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig, PreTrainedTokenizerBase

from pgp_lightning.errors import ConfigError
from pgp_lightning.vlm.processor import ChatTemplate

__all__ = [
    "CONFIG",
    "Setting",
    "agreed",
    "check_chat_format",
    "check_pixels",
    "image_files",
    "read_object",
    "side_of",
    "text_length",
]

CONFIG, _OLD, _NEW = "config.json", "preprocessor_config.json", "processor_config.json"


class Setting(NamedTuple):
    """A value, and where it stands."""

    value: Any
    source: str


def image_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what a checkpoint says of its images, by file; {} for one that says nothing, or is not there.

    Raises:
        ConfigError: if a file is no JSON object.
    """
    return {_OLD: _read(folder / _OLD), _NEW: _read(folder / _NEW).get("image_processor") or {}}


def agreed(folder: Path, name: str, places: Mapping[str, Any], default: Setting | None = None) -> Setting:
    """Return the value that every place gives which gives one.

    Args:
        folder: the checkpoint, for messages.
        name: of the setting, for messages.
        places: the value by place, None where it is silent.
        default: what holds if all are silent.

    Raises:
        ConfigError: if two places contradict each other, or all are silent and there is no default.
    """
    said = {place: value for place, value in places.items() if value is not None}
    if len({json.dumps(value) for value in said.values()}) > 1:
        listed = " and ".join(f"{value} in {place}" for place, value in said.items())
        raise ConfigError(f"{folder}: {name} is {listed}: make the files agree, or delete the one that is out of date")
    if said:
        return Setting(next(iter(said.values())), " and ".join(said))
    if default is None:
        raise ConfigError(
            f"{folder}: {name} stands in {' or '.join(places)}, and none of them says it: copy the file from the model "
            "that this one was made of"
        )
    return default


def side_of(value: Any) -> int | None:  # noqa: ANN401
    """Return a size of images that transformers writes as a number, a pair, or an object; None for None."""
    if isinstance(value, Mapping):
        value = next((value[key] for key in ("height", "shortest_edge") if value.get(key) is not None), None)
    elif isinstance(value, Sequence):
        value = value[0]
    return None if value is None else int(value)


def check_pixels(
    folder: Path, files: Mapping[str, Mapping[str, Any]], mean: Sequence[float], std: Sequence[float]
) -> None:
    """Look whether pixels are normalised as the family does it.

    Raises:
        ConfigError: if a file says otherwise.
    """
    for name, values in files.items():
        for key, ours in (("image_mean", mean), ("image_std", std)):
            theirs = values.get(key)
            if theirs is not None and any(abs(a - b) > 1e-3 for a, b in zip(theirs, ours, strict=True)):
                raise ConfigError(
                    f"{folder}: {key} is {theirs} in {name}, and pixels of this family are normalised by {list(ours)}: "
                    "a vision tower that was trained on others is not supported"
                )


def text_length(text: Mapping[str, Any], default: str, tokenizer: PreTrainedTokenizerBase | None) -> Setting:
    """Return the longest sequence that a language model was made for.

    Args:
        text: its part of `config.json`, from which transformers leaves out what equals its own default.
        default: the model type that a part without one has.
        tokenizer: whose limit is named if it is another one, and does not count: it is that of the fine-tuning's texts.
    """
    if "max_position_embeddings" in text:
        value, source = int(text["max_position_embeddings"]), CONFIG
    else:
        kind = str(text.get("model_type") or default)
        value, source = int(AutoConfig.for_model(kind).max_position_embeddings), f"transformers' default for {kind}"
    limit = None if tokenizer is None else tokenizer.model_max_length
    if limit is not None and limit != value and limit < 10**9:  # transformers writes 1e30 for none
        source += f"; the tokenizer says {limit:,}"
    return Setting(value, source)


def check_chat_format(folder: Path, tokenizer: PreTrainedTokenizerBase | None, template: ChatTemplate) -> str:
    """Look whether the chat templates of a checkpoint, wherever they stand, ask a question as the family does.

    The text of the system's block is left to the family: converted checkpoints leave it out.

    Returns:
        The places that have one.

    Raises:
        ConfigError: if one asks otherwise.
    """
    if tokenizer is None:
        return ""
    places = {
        "the tokenizer's chat template": tokenizer.chat_template,
        "chat_template.json": _read(folder / "chat_template.json").get("chat_template"),
        _NEW: _read(folder / _NEW).get("chat_template"),
    }
    said = {place: text for place, text in places.items() if isinstance(text, str)}
    wanted = f"{template.user}?{template.separator}{template.assistant}"
    for place, text in said.items():
        asked = _asked(tokenizer, text)
        if asked is not None and not asked.endswith(wanted):
            raise ConfigError(
                f"{folder}: {place} asks a question as {asked[-80:]!r}, the family as {wanted!r}: the model was "
                "fine-tuned on another chat format, which is not supported; or delete the template if it is not its own"
            )
    return " and ".join(said)


def _asked(tokenizer: PreTrainedTokenizerBase, template: str) -> str | None:
    """Return how a template asks "?", None if it cannot be asked."""
    contents: tuple[Any, ...] = ([{"type": "text", "text": "?"}], "?")
    for content in contents:
        try:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": content}],
                chat_template=template,
                tokenize=False,
                add_generation_prompt=True,
            )
        except Exception:  # a template is a program of its own, and may raise anything
            continue
        if "?" in text:
            return str(text)
    return None


def _read(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def read_object(path: Path) -> dict[str, Any]:
    """Read a file of settings.

    Raises:
        ConfigError: if it cannot be read, or is no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} must be JSON: {error}; copy or download it again") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold an object, got {type(values).__name__}; copy or download it again")
    return values
