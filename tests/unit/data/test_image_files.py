"""Images that annotations name: never from outside their folder, decoded before they are stored, kept as they are."""

from __future__ import annotations

import io
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from data_world import picture
from PIL import Image
from raw_world import raw, write_raw

from pgp_lightning.data.image_files import ImageFolder, check_picture
from pgp_lightning.data.instructions import InstructionRecords
from pgp_lightning.data.records import UnusableRecord
from pgp_lightning.tools import main

NOISE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)

RGBA = Image.fromarray(np.concatenate([NOISE, NOISE[..., :1]], axis=-1))  # WebP leaves an opaque channel out


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """Return a PNG of a hundred bytes that declares so many pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    body = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def reason(data: bytes, max_pixels: int = 64_000_000) -> str:
    with pytest.raises(UnusableRecord) as caught:
        check_picture(data, max_pixels)
    assert caught.value.detail
    return caught.value.reason


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of images beside which there is a secret one."""
    write_raw(tmp_path, [], {"sub/two.png": picture(2)})
    (tmp_path / "secret.png").write_bytes(picture(9))
    (tmp_path / "else").mkdir()
    (tmp_path / "else/three.png").write_bytes(picture(3))
    root = tmp_path / "images"
    (root / "inside.png").symlink_to(root / "sub/two.png")
    (root / "outside.png").symlink_to(tmp_path / "secret.png")
    (root / "linked").symlink_to(tmp_path / "else")
    (root / "circle").symlink_to(root / "circle")
    os.mkfifo(root / "pipe.png")
    return root


def test_paths_inside_the_folder(folder: Path) -> None:
    for name in ("sub/two.png", "sub/../sub/two.png", "./sub//two.png", "inside.png", "../images/sub/two.png"):
        assert ImageFolder(folder).read(name) == picture(2)
    (folder.parent / "alias").symlink_to(folder)
    assert ImageFolder(folder.parent / "alias").read("sub/two.png") == picture(2)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("/etc/hostname", "unsafe-path"),
        ("../secret.png", "unsafe-path"),
        ("sub/../../secret.png", "unsafe-path"),
        ("missing/../../secret.png", "unsafe-path"),
        ("../images2/x.png", "unsafe-path"),
        ("outside.png", "unsafe-path"),
        ("linked/three.png", "unsafe-path"),
        ("linked/../secret.png", "unsafe-path"),
        ("circle", "missing-image"),
        ("..\\secret.png", "unsafe-path"),
        ("C:/secret.png", "unsafe-path"),
        ("one\0.png", "unsafe-path"),
        (" ", "unsafe-path"),
        ("pipe.png", "missing-image"),
        ("sub", "missing-image"),
        ("none.png", "missing-image"),
        ("one.png/one.png", "missing-image"),
    ],
)
def test_paths_that_lead_out_or_nowhere(folder: Path, name: str, expected: str) -> None:
    with pytest.raises(UnusableRecord) as caught:
        ImageFolder(folder).read(name)
    assert caught.value.reason == expected


def test_links_may_lead_where_the_caller_says(folder: Path) -> None:
    allowed = ImageFolder(folder, (folder.parent / "else",))
    assert allowed.read("linked/three.png") == picture(3)
    with pytest.raises(UnusableRecord, match="unsafe-path"):
        allowed.read("outside.png")
    options = write_raw(folder.parent, [raw(image="linked/three.png")])
    assert InstructionRecords(**options, linked=[str(folder.parent / "else")])[0][1] == picture(3)


def test_absolute_paths_may_lead_into_the_folder_and_nowhere_else(folder: Path) -> None:
    (folder.parent / "alias").symlink_to(folder)
    for name in (
        folder / "sub/two.png",
        folder / "inside.png",
        folder / "sub/../one.png",
        folder.parent / "alias/one.png",
    ):
        assert ImageFolder(folder).read(str(name)) in (picture(), picture(2))
    assert InstructionRecords(**write_raw(folder.parent, [raw(image=str(folder / "sub/two.png"))]))[0][1] == picture(2)
    for name in (folder.parent / "secret.png", folder / "outside.png", folder / "../secret.png", Path("/nowhere")):
        with pytest.raises(UnusableRecord, match=r"unsafe-path: .* leads out of"):
            ImageFolder(folder).read(str(name))
    with pytest.raises(UnusableRecord, match="missing-image"):
        ImageFolder(folder).read(str(folder / "none.png"))


@pytest.mark.parametrize("setting", [{"images": "/"}, {"images": "/tmp/.."}, {"linked": ["/"]}])
def test_the_root_of_the_file_system_is_no_folder_of_images(
    tmp_path: Path, setting: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {**write_raw(tmp_path, [raw(image="/etc/hostname")]), **setting}
    build = {"class_path": "pgp_lightning.data.instructions.InstructionRecords", "init_args": arguments}
    splits = {"train": [{"name": "s", "build": build}]}
    content = {"name": "m", "licence": "none", "root": str(tmp_path / "out"), "splits": splits}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(content))
    assert main(["shards", "build", str(tmp_path / "m.yaml")]) == 2
    error = capsys.readouterr().err
    assert "m.yaml: source 's'" in error and "the root of the file system, so annotations could name any file" in error
    assert not (tmp_path / "out").exists()


