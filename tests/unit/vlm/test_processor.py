"""Prompts, labels and side-cars against what the original codes make of the same conversations."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from pgp_lightning.errors import ConfigError
from pgp_lightning.vlm.internvl import TEMPLATES
from pgp_lightning.vlm.llava import VICUNA
from pgp_lightning.vlm.loading import load_tokenizer
from pgp_lightning.vlm.processor import PLACEHOLDER, ChatTemplate, Message, Processor, PromptOrder, read_side_car
from pgp_lightning.vlm.tiles import TileRule
from tests.tiny import GOLDEN, RULE, golden, tiny_processor

CHATS = golden("internvl_prompts/chat_prompts.json")
SAMPLES = golden("internvl_prompts/training_samples.json")
VICUNA_CHATS = golden("llava15/vicuna_v1_prompts.json")
# Known here, to see that the template can say it; models with it are refused for their language model.
PHI3 = ChatTemplate(
    TEMPLATES["Hermes-2"].system,
    separator="<|end|>",
    user="<|user|>\n",
    assistant="<|assistant|>\n",
    system_open="<|system|>\n",
    stop="<|end|>",
    between="",
)
EVERY = {**TEMPLATES, "phi3-chat": PHI3}
ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


class Text:
    """A tokenizer whose tokens are characters and whose specials are single ids, to read a prompt back as text."""

    unk_token_id = None
    specials = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<image>", "<s>", "</s>", "<|end|>")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        for number, special in enumerate(self.specials):
            text = text.replace(special, chr(0xE000 + number))
        return [ord(character) for character in text]

    def decode(self, ids: list[int]) -> str:
        text = "".join(map(chr, ids))
        for number, special in enumerate(self.specials):
            text = text.replace(chr(0xE000 + number), special)
        return text


def reader(template: ChatTemplate) -> Processor:
    return Processor(Text(), TileRule(), template, 999)  # type: ignore[arg-type]


def toy(name: str, template: str) -> Processor:
    """Return the toy tokenizer of that name with a template, as loading would put them together."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(GOLDEN / "internvl_tokenizers" / name)
    begin = "<s>" if name == "internlm2" else ""
    template_ = TEMPLATES[template]
    return Processor(tokenizer, TileRule(), ChatTemplate(**{**vars(template_), "begin": begin}), 999)


def case_name(case: dict[str, Any]) -> str:
    return "-".join(str(case[key]) for key in ("tokenizer", "template", "case", "id") if key in case)


@pytest.mark.parametrize("case", CHATS, ids=case_name)
def test_a_chat_is_the_original_prompt(case: dict[str, Any]):
    processor = reader(EVERY[case["template"]])
    messages = []
    for question, answer in case["history"] or []:
        messages += [Message("user", question), Message("assistant", answer)]
    question = case["question"]
    if case["num_patches"] and not messages and "<image>" not in question:
        question = f"<image>\n{question}"
    messages.append(Message("user", question))
    counts = [tiles * case["num_image_token"] for tiles in case["num_patches"] or []]
    ids, labels = processor.conversation(messages, counts)
    # The prompts of the original are rendered without the tokenizer's <s>.
    assert processor.tokenizer.decode(ids) == case["prompt"]
    assert processor.tokenizer.decode([processor.stop_id]) == case["eos_token"]
    supervised = [one for one in labels if one != -100]
    history = "".join(answer + processor.template.stop for _, answer in case["history"] or [])
    assert processor.tokenizer.decode(supervised) == history


def test_every_generation_is_covered():
    assert {case["template"] for case in CHATS} == set(EVERY)
    assert {case["template"] for case in SAMPLES} == set(TEMPLATES)


