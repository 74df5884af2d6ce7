"""Pictures for `synthetic_mixture.py`: of every kind that upstream's folders hold, and files that are none."""

from __future__ import annotations

import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["BROKEN_FILES", "write_broken", "write_pool"]

SMALLEST, LARGEST = (32, 24), (1600, 1200)
# Names of the files end in what they are; plain JPEGs are the most, as in upstream's folders.
KINDS = (
    ".jpg", ".png", ".jpg", "_palette.png", ".jpg", "_cmyk.jpg", ".jpg", "_gray16.png", "_gray.jpg", "_rgba.png",
    ".webp", "_turned.jpg", "_rgba.webp", "_gray.png", ".jpg",
)  # fmt: skip
_FORMATS = {".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP"}
_MODES = {"palette": "P", "cmyk": "CMYK", "gray": "L", "rgba": "RGBA"}
_ORIENTATION = 0x0112


def write_pool(folder: Path, number: int, rng: random.Random) -> dict[str, tuple[int, int]]:
    """Write a number of pictures and return path inside the folder -> width and height in pixels.

    Most are small; the first is the smallest of all, and of fifty or more the second is the largest.
    """
    pool = {}
    for index in range(number):
        size = SMALLEST if index == 0 else LARGEST if index == 1 and number >= 50 else _size(rng)
        # Upstream's folders have folders, spaces and names that are not ASCII.
        name = f"{index % 7:02d}/{'图 ' if index % 11 == 3 else ''}{index:06d}{KINDS[index % len(KINDS)]}"
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_encoded(_drawn(size, rng), name))
        pool[name] = size
    return pool


def _size(rng: random.Random) -> tuple[int, int]:
    """Return a width and height: half of the widths are below 60 pixels, and wide pictures are more than high ones."""
    width = SMALLEST[0] * (LARGEST[0] / SMALLEST[0]) ** rng.random() ** 3
    height = width / np.exp(rng.gauss(0.25, 0.6))
    return round(width), round(min(max(height, SMALLEST[1]), LARGEST[1]))


def _drawn(size: tuple[int, int], rng: random.Random) -> Image.Image:
    """Return a picture of a few rectangles."""
    image = Image.new("RGB", size, tuple(rng.randrange(256) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        left, right = sorted(rng.randrange(size[0]) for _ in range(2))
        top, bottom = sorted(rng.randrange(size[1]) for _ in range(2))
        draw.rectangle((left, top, right, bottom), tuple(rng.randrange(256) for _ in range(3)))
    return image


def _encoded(image: Image.Image, name: str) -> bytes:
    """Return a picture's file, of the mode and the format that its name says."""
    stem, suffix = Path(name).stem, Path(name).suffix
    exif = Image.Exif()
    if (mode := stem.rpartition("_")[2]) == "gray16":
        image = Image.fromarray(np.asarray(image.convert("L"), dtype=np.uint16) * 257)
    elif mode == "turned":
        exif[_ORIENTATION] = 6  # shown by a quarter turned, where it is heeded
    elif mode in _MODES:
        image = image.convert(_MODES[mode])
    buffer = io.BytesIO()
    image.save(buffer, _FORMATS[suffix], **({"exif": exif} if exif else {}))
    return buffer.getvalue()


def _bomb() -> bytes:
    """Return a PNG of 70 bytes that declares 60,000 x 60,000 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


# Kind of damage -> the file that has it; `missing` is never written, and `outside` lies beside the folder.
BROKEN_FILES = {
    "truncated": "broken/truncated.jpg",
    "empty": "broken/empty.jpg",
    "text": "broken/text.png",
    "bomb": "broken/bomb.png",
    "folder": "broken/folder.png",
    "missing": "broken/missing.jpg",
    "outside": "../outside.png",
}


def write_broken(folder: Path) -> None:
    """Write the files that cannot be used."""
    (folder / BROKEN_FILES["folder"]).mkdir(parents=True)
    whole = _encoded(_drawn((200, 150), random.Random(0)), "whole.jpg")
    contents = {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"<html>404 Not Found</html>\n",
        "bomb": _bomb(),
        "outside": _encoded(_drawn(SMALLEST, random.Random(0)), "outside.png"),
    }
    for kind, data in contents.items():
        (folder / BROKEN_FILES[kind]).write_bytes(data)
