"""A procedural world of images, questions and answers in which the visual tokens that matter are known.

A scene is a 256 x 256 picture of 4 x 4 cells: coloured shapes that carry a glyph, signs of three glyphs, and in
half of the scenes a bar chart. Everything stands on a lattice of 8 pixels and nothing crosses a tile border. Each
scene answers about twenty-five questions of nine types; referents are unique by construction, and the visual
tokens that show a question's referents are its *relevant* tokens. `docs/embedded.md` describes the world in full.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pgp_lightning.embedded.glyphs import GLYPHS, glyph_mask
from pgp_lightning.vlm.tiles import TileGrid, TileRule

__all__ = ["GRID", "RULE", "SPLITS", "TYPES", "WORDS", "WORLD_VERSION", "Question", "Scene", "draw_scene", "scene_rng"]

WORLD_VERSION = 1
RULE = TileRule(tile_size=128, tokens_per_side=8, max_tiles=4)
CANVAS, CELL = 256, 64
GRID: TileGrid = RULE.grid(CANVAS, CANVAS)

COLOURS = {
    "red": (225, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 90, 235),
    "yellow": (240, 225, 40),
    "purple": (160, 60, 200),
    "orange": (250, 145, 30),
    "cyan": (40, 215, 225),
    "white": (245, 245, 245),
}
COLOUR_NAMES = tuple(COLOURS)
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "hexagon")
LETTERS = GLYPHS[10:]
BARS, HEIGHTS, STEP = 4, 6, 8  # bars in a chart, greatest value, pixels per unit of value
SIZES = (26, 28, 30, 32)
TYPES = (
    "color_of_shape",
    "shape_of_color",
    "char_in",
    "color_of_char",
    "count_color",
    "count_shape",
    "sign",
    "bar",
    "exists",
)
_QUESTION_WORDS = (
    *("what", "color", "shape", "char", "is", "the", "in", "has", "how", "many", "read", "sign"),
    *("value", "of", "bar", "there", "a", "yes", "no", "shapes"),
)
WORDS = (*_QUESTION_WORDS, *COLOUR_NAMES, *SHAPES, *GLYPHS)

# Scenes of different splits come from different generators, so no picture is ever shared between them.
SPLITS = {"pretrain": 0, "pretrain_val": 1, "train": 2, "val": 3, "test": 4, "tower": 5}
RELEVANT_SHARE = 20 / 256  # a token is relevant if its referents cover at least this share of it

_GLYPH_MASKS = {glyph: glyph_mask(glyph) for glyph in GLYPHS}


def _shape_mask(name: str, size: int) -> np.ndarray:
    y, x = np.mgrid[0:size, 0:size]
    centre = (size - 1) / 2
    u, v = (x - centre) / (size / 2), (y - centre) / (size / 2)
    inside = {
        "circle": u * u + v * v <= 1,
        "square": (abs(u) <= 0.88) & (abs(v) <= 0.88),
        "triangle": (v <= 0.95) & (abs(u) <= (v + 1) * 0.6),
        "diamond": abs(u) + abs(v) <= 1.05,
        "cross": (abs(u) <= 0.48) | (abs(v) <= 0.48),
        "hexagon": (abs(v) <= 0.8) & (abs(u) + abs(v) * 0.5 <= 1),
    }
    return np.asarray(inside[name])


_SHAPE_MASKS = {(name, size): _shape_mask(name, size) for name in SHAPES for size in SIZES}


@dataclass(frozen=True)
class Question:
    """A question of a scene, its answer, and the entities one has to look at (none if the answer is none)."""

    type: str
    text: str
    answer: str
    referents: tuple[int, ...]


@dataclass(frozen=True)
class _Entity:
    kind: str
    colour: int = -1
    shape: int = -1
    chars: str = ""
    value: int = 0


class Scene:
    """A picture with its entities and questions.

    Attributes:
        image: uint8 (256, 256, 3).
        owner: int8 (256, 256), the entity that each pixel belongs to, -1 for the background.
        labels: int8 (3, 256, 256), 1 + colour, 1 + form (shape, sign, bar height) and 1 + glyph of each pixel, else 0.
        questions: every question that the scene answers.
    """

    def __init__(self, rng: np.random.Generator, crowded: bool = False) -> None:
        self.image = _background(rng)
        self.owner = np.full((CANVAS, CANVAS), -1, dtype=np.int8)
        self.labels = np.zeros((3, CANVAS, CANVAS), dtype=np.int8)
        self.entities: list[_Entity] = []
        free = [(row, column) for row in range(4) for column in range(4)]
        # Four bars are the only sight of six heights; crowded scenes, which only train the tower, have more of them.
        for _ in range(int(rng.integers(1, 5)) if crowded else int(rng.random() < 0.5)):
            self._draw_chart(rng, free)
        for colour in rng.choice(len(COLOURS), int(rng.integers(1, 3)), replace=False):
            self._draw_sign(rng, free, int(colour))
        for _ in range(len(free) if crowded else int(rng.integers(4, 8))):
            self._draw_object(rng, free)
        self.questions = self._ask(rng)

    def relevant(self, question: Question) -> np.ndarray:
        """Return which visual tokens show the question's referents: bool (320,) in tile-raster order."""
        shown = per_token(np.isin(self.owner, question.referents))
        return np.asarray(shown.mean(axis=1) >= RELEVANT_SHARE)

    def token_labels(self) -> np.ndarray:
        """Return colour, form and glyph of the dominating entity of every visual token: int64 (320, 3), 0 for none."""
        sparse = per_token(self.owner >= 0).mean(axis=1) < 1 / 8
        columns = []
        for plane in self.labels:
            tokens = per_token(plane).astype(np.int64)
            classes = 32
            flat = (np.arange(len(tokens))[:, None] * classes + tokens).ravel()
            counts = np.bincount(flat, minlength=len(tokens) * classes).reshape(-1, classes)[:, 1:]
            columns.append(np.where(sparse | (counts.max(axis=1) == 0), 0, counts.argmax(axis=1) + 1))
        return np.stack(columns, axis=1)

    def _add(self, entity: _Entity, region: np.ndarray | tuple[slice, slice], colour: int, form: int) -> None:
        self.owner[region] = len(self.entities)
        self.labels[0][region] = colour + 1
        self.labels[1][region] = form + 1
        self.entities.append(entity)

    def _write(self, glyph: str, top: int, left: int, ink: int) -> None:
        box = self.image[top : top + 16, left : left + 16]
        box[_GLYPH_MASKS[glyph]] = ink

    def _draw_chart(self, rng: np.random.Generator, free: list[tuple[int, int]]) -> None:
        row, column = int(rng.integers(4)), 2 * int(rng.integers(2))
        if (row, column) not in free:
            return
        free.remove((row, column))
        free.remove((row, column + 1))
        top, left = row * CELL, column * CELL
        self.image[top : top + 64, left : left + 128] = 15
        shift = 16 * int(rng.integers(2))
        for bar, letter in enumerate(rng.choice(len(LETTERS), BARS, replace=False)):
            value, colour = int(rng.integers(1, HEIGHTS + 1)), int(rng.integers(len(COLOURS)))
            x, y = left + 32 * bar + shift, top + 48 - STEP * value
            self.image[y : top + 48, x : x + 16] = COLOURS[COLOUR_NAMES[colour]]
            region = (slice(y, top + 64), slice(x, x + 16))
            entity = _Entity("bar", chars=LETTERS[letter], value=value)
            self._add(entity, region, colour, len(SHAPES) + value)
            self.labels[2][region] = GLYPHS.index(LETTERS[letter]) + 1
            self._write(LETTERS[letter], top + 48, x, ink=235)

    def _draw_sign(self, rng: np.random.Generator, free: list[tuple[int, int]], colour: int) -> None:
        row, column = free.pop(int(rng.integers(len(free))))
        top, left = row * CELL + 8 * int(rng.integers(6)), column * CELL + 8 * int(rng.integers(3))
        self.image[top : top + 24, left : left + 48] = COLOURS[COLOUR_NAMES[colour]]
        self.image[top + 3 : top + 21, left + 2 : left + 46] = 20
        chars = "".join(GLYPHS[i] for i in rng.integers(0, len(GLYPHS), 3))
        self._add(_Entity("sign", colour, chars=chars), np.s_[top : top + 24, left : left + 48], colour, len(SHAPES))
        for place, glyph in enumerate(chars):
            x = left + 16 * place
            self._write(glyph, top + 4, x, ink=240)
            self.labels[2][top : top + 24, x : x + 16] = GLYPHS.index(glyph) + 1

    def _draw_object(self, rng: np.random.Generator, free: list[tuple[int, int]]) -> None:
        row, column = free.pop(int(rng.integers(len(free))))
        colour, shape, glyph = (int(rng.integers(n)) for n in (len(COLOURS), len(SHAPES), len(GLYPHS)))
        size = int(rng.choice(SIZES))
        top, left = row * CELL + 8 * int(rng.integers(5)), column * CELL + 8 * int(rng.integers(5))
        y, x = top + 16 - size // 2, left + 16 - size // 2
        mask = _SHAPE_MASKS[SHAPES[shape], size]
        shade = np.array(COLOURS[COLOUR_NAMES[colour]]) * rng.uniform(0.85, 1.0)
        self.image[y : y + size, x : x + size][mask] = shade.astype(np.uint8)
        region = np.zeros_like(self.owner, dtype=bool)
        region[y : y + size, x : x + size] = mask
        self._add(_Entity("object", colour, shape, GLYPHS[glyph]), region, colour, shape)
        self.labels[2][region] = glyph + 1
        self._write(GLYPHS[glyph], top + 8, left + 8, ink=0)

    def _ask(self, rng: np.random.Generator) -> list[Question]:
        objects = [(i, e.colour, e.shape, e.chars) for i, e in enumerate(self.entities) if e.kind == "object"]
        asked: list[Question] = []

        def ask(type_: str, text: str, answer: str, *referents: int) -> None:
            asked.append(Question(type_, text, answer, referents))

        for i, colour, shape, glyph in objects:
            c, s = COLOUR_NAMES[colour], SHAPES[shape]
            if sum(o[2] == shape for o in objects) == 1:
                ask("color_of_shape", f"what color is the {s}", c, i)
            if sum(o[1] == colour for o in objects) == 1:
                ask("shape_of_color", f"what shape is {c}", s, i)
            if sum(o[1:3] == (colour, shape) for o in objects) == 1:
                ask("char_in", f"what char is in the {c} {s}", glyph, i)
            if sum(o[3] == glyph for o in objects) == 1:
                ask("color_of_char", f"what color has char {glyph}", c, i)
        for type_, names, place in (("count_color", COLOUR_NAMES, 1), ("count_shape", SHAPES, 2)):
            for k in rng.choice(len(names), 3, replace=False):
                found = [o[0] for o in objects if o[place] == k]
                if found or rng.random() < 0.4:
                    ask(type_, f"how many {names[k]} shapes", str(len(found)), *found)
        for i, entity in enumerate(self.entities):
            if entity.kind == "sign":
                ask("sign", f"read the {COLOUR_NAMES[entity.colour]} sign", " ".join(entity.chars), i)
            elif entity.kind == "bar":
                ask("bar", f"value of bar {entity.chars}", str(entity.value), i)
        for _ in range(2):
            # Half of the time colour and shape are of two objects, which is mostly a thing that is not there.
            one = objects[int(rng.integers(len(objects)))]
            other = one if rng.random() < 0.5 else objects[int(rng.integers(len(objects)))]
            found = [o[0] for o in objects if o[1] == one[1] and o[2] == other[2]]
            text = f"is there a {COLOUR_NAMES[one[1]]} {SHAPES[other[2]]}"
            ask("exists", text, "yes" if found else "no", *found)
        return list({question.text: question for question in asked}.values())