@pytest.mark.parametrize("case", SAMPLES, ids=case_name)
def test_ids_and_labels_of_training_are_the_original_ones(case: dict[str, Any]):
    processor = toy(case["tokenizer"], case["template"])
    messages = [Message(ROLES[part["from"]], part["value"]) for part in case["conversations"]]  # type: ignore[arg-type]
    counts = [] if case["text_only"] else [tiles * case["tokens_per_tile"] for tiles in case["num_tiles"]]
    ids, labels = processor.conversation(messages, counts)
    assert ids == case["input_ids"] and labels == case["labels"]
    assert processor.tokenizer.decode([i for i in labels if i != -100]) == case["supervised"]


ABOUT_ONE_IMAGE = [
    case
    for case in SAMPLES
    if not case["text_only"] and len(case["num_tiles"]) == 1 and case["conversations"][0]["from"] == "human"
]


@pytest.mark.parametrize("case", ABOUT_ONE_IMAGE, ids=case_name)
def test_a_prompt_of_one_turn_is_the_beginning_of_the_training_sample(case: dict[str, Any]):
    question, answer = case["conversations"][:2]
    processor = toy(case["tokenizer"], case["template"])
    first = question["value"].startswith("<image>")
    text = question["value"].replace("<image>", "").strip("\n")
    prompt = processor.prompt(text, answer["value"], "image_first" if first else "question_first")
    count = case["num_tiles"][0] * case["tokens_per_tile"]
    ids = [*prompt.before, *[processor.context_id] * count, *prompt.after, *prompt.answer]
    assert ids == case["input_ids"][: len(ids)]
    assert [i for i in case["labels"] if i != -100][: len(prompt.answer)] == prompt.answer
    assert processor.prompt_length(text, answer["value"], count) == len(ids)


WITH_SYSTEM = [case for case in SAMPLES if not case["text_only"] and case["conversations"][0]["from"] == "system"]


@pytest.mark.parametrize("case", WITH_SYSTEM, ids=case_name)
def test_a_prompt_with_a_system_text_is_the_beginning_of_the_training_sample(case: dict[str, Any]):
    system, question, answer = (part["value"] for part in case["conversations"][:3])
    processor = toy(case["tokenizer"], case["template"])
    order: PromptOrder = "image_first" if question.startswith("<image>") else "question_first"
    prompt = processor.prompt(question.replace("<image>", "").strip("\n"), answer, order, system)
    count = case["num_tiles"][0] * case["tokens_per_tile"]
    ids = [*prompt.before, *[processor.context_id] * count, *prompt.after, *prompt.answer]
    assert system in processor.tokenizer.decode(prompt.before) and ids == case["input_ids"][: len(ids)]


@pytest.mark.parametrize("system", ["Answer in French.", "\u7528\u4e2d\u6587", "", None])
@pytest.mark.parametrize("order", ["image_first", "question_first"])
@pytest.mark.parametrize("name", [*EVERY, "vicuna"])
def test_a_system_text_takes_the_place_of_the_templates_own(name: str, order: PromptOrder, system: str | None):
    template = {**EVERY, "vicuna": VICUNA}[name]
    processor = reader(template)
    prompt = processor.prompt("What?", "Red", order, system)
    text = f"What?\n{PLACEHOLDER}" if order == "question_first" else f"{PLACEHOLDER}\nWhat?"
    messages = [Message("user", text), Message("assistant", "Red")]
    if system is not None:
        messages.insert(0, Message("system", system))
    ids, _ = processor.conversation(messages, [5])
    found = [*prompt.before, *[processor.context_id] * 5, *prompt.after, *prompt.answer]
    assert found == ids[: len(found)] and len(found) == processor.prompt_length("What?", "Red", 5, system)
    before = processor.tokenizer.decode(prompt.before)
    assert (template.system in before) == (system is None or not template.system) and (system or "") in before
    if system == "":
        assert not template.system_open or template.system_open not in before
    if system is not None:
        assert processor.fits("What?", "Red", 5, len(found), system)
        assert not processor.fits("What?", "Red", 5, len(found) - 1, system)


