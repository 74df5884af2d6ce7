"""The InternVL family: its chat format, where its parts are, and how a checkpoint in transformers' layout is loaded.

A folder of the family holds transformers' own files (`config.json`, `model.safetensors`, tokenizer) and `vlm.json`,
which keeps what transformers' configuration has no place for: tile rule, system prompt, separator, length limit.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerFast

from pgp_lightning.errors import ConfigError
from pgp_lightning.vlm.tiles import TileRule

__all__ = ["ChatTemplate", "InternVL", "Processor", "PromptIds", "PromptOrder", "load_processor", "resolve_base"]

SIDE_CAR = "vlm.json"
PromptOrder = Literal["question_first", "image_first"]
# The pixel statistics of ImageNet, with which every InternViT was trained.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class PromptIds:
    """Token ids of one turn around its visual tokens: `before` ends with <img>, `after` begins with </img>."""

    before: list[int]
    after: list[int]
    answer: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class ChatTemplate:
    """The chat format of a generation of the family.

    Args:
        system: text of the system block, empty for none.
        separator: what ends a block (InternVL2.5 and 3: with a newline; InternVL2: without).
        user: what opens the user's block.
        assistant: what opens the assistant's block.
    """

    system: str = ""
    separator: str = "<|im_end|>\n"
    user: str = "<|im_start|>user\n"
    assistant: str = "<|im_start|>assistant\n"

    def render(self, question: str | None, order: PromptOrder) -> tuple[str, str]:
        """Return the text before the visual tokens, up to <img>, and after them, up to the assistant's turn.

        Args:
            question: the user's words; None leaves them out (the question-blind reconstruction pass).
            order: native (`image_first`), or `question_first`, in which the visual tokens can see the question.
        """
        before = f"<|im_start|>system\n{self.system}{self.separator}" if self.system else ""
        before += self.user
        after = "</img>"
        if question is not None and order == "question_first":
            before += f"{question}\n"
        elif question is not None:
            after += f"\n{question}"
        return before + "<img>", f"{after}{self.separator}{self.assistant}"


@dataclass(frozen=True)
class Processor:
    """What is known of a model without its weights: tokenizer, tile rule, chat format and length limit."""

    tokenizer: PreTrainedTokenizerFast
    rule: TileRule
    template: ChatTemplate
    max_length: int

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, special tokens in it recognised and none added."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def prompt(self, question: str | None, answer: str | None, order: PromptOrder) -> PromptIds:
        """Return the ids of one turn; the answer's, if given, end with <|im_end|>."""
        before, after = self.template.render(question, order)
        target = [] if answer is None else self.encode(f"{answer}<|im_end|>")
        return PromptIds(self.encode(before), self.encode(after), target)

    def prompt_length(self, question: str, answer: str, visual_tokens: int) -> int:
        """Return how many prompt slots a turn takes."""
        ids = self.prompt(question, answer, "question_first")
        return len(ids.before) + visual_tokens + len(ids.after) + len(ids.answer)

    def save(self, folder: Path) -> None:
        """Write tokenizer and side-car into a folder."""
        self.tokenizer.save_pretrained(folder)
        rule = asdict(self.rule)
        facts = {"family": "internvl", "rule": rule, "template": asdict(self.template), "max_length": self.max_length}
        (folder / SIDE_CAR).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def resolve_base(base: str) -> Path:
    """Return the folder of a model: `embedded:NAME` for one of the package's own, or a local folder.

    Raises:
        ConfigError: if there is no such folder or it is not one of this family.
    """
    if base.startswith("embedded:"):
        folder = Path(__file__).parents[1] / "embedded" / "models" / base.removeprefix("embedded:")
        known = ", ".join(sorted(f"embedded:{p.name}" for p in folder.parent.glob("*") if p.is_dir()))
        hint = f"the package holds {known or 'none'}"
    else:
        folder = Path(base).expanduser()
        hint = "give a local folder that holds config.json, model.safetensors, a tokenizer and vlm.json"
    if not (folder / "config.json").is_file() or not (folder / SIDE_CAR).is_file():
        raise ConfigError(f"no model of the InternVL family at {base!r}: {hint}")
    return folder


def load_processor(base: str) -> Processor:
    """Load tokenizer, tile rule and chat format of a model (no weights; cheap enough for data workers).

    Raises:
        ConfigError: if the folder is not there or its side-car is of another family.
    """
    folder = resolve_base(base)
    facts: dict[str, Any] = json.loads((folder / SIDE_CAR).read_text(encoding="utf-8"))
    if facts.get("family") != "internvl":
        raise ConfigError(f"{folder / SIDE_CAR} must say family 'internvl', got {facts.get('family')!r}")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return Processor(tokenizer, TileRule(**facts["rule"]), ChatTemplate(**facts["template"]), facts["max_length"])


class InternVL:
    """A model of the family seen from outside: its parts by name, its processor, its base.

    Args:
        model: transformers' own model, unmodified.
        processor: its processor.
        base: where it came from.
    """

    def __init__(self, model: InternVLForConditionalGeneration, processor: Processor, base: str) -> None:
        self.model, self.processor, self.base = model, processor, base

    @classmethod
    def load(cls, base: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> InternVL:
        """Load a model from a folder in transformers' layout (safetensors only).

        Raises:
            ConfigError: if the folder is not there.
        """
        folder = resolve_base(base)
        model = InternVLForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention, use_safetensors=True
        )
        return cls(model, load_processor(base), base)

    @property
    def decoder(self) -> nn.Module:
        """The language model without its head."""
        decoder: nn.Module = self.model.model.language_model
        return decoder

    @property
    def width(self) -> int:
        """Hidden size d of the language model."""
        return int(self.model.get_input_embeddings().get_parameter("weight").shape[1])

    def visual_tokens(self, tiles: Tensor) -> Tensor:
        """Encode and project tiles: uint8 (T, 3, S, S) to visual tokens (T, n, d) in the model's dtype."""
        pixels = self.normalise(tiles, self.model.dtype)
        features: Tensor = self.model.get_image_features(pixel_values=pixels).pooler_output
        return features

    @staticmethod
    def normalise(tiles: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Turn uint8 tiles (T, 3, S, S) into the pixels the vision tower was trained on, on the tiles' device."""
        mean = torch.tensor(_MEAN, device=tiles.device).view(3, 1, 1)
        std = torch.tensor(_STD, device=tiles.device).view(3, 1, 1)
        return ((tiles.to(torch.float32) / 255 - mean) / std).to(dtype)
