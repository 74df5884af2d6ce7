"""The embedded world: questions answered again from the entities, relevant tokens counted pixel by pixel."""

from __future__ import annotations

import hashlib
import io
import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pgp_lightning.embedded.glyphs import GLYPHS, glyph_mask
from pgp_lightning.embedded.pair import build_processor
from pgp_lightning.embedded.records import FAMILIES, EmbeddedRecords
from pgp_lightning.embedded.world import (
    COLOUR_NAMES,
    COLOURS,
    GRID,
    RELEVANT_SHARE,
    RULE,
    SHAPES,
    SPLITS,
    TYPES,
    WORDS,
    WORLD_VERSION,
    Question,
    Scene,
    draw_scene,
    per_token,
)
from pgp_lightning.errors import ConfigError

SCENES = [draw_scene("train", i) for i in range(24)]
# SHA-256 of pixels, questions and relevant tokens. Another value means another world: then WORLD_VERSION rises and
# the models are built again.
WORLD = {
    ("train", 0): "72483a6f0eeee26dd51859907020dcc59d6d1a91748ccd8848cba72beb00b9f8",
    ("val", 1): "4a6b4c94f4359fedc809d304229732ef6dc75364a98bc53511cbf10429802a4b",
    ("test", 2): "7a709db5bba32e24984c18ce3f9c5941dad0bb02e703c23987534f8df505a61e",
}


def answer(scene: Scene, text: str) -> tuple[str, set[int]]:
    """Answer a question by its words alone: what it says, and the entities it is about."""
    objects = {i: e for i, e in enumerate(scene.entities) if e.kind == "object"}

    def one(found: dict[int, Any]) -> tuple[Any, set[int]]:
        assert len(found) == 1, f"{text!r} has {len(found)} referents"
        return next(iter(found.values())), set(found)

    def where(colour: str = "", shape: str = "", char: str = "") -> dict[int, Any]:
        return {
            i: e
            for i, e in objects.items()
            if (not colour or COLOUR_NAMES[e.colour] == colour)
            and (not shape or SHAPES[e.shape] == shape)
            and (not char or e.chars == char)
        }

    if m := re.fullmatch(r"what color is the (\w+)", text):
        entity, who = one(where(shape=m[1]))
        return COLOUR_NAMES[entity.colour], who
    if m := re.fullmatch(r"what shape is (\w+)", text):
        entity, who = one(where(colour=m[1]))
        return SHAPES[entity.shape], who
    if m := re.fullmatch(r"what char is in the (\w+) (\w+)", text):
        entity, who = one(where(m[1], m[2]))
        return entity.chars, who
    if m := re.fullmatch(r"what color has char (\w)", text):
        entity, who = one(where(char=m[1]))
        return COLOUR_NAMES[entity.colour], who
    if m := re.fullmatch(r"how many (\w+) shapes", text):
        found = where(colour=m[1]) if m[1] in COLOUR_NAMES else where(shape=m[1])
        return str(len(found)), set(found)
    if m := re.fullmatch(r"is there a (\w+) (\w+)", text):
        found = where(m[1], m[2])
        return "yes" if found else "no", set(found)
    if m := re.fullmatch(r"read the (\w+) sign", text):
        signs = {i: e for i, e in enumerate(scene.entities) if e.kind == "sign"}
        entity, who = one({i: e for i, e in signs.items() if COLOUR_NAMES[e.colour] == m[1]})
        return " ".join(entity.chars), who
    m = re.fullmatch(r"value of bar (\w)", text)
    assert m, text
    bars = {i: e for i, e in enumerate(scene.entities) if e.kind == "bar"}
    entity, who = one({i: e for i, e in bars.items() if e.chars == m[1]})
    return str(entity.value), who


def test_every_question_is_answered_by_its_words_and_has_unique_referents():
    seen: Counter[str] = Counter()
    for scene in SCENES:
        texts = [question.text for question in scene.questions]
        assert len(set(texts)) == len(texts)
        for question in scene.questions:
            expected, referents = answer(scene, question.text)
            assert (question.answer, set(question.referents)) == (expected, referents), question
            assert question.type in TYPES
            seen[question.type] += 1
    assert set(seen) == set(TYPES) and min(seen.values()) >= 10
    existence = [q.answer for scene in SCENES for q in scene.questions if q.type == "exists"]
    assert 0.3 < existence.count("yes") / len(existence) < 0.85


