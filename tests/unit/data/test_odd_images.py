"""Odd pictures of every mode and size: tiles, prompt slots and visual tokens agree, or the record is refused."""

from __future__ import annotations

import io
import json
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from pgp_lightning.data.conversation import ConversationReader
from pgp_lightning.data.records import RawRecord, UnusableRecord
from pgp_lightning.vlm.family import VLM
from pgp_lightning.vlm.loading import load_vlm
from pgp_lightning.vlm.slots import lay_out
from pgp_lightning.vlm.tiles import TileRule, cut_tiles

TURN = {"question": "what color is the square", "answer": "red"}
SIZES = [(1, 1), (1, 4000), (4000, 1), (2, 3), (31, 33), (448, 448), (633, 634), (90, 1000), (1000, 3)]
MODES = [("RGB", "PNG"), ("L", "PNG"), ("P", "PNG"), ("RGBA", "WEBP")]
ODD = [
    ("RGB", "JPEG", (4000, 3000)),
    ("CMYK", "JPEG", (64, 50)),
    ("CMYK", "JPEG", (7, 300)),
    ("I;16", "PNG", (64, 50)),
    ("I;16", "PNG", (1, 9)),
    ("1", "PNG", (40, 40)),
    ("LA", "PNG", (40, 30)),
    ("RGBA", "PNG", (30, 40)),
    ("EXIF", "JPEG", (60, 20)),
    ("interlaced", "PNG", (50, 70)),
]
CASES = [(mode, form, size) for mode, form in MODES for size in SIZES] + ODD


def stored(mode: str, form: str, size: tuple[int, int]) -> bytes:
    """Return the bytes of a picture of noise."""
    rng = np.random.default_rng(size)
    buffer, options = io.BytesIO(), {}
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 65536, size[::-1], dtype=np.uint16))
    else:
        image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
        if mode == "EXIF":
            exif = Image.Exif()
            exif[0x0112] = 6  # rotate by a quarter
            options = {"exif": exif}
        elif mode not in ("RGB", "interlaced"):
            image = image.convert(mode)
    image.save(buffer, form, **options)
    return buffer.getvalue()


def record(image: bytes) -> RawRecord:
    return RawRecord("key", image, json.dumps({"turns": [TURN]}).encode())


@pytest.fixture(scope="module")
def models(tiny_base: str, llava_base: str) -> tuple[VLM, ...]:
    return load_vlm(tiny_base), load_vlm(llava_base)


def test_there_are_more_than_forty():
    assert len(CASES) >= 40


@pytest.mark.parametrize(("mode", "form", "size"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_prompt_slots_tiles_and_visual_tokens_agree(
    mode: str, form: str, size: tuple[int, int], models: tuple[VLM, ...]
):
    data = stored(mode, form, size)
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == size  # as stored: a rotation in the EXIF data is not applied, as in the original codes
    for vlm in models:
        found = ConversationReader(vlm.processor, max_length=999)(record(data))
        grid = vlm.processor.rule.grid(*size)
        assert found.grid == grid and found.tiles.shape[0] == grid.tiles
        assert found.tiles.dtype == np.uint8 and found.tiles.flags.c_contiguous
        prompt = vlm.processor.prompt(TURN["question"], TURN["answer"], "question_first")
        slots = lay_out([prompt], [grid.tokens], torch.device("cpu"))
        visual = vlm.visual_tokens(torch.from_numpy(found.tiles)).flatten(0, 1)
        assert len(visual) == grid.tokens == int(slots.visual_mask.sum()) == len(grid.rectangles())
        length = vlm.processor.prompt_length(TURN["question"], TURN["answer"], grid.tokens)
        assert length == slots.ids.shape[1] + 1  # the last answer token is predicted and needs no slot


def test_sixteen_bits_keep_their_shades():
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    tiles, _ = cut_tiles(Image.fromarray(ramp), TileRule(tile_size=64, tokens_per_side=4, max_tiles=1))
    assert np.array_equal(tiles[0, 0], ramp >> 8) and np.array_equal(tiles[0, 0], tiles[0, 2])


def bomb() -> bytes:
    """Return a PNG of some hundred bytes that declares 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    header = (60_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    body = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_a_sliver_that_a_square_would_blow_up_is_refused(llava_base: str):
    # 3 kB on disk, but the square around it would take gigabytes.
    data = record(stored("L", "PNG", (40_000, 1)))
    with pytest.raises(UnusableRecord, match="40000 x 1 pixels is too long to be padded") as caught:
        ConversationReader(load_vlm(llava_base).processor, max_length=999)(data)
    assert caught.value.reason == "bad-image"


@pytest.mark.parametrize("broken", ["bomb", "truncated", "empty", "text"])
def test_a_picture_that_cannot_be_used_is_refused(broken: str, models: tuple[VLM, ...]):
    whole = stored("RGB", "JPEG", (200, 100))
    data = {"bomb": bomb(), "truncated": whole[: len(whole) // 2], "empty": b"", "text": b"<html>"}[broken]
    for vlm in models:
        with pytest.raises(UnusableRecord, match="key") as caught:
            ConversationReader(vlm.processor, max_length=999)(record(data))
        assert caught.value.reason == "bad-image"


def test_fewer_tiles_than_the_model_can(tiny_base: str):
    processor = load_vlm(tiny_base).processor
    data = record(stored("RGB", "PNG", (400, 400)))
    counts = [ConversationReader(processor, max_tiles=most)(data).grid.tiles for most in (1, 2, 3, 4, 9)]
    assert counts == [1, 1, 1, 5, 5]