PIECES = ("a", "Z", " ", "  ", "\n", "\t", "\r\n", "<", ">", "|", "12345", "what is", "'s", "~", "\0", "<|im_end|>")


def random_text(generator: random.Random, more: tuple[str, ...]) -> str:
    return "".join(generator.choices(PIECES + more, k=generator.randrange(1, 30)))


@pytest.mark.parametrize("name", ["internlm2", "internlm2_spm", "qwen", "qwen2_bpe"])
@pytest.mark.parametrize("template", [*TEMPLATES, "vicuna"])
def test_what_fits_is_what_is_no_longer_than_the_budget(name: str, template: str, monkeypatch: pytest.MonkeyPatch):
    tokenizer = load_tokenizer(GOLDEN / "internvl_tokenizers" / name)
    processor = Processor(tokenizer, TileRule(), {**TEMPLATES, "vicuna": VICUNA}[template], 999)
    generator, others = random.Random(name + template), ("\u00e9", "\u9e7f", "\ufdfa")
    texts = [(random_text(generator, more), random_text(generator, more)) for more in ((), others) for _ in range(60)]
    for question, answer in texts:
        length = processor.prompt_length(question, answer, 7)
        for budget in (length - 1, length, length + 5, length + 40):
            assert processor.fits(question, answer, 7, budget) == (length <= budget), (question, answer, budget)

    system = "In French, in capitals. " * 9
    length = processor.prompt_length("what", "this", 7, system)
    assert length > processor.prompt_length("what", "this", 7) and processor.fits("what", "this", 7, length, system)
    assert not processor.fits("what", "this", 7, length - 1, system)

    def refuse(*_: Any, **__: Any) -> list[int]:
        raise AssertionError("tokenised")

    monkeypatch.setattr(tokenizer, "encode", refuse)
    around = processor._slots_around_texts
    assert around is not None and around < 200
    for question, answer in texts[:60]:
        assert processor.fits(question, answer, 7, 7 + around + len(question) + len(answer))
        with pytest.raises(AssertionError, match="tokenised"):
            processor.fits(question, answer, 7, 6 + around + len(question) + len(answer))
    with pytest.raises(AssertionError, match="tokenised"):
        processor.fits("\u00e9", "a", 7, 10_000)


def test_a_template_whose_words_around_a_question_are_not_ascii_gives_no_bound():
    processor = replace(toy("qwen", "Hermes-2"), template=ChatTemplate(user="<|im_start|>\u9e7f: "))
    assert processor._slots_around_texts is None
    length = processor.prompt_length("what", "this", 3)
    assert processor.fits("what", "this", 3, length) and not processor.fits("what", "this", 3, length - 1)


@pytest.mark.parametrize("case", VICUNA_CHATS, ids=case_name)
def test_a_vicuna_chat_is_the_original_prompt(case: dict[str, Any]):
    processor = reader(VICUNA)
    messages = []
    for question, answer in case["turns"]:
        messages.append(Message("user", question))
        if answer is not None:
            messages.append(Message("assistant", answer))
    images = sum(question.count("<image>") for question, _ in case["turns"])
    ids, labels = processor.conversation(messages, [3] * images)
    assert processor.tokenizer.decode(ids) == "<s>" + case["prompt"].replace("<image>", "<image>" * 3)
    answers = "".join(f" {answer}</s>" for _, answer in case["turns"] if answer is not None)
    assert processor.tokenizer.decode([i for i in labels if i != -100]) == answers


def test_llava_with_the_question_before_and_behind_the_image():
    processor = reader(VICUNA)
    system = VICUNA.system
    for order, before, after in (
        ("image_first", "USER: ", "\nWhat? ASSISTANT:"),
        ("question_first", "USER: What?\n", " ASSISTANT:"),
    ):
        prompt = processor.prompt("What?", "Red", order)  # type: ignore[arg-type]
        parts = [processor.tokenizer.decode(part) for part in (prompt.before, prompt.after, prompt.answer)]
        assert parts == [f"<s>{system} {before}", after, " Red</s>"]


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_blind_prompts_are_the_same_in_both_orders(name: str):
    template = TEMPLATES[name]
    assert template.render(None, "question_first") == template.render(None, "image_first")