def test_every_object_that_can_be_asked_for_is():
    for scene in SCENES:
        objects = [e for e in scene.entities if e.kind == "object"]
        texts = {question.text for question in scene.questions}
        for shape, count in Counter(e.shape for e in objects).items():
            assert (f"what color is the {SHAPES[shape]}" in texts) == (count == 1)
        for colour, count in Counter(e.colour for e in objects).items():
            assert (f"what shape is {COLOUR_NAMES[colour]}" in texts) == (count == 1)
        for (colour, shape), count in Counter((e.colour, e.shape) for e in objects).items():
            assert (f"what char is in the {COLOUR_NAMES[colour]} {SHAPES[shape]}" in texts) == (count == 1)


def test_relevant_tokens_equal_a_count_of_pixels():
    rectangles = (GRID.rectangles() * 256).round().astype(int)
    assert GRID.tokens == 320 and RULE.grid(256, 256) == GRID
    for scene in SCENES[:2]:
        owner = scene.owner.tolist()
        for question in scene.questions:
            expected = []
            for left, top, right, bottom in rectangles:
                stride = 4 if right - left == 32 else 2  # the thumbnail shows the picture at half the size
                pixels = [
                    owner[y][x] in question.referents
                    for y in range(top, bottom, stride)
                    for x in range(left, right, stride)
                ]
                assert len(pixels) == 64
                expected.append(sum(pixels) / 64 >= RELEVANT_SHARE)
            assert scene.relevant(question).tolist() == expected
            assert any(expected) == bool(question.referents), question


def test_relevant_tokens_are_few():
    shares = [scene.relevant(q).mean() for scene in SCENES for q in scene.questions if q.referents]
    assert 0.005 < np.mean(shares) < 0.06


def test_token_labels_equal_a_count_of_pixels():
    scene = next(scene for scene in SCENES if {e.kind for e in scene.entities} == {"object", "sign", "bar"})
    rectangles = (GRID.rectangles() * 256).round().astype(int)
    labels = scene.token_labels()
    assert labels.shape == (320, 3)
    for token, (left, top, right, bottom) in enumerate(rectangles):
        stride = 4 if right - left == 32 else 2
        places = [(y, x) for y in range(top, bottom, stride) for x in range(left, right, stride)]
        for kind in range(3):
            counts = Counter(int(scene.labels[kind][place]) for place in places)
            del counts[0]
            covered = sum(scene.owner[place] >= 0 for place in places) >= 64 / 8
            best = max(counts.values(), default=0)
            allowed = {label for label, count in counts.items() if count == best} if covered and best else {0}
            assert labels[token, kind] in allowed


def test_the_picture_shows_the_entities():
    for scene in SCENES:
        for number, entity in enumerate(scene.entities):
            own = scene.owner == number
            rows, columns = np.nonzero(own)
            # Nothing crosses the border of a tile.
            assert rows.min() // 128 == rows.max() // 128 and columns.min() // 128 == columns.max() // 128
            height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
            pixels = scene.image[own].astype(int)
            colour = np.array(COLOURS[COLOUR_NAMES[entity.colour]]) if entity.colour >= 0 else None
            if entity.kind == "object":
                assert max(height, width) <= 32 and own.sum() > 300
                shaded = (abs(pixels - colour) <= 0.15 * colour + 1).all(axis=1)
                black = (pixels == 0).all(axis=1)
                assert (shaded | black).all() and shaded.mean() > 0.6
                ink = glyph_mask(entity.chars).sum()  # the tip of a triangle may be narrower than its glyph
                assert 0.85 * ink <= black.sum() <= ink
            elif entity.kind == "sign":
                assert (height, width) == (24, 48) and (pixels == colour).all(axis=1).mean() > 0.1
                ink = (pixels == 240).all(axis=1).sum()
                assert ink == sum(glyph_mask(glyph).sum() for glyph in entity.chars)
            else:
                assert width == 16 and height == 16 + 8 * entity.value
        assert 4 <= sum(e.kind == "object" for e in scene.entities) <= 7


def test_glyphs_differ():
    masks = {glyph_mask(glyph).tobytes() for glyph in GLYPHS}
    assert len(masks) == len(GLYPHS) == 20
    assert all(30 < glyph_mask(glyph).sum() < 110 for glyph in GLYPHS)


def test_per_token_gathers_what_lies_under_a_token():
    plane = np.arange(256 * 256).reshape(256, 256)
    tokens = per_token(plane)
    for token, rectangle in enumerate(GRID.rectangles()):
        left, top, right, bottom = (rectangle * 256).round().astype(int)
        stride = (right - left) // 8
        assert sorted(tokens[token]) == sorted(plane[top:bottom:stride, left:right:stride].ravel())


# Determinism