def scene_rng(split: str, index: int) -> np.random.Generator:
    """Return the generator of scene `index` of a split."""
    return np.random.default_rng([WORLD_VERSION, SPLITS[split], index])


def draw_scene(split: str, index: int, crowded: bool = False) -> Scene:
    """Draw scene `index` of a split; equal arguments give equal scenes."""
    return Scene(scene_rng(split, index), crowded)


def per_token(plane: np.ndarray) -> np.ndarray:
    """Gather what each visual token sees of a plane: (256, 256) to (320, 64), each second or fourth pixel."""
    tiles = plane[::2, ::2].reshape(2, 8, 8, 2, 8, 8).transpose(0, 3, 1, 4, 2, 5).reshape(256, 64)
    thumbnail = plane[::4, ::4].reshape(8, 8, 8, 8).transpose(0, 2, 1, 3).reshape(64, 64)
    return np.concatenate([tiles, thumbnail])


def _background(rng: np.random.Generator) -> np.ndarray:
    """A grey, softly shaded, blocky texture (blocks of 4 pixels, so that lossless files stay small)."""
    tint = rng.uniform(30, 100, 3) * 0.3 + rng.uniform(30, 100) * 0.7
    ramp = np.linspace(-1, 1, CANVAS // 4)
    shade = rng.uniform(-25, 25) * ramp[:, None] + rng.uniform(-25, 25) * ramp[None, :]
    texture = shade + rng.normal(0, 8, (CANVAS // 4, CANVAS // 4))
    small = np.clip(tint + texture[..., None], 0, 255).astype(np.uint8)
    return small.repeat(4, axis=0).repeat(4, axis=1)