def test_without_system():
    template = ChatTemplate()
    assert template.render("Q", "image_first") == (
        "<|im_start|>user\n<img>", "</img>\nQ<|im_end|>\n<|im_start|>assistant\n"
    )  # fmt: skip
    assert ChatTemplate("S", "|", "U:", "A:").render("Q", "question_first") == (
        "<|im_start|>system\nS|U:Q\n<img>", "</img>|A:"
    )  # fmt: skip


def test_an_answer_that_melts_into_the_prompt_is_tokenised_by_itself():
    class Greedy(Text):
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return super().encode(text.replace("\n\n", "\x00"))

    processor = Processor(Greedy(), TileRule(), ChatTemplate(), 999)  # type: ignore[arg-type]
    prompt = processor.prompt("Q", "\nA", "image_first")
    assert processor.tokenizer.decode(prompt.after).endswith("assistant\n")
    assert processor.tokenizer.decode(prompt.answer) == "\nA<|im_end|>"


@pytest.mark.parametrize(
    ("messages", "counts", "message"),
    [
        ([("user", "<image>\nQ")], [], "hold 1 <image> for 0 images"),
        ([("user", "Q")], [4], "hold 0 <image> for 1 images"),
        ([("system", "<image>"), ("user", "Q")], [4], "may stand in the user's turns only"),
        ([("user", "<image>"), ("assistant", "<image>")], [4], "may stand in the user's turns only"),
        ([("assistant", "A")], [], "expected turns of user and assistant"),
        ([("user", "Q"), ("user", "Q")], [], "expected turns of user and assistant"),
        ([("user", "Q"), ("system", "S")], [], "expected turns of user and assistant"),
        ([], [], "expected turns of user and assistant"),
    ],
)
def test_a_wrong_conversation(messages: list[tuple[Any, str]], counts: list[int], message: str):
    with pytest.raises(ValueError, match=message):
        reader(ChatTemplate()).conversation([Message(*part) for part in messages], counts)


def test_a_tokenizer_of_another_model_is_found_out():
    processor = Processor(tiny_processor().tokenizer, RULE, VICUNA, 64)
    with pytest.raises(ConfigError, match="must know '<image>' as one token, it gives"):
        _ = processor.context_id


def test_a_side_car_survives_the_disk(tmp_path: Path):
    processor = Processor(tiny_processor().tokenizer, RULE, ChatTemplate("系统", "<|im_end|>"), 77)
    processor.save(tmp_path)
    facts = read_side_car(tmp_path)
    assert facts == {"family": "internvl", "rule": RULE, "template": processor.template, "max_length": 77}
    assert read_side_car(tmp_path / "elsewhere") is None


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"rule": {}, "template": {}}', '{"rule": {"tile": 3}, "template": {}}', '{"rule": {}}']
)
def test_a_damaged_side_car(tmp_path: Path, text: str):
    (tmp_path / "vlm.json").write_text(text)
    with pytest.raises(ConfigError, match="damaged or of another version"):
        read_side_car(tmp_path)


def test_an_old_side_car_still_reads(tmp_path: Path):
    template = {"system": "", "separator": "", "user": "", "assistant": "<|im_start|>"}
    rule = {"tile_size": 32, "tokens_per_side": 2, "min_tiles": 1, "max_tiles": 4, "thumbnail": True}
    facts = {"family": "internvl", "rule": rule, "template": template, "max_length": 64}
    (tmp_path / "vlm.json").write_text(json.dumps(facts))
    found = read_side_car(tmp_path)
    assert found is not None and found["rule"] == RULE and found["template"].stop == "<|im_end|>"