def digest(scene: Scene) -> str:
    found = hashlib.sha256(scene.image.tobytes())
    for question in scene.questions:
        found.update(f"{question.type} {question.text} {question.answer} {question.referents}".encode())
        found.update(scene.relevant(question).tobytes())
    return found.hexdigest()


@pytest.mark.parametrize(("place", "expected"), WORLD.items(), ids=lambda value: str(value)[:12])
def test_the_world_is_the_one_the_models_were_built_on(place: tuple[str, int], expected: str):
    assert digest(draw_scene(*place)) == expected


def test_scenes_are_functions_of_their_place():
    again = draw_scene("train", 3)
    assert np.array_equal(again.image, SCENES[3].image) and again.questions == SCENES[3].questions
    assert np.array_equal(again.owner, SCENES[3].owner) and again.entities == SCENES[3].entities


def test_crowded_scenes_have_no_free_cell_and_several_charts():
    charts = set()
    for index in range(12):
        kinds = Counter(e.kind for e in draw_scene("tower", index, crowded=True).entities)
        # A chart of four bars takes two cells.
        assert kinds["object"] + kinds["sign"] + kinds["bar"] // 2 == 16
        charts.add(kinds["bar"] // 4)
    assert charts >= {1, 2, 3}


def test_no_scene_is_in_two_splits():
    scenes = [digest(draw_scene(split, i)) for split in SPLITS for i in range(8)]
    assert len(set(scenes)) == len(scenes) == 48


def test_the_vocabulary_knows_every_word():
    processor = build_processor("guide")
    unknown = processor.encode("<unk>")[0]
    assert len(set(WORDS)) == len(WORDS)
    for scene in SCENES:
        for question in scene.questions:
            prompt = processor.prompt(question.text, question.answer, "question_first")
            assert unknown not in [*prompt.before, *prompt.after, *prompt.answer], question
            assert processor.prompt_length(question.text, question.answer, 320) <= processor.max_length


# Records


@pytest.mark.parametrize("family", FAMILIES)
def test_records_are_scenes_with_questions_of_their_family(family: Any):
    records = EmbeddedRecords("val", family, 6)
    assert len(records) == 6
    for index in range(6):
        key, data, extension, record = records[index]
        assert (key, extension) == (f"val-{family}-{index:06d}", "png") and record["id"] == key
        assert (
            record["tokens"] == 320
        )  # so that a guide that tiles otherwise knows that `relevant` is not about its tokens
        again = records[index]
        assert again[1] == data and again[3] == record
        assert len(record["turns"]) == 4 and {turn["type"] for turn in record["turns"]} <= set(FAMILIES[family])
        # As different as can be: no type twice before every type of the family came once.
        types = [turn["type"] for turn in record["turns"]]
        assert len(set(types)) == min(4, len(FAMILIES[family]))
        picture = np.asarray(Image.open(io.BytesIO(data)))
        scene = scene_of(picture, family, index)
        for turn in record["turns"]:
            expected, referents = answer(scene, turn["question"])
            assert turn["answer"] == expected
            question = Question(turn["type"], turn["question"], expected, tuple(referents))
            assert turn["relevant"] == np.flatnonzero(scene.relevant(question)).tolist()


def scene_of(picture: np.ndarray, family: str, index: int) -> Scene:
    """Find the scene of a record: each family takes every third scene, and a record chooses among sixteen of these."""
    for candidate in range(16):
        scene = draw_scene("val", 3 * (16 * index + candidate) + list(FAMILIES).index(family))
        if np.array_equal(scene.image, picture):
            return scene
    raise AssertionError("the picture is no scene of the split")


def test_no_picture_is_in_two_sources():
    pictures = [
        EmbeddedRecords(split, family, 4)[i][1]
        for split in ("train", "val", "test")
        for family in FAMILIES
        for i in range(4)
    ]
    assert len(set(pictures)) == len(pictures) == 36


def test_fewer_turns_and_identity():
    records = EmbeddedRecords("train", "reading", 2, turns=1)
    assert all(len(records[i][3]["turns"]) == 1 for i in range(2))
    assert records.identity() == {
        "world": WORLD_VERSION, "split": "train", "family": "reading", "records": 2, "turns": 1
    }  # fmt: skip
    for index in (-1, 2):
        with pytest.raises(IndexError):
            records[index]


@pytest.mark.parametrize(
    "arguments", [("nowhere", "objects", 1), ("train", "nothing", 1), ("train", "objects", 0), ("val", "reading", 1, 0)]
)
def test_records_that_cannot_be(arguments: Any):
    with pytest.raises(ConfigError, match=r"expected a split among|must be at least 1"):
        EmbeddedRecords(*arguments)