def test_a_file_larger_than_a_shard_holds_is_not_read(folder: Path) -> None:
    with (folder / "huge.png").open("wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(UnusableRecord, match="image-too-large"):
        ImageFolder(folder).read("huge.png")


KEPT = {
    "one pixel": (picture(5, 1, 1), "png", "RGB"),
    "palette with transparency": (
        encoded(Image.fromarray(NOISE).quantize(7), "PNG", transparency=bytes([0, 99])),
        "png",
        "P",
    ),
    "16 bits": (encoded(Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257), "PNG"), "png", "I;16"),
    "CMYK": (encoded(Image.fromarray(NOISE).convert("CMYK"), "JPEG"), "jpg", "CMYK"),
    "RGBA": (encoded(RGBA, "WEBP", lossless=True), "webp", "RGBA"),
    "two JPEGs in one": (
        encoded(Image.fromarray(NOISE), "MPO", save_all=True, append_images=[Image.fromarray(255 - NOISE)]),
        "jpg",
        "RGB",
    ),
}


@pytest.mark.parametrize("what", KEPT)
def test_stored_formats_are_kept_byte_for_byte(what: str) -> None:
    data, extension, mode = KEPT[what]
    found = check_picture(data, 10_000)
    with Image.open(io.BytesIO(data)) as image:
        assert (found.data, found.extension, found.reencoded) == (data, extension, None)
        assert (found.width, found.height) == image.size and image.mode == mode


def test_of_an_animation_the_first_frame_counts() -> None:
    frames = [Image.fromarray(NOISE), Image.new("RGB", (30, 20), "red"), Image.new("RGB", (30, 20), "blue")]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert check_picture(data, 10_000).data == data
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:  # as training opens it
        assert np.array_equal(np.asarray(image.convert("RGB")), NOISE)


def test_a_rotation_in_the_exif_data_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(NOISE), "JPEG", exif=exif)
    found = check_picture(data, 10_000)
    assert found.data == data and (found.width, found.height) == (30, 20)


@pytest.mark.parametrize(
    ("form", "mode", "options"),
    [
        ("BMP", "RGB", {}),
        ("BMP", "L", {}),
        ("BMP", "1", {}),
        ("GIF", "P", {"transparency": 3}),
        ("GIF", "L", {"save_all": True, "append_images": [Image.new("L", (30, 20), 7)], "comment": b"hello"}),
        ("TIFF", "RGBA", {}),
        ("TIFF", "I;16", {}),
        ("TIFF", "RGB", {"compression": "tiff_lzw", "dpi": (72, 72)}),
    ],
)
def test_other_formats_become_png_without_loss(form: str, mode: str, options: dict[str, object]) -> None:
    source = Image.fromarray(NOISE)
    if mode == "I;16":
        source = Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257)
    elif mode != "RGB":
        source = source.convert(mode)
    data = encoded(source, form, **options)
    found = check_picture(data, 10_000)
    assert (found.extension, found.reencoded, found.width, found.height) == ("png", form, 30, 20)
    assert found == check_picture(data, 10_000)
    with Image.open(io.BytesIO(data)) as before, Image.open(io.BytesIO(found.data), formats=("PNG",)) as after:
        as_shown = "I;16" if mode == "I;16" else "RGBA"
        before.load()
        assert np.array_equal(np.asarray(before.convert(as_shown)), np.asarray(after.convert(as_shown)))
        assert set(after.info) <= {"transparency"}


def test_a_reencoded_image_is_said_to_be_one(tmp_path: Path) -> None:
    gif = encoded(Image.fromarray(NOISE), "GIF")
    builder = InstructionRecords(**write_raw(tmp_path, [raw(image="a.jpg")], {"a.jpg": gif}))  # a name may lie
    _, image, extension, record = builder[0]
    assert extension == "png" and image.startswith(b"\x89PNG") and record["reencoded"] == "GIF"


def test_bombs_and_damage_are_refused(tmp_path: Path) -> None:
    assert reason(bomb(100_000, 100_000)) == reason(bomb(9000, 9000)) == "image-too-large"
    assert reason(picture(0, 11, 10), 109) == "image-too-large" and check_picture(picture(0, 11, 10), 110)
    jpeg, png = encoded(Image.fromarray(NOISE), "JPEG"), encoded(Image.fromarray(NOISE), "PNG")
    webp, gif = encoded(Image.fromarray(NOISE), "WEBP"), encoded(Image.fromarray(NOISE), "GIF")
    for whole in (jpeg, png, webp, gif):
        assert check_picture(whole, 10_000) and reason(whole[: len(whole) // 2]) == reason(whole[:20]) == "bad-image"
    assert reason(b"") == reason(b"<html>") == reason(b"%!PS-Adobe-3.0 EPSF-3.0\n") == "bad-image"
    assert reason(encoded(Image.fromarray(NOISE), "PPM")) == "bad-image"
    assert reason(encoded(Image.fromarray(NOISE).convert("CMYK"), "TIFF")) == "bad-image"


def test_random_damage_never_raises_anything_else() -> None:
    rng = np.random.default_rng(1)
    forms = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
    outcomes = set()
    for trial in range(300):
        data = bytearray(encoded(Image.fromarray(NOISE), forms[trial % len(forms)]))
        for place in rng.integers(0, min(len(data), 120), 4):
            data[place] = rng.integers(0, 256)
        try:
            outcomes.add(check_picture(bytes(data), 10_000).extension)
        except UnusableRecord as error:
            outcomes.add(error.reason)
    assert {"bad-image", "png", "jpg"} <= outcomes
