"""What is known of a model without its weights: tokenizer, tile rule, chat format, and prompts made of them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from pgp_lightning.errors import ConfigError
from pgp_lightning.vlm.tiles import TileRule

__all__ = [
    "SIDE_CAR",
    "ChatTemplate",
    "Message",
    "Processor",
    "PromptIds",
    "PromptOrder",
    "read_side_car",
    "write_side_car",
]

SIDE_CAR = "vlm.json"
PLACEHOLDER = "<image>"  # where an image stands in a message; no token of any model
IGNORED = -100
PromptOrder = Literal["question_first", "image_first"]


class Message(NamedTuple):
    """A part of a conversation; images stand in a user's text as `<image>`."""

    role: Literal["system", "user", "assistant"]
    text: str


@dataclass(frozen=True)
class PromptIds:
    """Token ids of one turn around its visual tokens: `before` ends and `after` begins where they stand."""

    before: list[int]
    after: list[int]
    answer: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class ChatTemplate:
    """The chat format of a generation of a family.

    Args:
        system: text of the system block, empty for none.
        separator: what ends the system's and the user's block.
        user: what opens the user's block.
        assistant: what opens the assistant's block; a prompt ends with it.
        begin: what opens the conversation, e.g. <s> of tokenizers that want it.
        system_open: what opens the system's block.
        image_open: what stands before an image's visual tokens.
        image_close: what stands behind them.
        context: the token whose slots visual tokens take.
        answer_open: what stands before an answer and is predicted with it.
        stop: what ends an answer; predicted, and where generation stops.
        between: what stands between an answer's end and the next turn; never predicted.
    """

    system: str = ""
    separator: str = "<|im_end|>\n"
    user: str = "<|im_start|>user\n"
    assistant: str = "<|im_start|>assistant\n"
    begin: str = ""
    system_open: str = "<|im_start|>system\n"
    image_open: str = "<img>"
    image_close: str = "</img>"
    context: str = "<IMG_CONTEXT>"
    answer_open: str = ""
    stop: str = "<|im_end|>"
    between: str = "\n"

    def opening(self, system: str | None = None) -> str:
        """Return what stands before the first turn, with another system text if one is given."""
        system = self.system if system is None else system
        return self.begin + (f"{self.system_open}{system}{self.separator}" if system else "")

    def render(self, question: str | None, order: PromptOrder, system: str | None = None) -> tuple[str, str]:
        """Return the text before the visual tokens and after them, up to where the answer begins.

        Args:
            question: the user's words; None leaves them out (the question-blind reconstruction pass).
            order: native (`image_first`), or `question_first`, in which the visual tokens can see the question.
            system: text of the system block in place of the template's own, empty for none.
        """
        before, after = self.opening(system) + self.user, self.image_close
        if question is not None and order == "question_first":
            before += f"{question}\n"
        elif question is not None:
            after += f"\n{question}"
        return before + self.image_open, f"{after}{self.separator}{self.assistant}"


