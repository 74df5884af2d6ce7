"""Image files named by annotations: found inside their folder only, and decoded once before they go into a shard.

PNG, JPEG and WebP are kept byte for byte, whatever their mode (palette, CMYK, 16 bits, transparency); they are
converted when they are used. Of an animation the first frame is used, and a rotation noted in EXIF data is not applied.
GIF (its first frame), BMP and TIFF (its first page) are stored as PNG with the same pixels.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from PIL import Image, UnidentifiedImageError

from pgp_lightning.data.machine_faults import patiently, refuse_lack_of_memory
from pgp_lightning.data.records import MAX_MEMBER_BYTES, UnusableRecord

__all__ = ["ImageFolder", "Picture", "check_picture"]

_OPENED = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# MPO: a JPEG that further ones follow, as some cameras write; Pillow opens it as a JPEG and shows the first.
_KEPT = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp"}
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


@dataclass(frozen=True)
class Picture:
    """An image as it goes into a shard; `reencoded` names the format it had, if it is another now."""

    data: bytes
    extension: str
    width: int
    height: int
    reencoded: str | None = None


class ImageFolder:
    """A folder whose images annotations may name, and nothing outside it.

    Args:
        folder: the folder that the annotations' paths are relative to; an absolute path has to lead into it, too.
        linked: folders outside it to which its symbolic links may lead.
    """

    def __init__(self, folder: Path, linked: tuple[Path, ...] = ()) -> None:
        self.folder = folder
        self._allowed = tuple(path.resolve() for path in (folder, *linked))

    def read(self, name: str) -> bytes:
        """Return an image file's bytes.

        Raises:
            UnusableRecord: if the path leads out of the folder, there is no such file, or it is too large.
            ConfigError: if the machine fails to read it, again and again, or one of the folders is gone or empty.
        """
        # A drive or a backslash means something on Windows only; no honest annotation has one.
        if not name.strip() or "\\" in name or "\0" in name or PureWindowsPath(name).drive:
            raise UnusableRecord("unsafe-path", f"expected a path inside {self.folder}, got {name!r}")
        named = self._allowed[0] / name
        try:
            os.fsencode(named)
            return patiently(named, lambda: self._read(named, name), self._allowed)
        except UnicodeEncodeError as error:
            raise UnusableRecord("missing-image", f"{name!r:.200} is no name of a file: {error.reason}") from error
        except OSError as error:
            raise UnusableRecord("missing-image", f"{named!s:.200}: {error.strerror}") from error

    def _read(self, named: Path, name: str) -> bytes:
        """Return the bytes of a file inside the folder."""
        try:
            path = Path(os.path.realpath(named, strict=True))
        except OSError:
            self._check(Path(os.path.realpath(named)), name)  # what leads out is no better for leading nowhere
            raise
        self._check(path, name)
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # opening a pipe or a device could wait for ever
            raise UnusableRecord("missing-image", f"{path} is no file")
        if found.st_size > MAX_MEMBER_BYTES:
            raise UnusableRecord("image-too-large", f"{path}: {found.st_size} bytes, limit {MAX_MEMBER_BYTES}")
        return path.read_bytes()

    def _check(self, path: Path, name: str) -> None:
        """Refuse a path that leads out of the folder."""
        if not any(path.is_relative_to(folder) for folder in self._allowed):
            raise UnusableRecord("unsafe-path", f"{name!r:.200} leads out of {self.folder}, to {path!s:.200}")


def check_picture(data: bytes, max_pixels: int) -> Picture:
    """Decode an image and return it as it is to be stored.

    Raises:
        UnusableRecord: if it is larger than `max_pixels`, damaged, or of no format we store.
    """
    try:
        with warnings.catch_warnings():
            # Of size, where our own limit is the lower one, and of odd metadata, which are not used.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=_OPENED)
            if image.width * image.height > max_pixels:
                size = f"{image.width} x {image.height} pixels"
                raise UnusableRecord("image-too-large", f"{size}, the limit is {max_pixels}")
            image.load()
            return _stored(data, image)
    except Image.DecompressionBombError as error:
        raise UnusableRecord("image-too-large", str(error)) from error
    except (UnusableRecord, MemoryError):
        raise
    except UnidentifiedImageError as error:  # its own words name an object in memory
        raise UnusableRecord("bad-image", f"{len(data)} bytes that are none of {', '.join(_OPENED)}") from error
    except Exception as error:  # what decoders raise for hostile bytes is not a closed list
        refuse_lack_of_memory(error)
        raise UnusableRecord("bad-image", f"{type(error).__name__}: {error}") from error


def _stored(data: bytes, image: Image.Image) -> Picture:
    """Return a decoded image with the bytes that are stored for it."""
    form = str(image.format)
    if form in _KEPT:
        return Picture(data, _KEPT[form], *image.size)
    if image.mode not in _PNG_MODES:
        raise UnusableRecord("bad-image", f"a {form} of mode {image.mode} is no PNG without loss: convert the file")
    buffer = io.BytesIO()
    # Without what the file says about itself: colour profiles and resolutions are not used, comments are no image.
    image.info = {key: value for key, value in image.info.items() if key == "transparency"}
    image.save(buffer, "PNG")
    return Picture(buffer.getvalue(), "png", *image.size, form)