@dataclass(frozen=True)
class Processor:
    """What data and guides need to know of a model before its weights are there; picklable for worker processes.

    Args:
        tokenizer: transformers' own.
        rule: how images become tiles.
        template: the chat format.
        max_length: longest sequence the language model was made for, in slots.
        family: name of the model's family.
    """

    tokenizer: PreTrainedTokenizerBase
    rule: TileRule
    template: ChatTemplate
    max_length: int
    family: str = "internvl"

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, special tokens in it recognised and none added."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    @property
    def context_id(self) -> int:
        """Id of the token whose slots visual tokens take."""
        return self._single(self.template.context)

    @property
    def stop_id(self) -> int:
        """Id of the token that ends an answer."""
        return self._single(self.template.stop)

    def prompt(
        self, question: str | None, answer: str | None, order: PromptOrder, system: str | None = None
    ) -> PromptIds:
        """Return the ids of one turn; the answer's, if given, end with the stop token.

        Args:
            question: the user's words; None leaves them out.
            answer: of the assistant; None for a prompt.
            order: of question and image.
            system: text of the system block in place of the template's own, empty for none.

        Raises:
            ConfigError: if a text holds a placeholder of images.
        """
        self._without_images(question or "", answer or "", system or "")
        before, after = self.template.render(question, order, system)
        ids = self.encode(after)
        return PromptIds(self.encode(before), ids, [] if answer is None else self._answer(after, ids, answer))

    def next_turn(self, question: str) -> list[int]:
        """Return the ids of a later turn, behind the stop token of the answer before it.

        Raises:
            ConfigError: if the question holds a placeholder of images.
        """
        self._without_images(question)
        template = self.template
        return self.encode(f"{template.between}{template.user}{question}{template.separator}{template.assistant}")

    def check_length(self, slots: int, what: str = "the prompt") -> None:
        """Look whether so many prompt slots are within what the language model was made for.

        Raises:
            ConfigError: if they are not.
        """
        if slots > self.max_length:
            raise ConfigError(
                f"{what} takes {slots:,} slots and the model was made for {self.max_length:,}, beyond which it answers "
                "noise: shorten the question, or tile the image into fewer tiles (max_tiles)"
            )

    def prompt_length(self, question: str, answer: str, visual_tokens: int, system: str | None = None) -> int:
        """Return how many prompt slots a turn takes."""
        ids = self.prompt(question, answer, "question_first", system)
        return len(ids.before) + visual_tokens + len(ids.after) + len(ids.answer)

    def fits(self, question: str, answer: str, visual_tokens: int, budget: int, system: str | None = None) -> bool:
        """Say whether a turn takes at most so many prompt slots; it is tokenised only if its characters leave a doubt.

        A tokenizer makes at most one token of an ASCII character. That holds for bytes, characters and words, and no
        Unicode normalisation touches ASCII. A turn with a system text of its own is always tokenised.
        """
        around, most = None if system is not None else self._slots_around_texts, sys.maxsize
        if around is not None and question.isascii() and answer.isascii():
            most = around + len(question) + len(answer) + visual_tokens
        return most <= budget or self.prompt_length(question, answer, visual_tokens, system) <= budget

    @cached_property
    def _slots_around_texts(self) -> int | None:
        """The most slots that a prompt takes besides a question and an answer of as many tokens as characters.

        Added tokens cut a text, and what lies between two of them is tokenised by itself. None if a part that holds a
        question or an answer has other characters than ASCII, of which a token's number is not known.
        """
        added, mark, slots = self.tokenizer.get_added_vocab(), "\0", 0
        cut = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or r"(?!)")
        before, after = self.template.render(mark, "question_first")
        for text in (before, after, self.template.answer_open + mark + self.template.stop):
            slots += len(cut.findall(text))
            for part in cut.split(text):
                if mark not in part:
                    slots += len(self.encode(part))
                elif part.isascii():
                    slots += len(part) - len(mark) + 1  # some tokenizers put a space before each part
                else:
                    return None
        return slots

    def conversation(self, messages: Sequence[Message], visual_tokens: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return ids and labels of a conversation of any number of turns and images.

        Every answer and the stop token behind it are supervised, and nothing else. A conversation that ends with the
        user's turn becomes a prompt, which ends where the answer begins.

        Args:
            messages: an optional system message (the template's own text by default), then turns.
            visual_tokens: number of visual tokens of each `<image>`, in order.

        Returns:
            Token ids and, of the same length, labels, -100 where nothing is predicted.

        Raises:
            ValueError: if placeholders and images differ in number, stand elsewhere, or roles do not alternate.
        """
        messages, template, left = list(messages), self.template, list(visual_tokens)
        system = messages.pop(0).text if messages and messages[0].role == "system" else None
        wanted = ["user", "assistant"] * len(messages)
        if not messages or [message.role for message in messages] != wanted[: len(messages)]:
            raise ValueError(f"expected turns of user and assistant, got {[m.role for m in messages]}")
        if PLACEHOLDER in (system or "") + "".join(m.text for m in messages if m.role == "assistant"):
            raise ValueError(f"{PLACEHOLDER} may stand in the user's turns only")
        if template.context != PLACEHOLDER and any(template.context in m.text for m in messages):
            raise ValueError(f"texts may not hold {template.context}, whose slots an image takes: write {PLACEHOLDER}")
        placed = sum(message.text.count(PLACEHOLDER) for message in messages)
        if placed != len(left):
            raise ValueError(f"the user's turns hold {placed} {PLACEHOLDER} for {len(left)} images")
        ids: list[int] = []
        labels: list[int] = []
        run, head, head_ids = template.opening(system), "", list[int]()
        for message in messages:
            if message.role == "user":
                run += f"{template.user}{message.text}{template.separator}{template.assistant}"
                first, *rest = run.split(PLACEHOLDER)
                # Text between images is tokenised by itself, as by the original codes.
                *parts, head = [first, *(template.image_close + part for part in rest)]
                for part in parts:
                    ids += self.encode(part + template.image_open) + [self.context_id] * left.pop(0)
                head_ids = self.encode(head)
                ids += head_ids
                labels += [IGNORED] * (len(ids) - len(labels))
            else:
                answer = self._answer(head, head_ids, message.text)
                ids, labels, run = ids + answer, labels + answer, template.between
        if messages[-1].role == "assistant":
            ids += self.encode(run)
        return ids, labels + [IGNORED] * (len(ids) - len(labels))

    def save(self, folder: Path) -> None:
        """Write tokenizer and side-car into a folder."""
        self.tokenizer.save_pretrained(folder)
        write_side_car(folder, self.family, self.rule, self.template, self.max_length)

    def _answer(self, head: str, head_ids: list[int], answer: str) -> list[int]:
        """Return the ids of an answer as they follow its prompt's text, the stop token last."""
        text = self.template.answer_open + answer + self.template.stop
        ids = self.encode(head + text)
        # A tokenizer may draw the prompt's last characters and the answer's first ones into one token. Then what is
        # generated token by token is the answer by itself.
        return ids[len(head_ids) :] if ids[: len(head_ids)] == head_ids else self.encode(text)

    def _without_images(self, *texts: str) -> None:
        for mark in (PLACEHOLDER, self.template.context):
            if any(mark in text for text in texts):
                raise ConfigError(
                    f"a question, an answer or a system text holds {mark}, which stands for an image's visual tokens: "
                    "leave it out, the image comes into the prompt by itself (`Processor.conversation` takes <image>)"
                )

    def _single(self, text: str) -> int:
        ids = self.encode(text)
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            raise ConfigError(f"the tokenizer must know {text!r} as one token, it gives {ids}: it is of another model")
        return ids[0]


def write_side_car(folder: Path, family: str, rule: TileRule, template: ChatTemplate, max_length: int) -> None:
    """Write what transformers' files have no place for: tile rule, chat format, length limit."""
    facts = {"family": family, "rule": asdict(rule), "template": asdict(template), "max_length": max_length}
    (folder / SIDE_CAR).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_side_car(folder: Path) -> dict[str, Any] | None:
    """Read a folder's side-car with `rule` and `template` as objects; None if there is none.

    Raises:
        ConfigError: if it is not what `write_side_car` writes.
    """
    path = folder / SIDE_CAR
    if not path.is_file():
        return None
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if set(facts) != {"family", "rule", "template", "max_length"}:
            raise ValueError(f"it holds {', '.join(sorted(facts))}")
        return {**facts, "rule": TileRule(**facts["rule"]), "template": ChatTemplate(**facts["template"])}
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} is damaged or of another version ({error}): export or convert again") from error
