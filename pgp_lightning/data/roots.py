"""Roots that are URLs: which are allowed, and what lies inside them. Nothing here opens one.

Everything that is not on the list is refused: what fetches shards (fsspec) knows many more schemes, and chains of
them, than a file from elsewhere should be able to name. `pipe:COMMAND` runs a shell command in which `{file}` stands
for the path of a file; it is accepted only if the caller says so, never because a manifest does.
"""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit

__all__ = ["SCHEMES", "file_inside", "file_name", "folder_inside", "public", "public_file", "root_url"]

SCHEMES = ("s3", "gs", "https", "hf", "file")

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")  # two letters at least: C: is a drive
_NAME = re.compile(r"[A-Za-z0-9_+][A-Za-z0-9._+-]*")  # nothing that a URL or a shell would understand
_EXAMPLES = {
    "s3": "s3://BUCKET/FOLDER",
    "gs": "gs://BUCKET/FOLDER",
    "https": "https://HOST/FOLDER",
    "http": "http://localhost:PORT/FOLDER",
    "hf": "hf://datasets/OWNER/NAME/FOLDER",
    "file": "file:///FOLDER",
}


def root_url(root: str, allow_pipe: bool = False) -> str | None:
    """Return a root's URL without a slash at its end, None for a root that is a local folder.

    Raises:
        ValueError: if it is a URL that may not or cannot be used, saying what may.
    """
    if not (found := _SCHEME.match(root)):
        return None
    scheme = found.group(1).lower()
    if scheme == "pipe":
        return _pipe(root, allow_pipe)
    if scheme not in (*SCHEMES, "http"):
        allowed = ", ".join(SCHEMES)
        raise ValueError(
            f"expected a folder or a URL with one of the schemes {allowed}, got {public(root)!r}; a folder with a "
            f"colon in its name is written ./{found.group(1)}:..."
        )
    try:
        parts = urlsplit(root)
        host, _ = parts.hostname or "", parts.port  # a port that is no number raises
    except ValueError:
        # Not urlsplit's own words, nor "from error": they quote what it took for a port, perhaps half a password.
        raise ValueError(
            f"{public(root)!r} is not a URL: a port is a number; in a password, '/' is written %2F and '@' %40"
        ) from None
    if "@" in parts.path and (":" in parts.netloc or "@" in parts.netloc):
        raise ValueError(
            f"expected a URL whose password, if it has one, ends before the first '/', got {public(root)!r}: write '/' "
            f"in a password as %2F, and '@' as %40 in a password and in a path"
        )
    if parts.query or parts.fragment or "?" in root or "#" in root:
        raise ValueError(f"expected the URL of a folder, got one with '?' or '#': {public(root)!r}")
    if "::" in root.replace(f"[{host}]", "") or re.search(r"[\s\x00-\x1f\x7f\\*]", root):
        raise ValueError(f"expected a URL without spaces, backslashes, '*' and '::', got {public(root)!r}")
    if scheme == "http" and not _is_loopback(host):
        raise ValueError(
            f"http is for this machine only (localhost), got the host {host!r}: use one of {', '.join(SCHEMES)}"
        )
    there = parts.path.startswith("/") and host in ("", "localhost") if scheme == "file" else bool(host)
    if not there or not root[found.end() :].startswith("//"):
        raise ValueError(f"expected {_EXAMPLES[scheme]}, got {public(root)!r}")
    return f"{scheme}:{root[found.end() :].rstrip('/')}"


def folder_inside(url: str, name: str) -> str:
    """Return the URL of a folder inside a URL; of a pipe, the command that reads from there.

    Raises:
        ValueError: if the name has characters that a URL or a shell would understand.
    """
    _check(name)
    return url.replace("{file}", f"{name}/{{file}}") if url.startswith("pipe:") else f"{url}/{name}"


def file_inside(url: str, name: str) -> str:
    """Return the URL of a file inside a URL; of a pipe, the command that writes it to its standard output.

    Raises:
        ValueError: if the name has characters that a URL or a shell would understand.
    """
    _check(name)
    return url.replace("{file}", name) if url.startswith("pipe:") else f"{url}/{name}"


def public(url: str) -> str:
    """Return a URL for messages: without user, password, query and fragment, of a command its first word.

    A colon before an '@' may begin a password, wherever the '@' stands; what precedes the last one is then left out.
    """
    if url.startswith("pipe:"):
        return f"pipe:{(url.removeprefix('pipe:').split() or [''])[0]} ..."
    scheme, _, rest = url.partition(":")
    start = f"{scheme}://" if rest.startswith("//") else f"{scheme}:"
    rest = rest.removeprefix("//")
    before, _, after = rest.rpartition("@")
    if ":" in before:
        if re.search(r"[?#]", before):  # the '@' may as well be part of a query
            return f"{start}..."
        return start + (".../" if "/" in before else "") + re.split(r"[?#]", after, maxsplit=1)[0]
    authority, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    return start + authority.rpartition("@")[2] + slash + path


def public_file(url: str) -> str:
    """Return the URL of a file for messages; of a command its first word and the last that looks like the file."""
    return f"{public(url)} {file_name(url)}" if url.startswith("pipe:") else public(url)


def file_name(url: str) -> str:
    """Return the name of the file that a URL or a command fetches, as far as it can be a file's name here."""
    words: list[str] = re.findall(r"[A-Za-z0-9._+-]+", url)
    return next((word for word in reversed(words) if word.endswith((".tar", ".json"))), words[-1])[-100:]


def _pipe(root: str, allow_pipe: bool) -> str:
    """Check a command."""
    if not allow_pipe:
        raise ValueError(
            "a root `pipe:COMMAND` runs a shell command for every file: look at it, then set data.allow_pipe=true on "
            "the command line (of `pgp shards`: --allow-pipe) if that is what you want"
        )
    if "{file}" not in root or re.search(r"[\n\r\0]", root):
        raise ValueError(f"expected `pipe:COMMAND` in one line, with {{file}} for a file's path, got {public(root)!r}")
    return "pipe:" + root[len("pipe:") :]


def _is_loopback(host: str) -> bool:
    """Whether a host is this machine by its spelling alone, so that no name server has a say."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(f"expected letters, digits, '.', '_', '+' and '-' in a name that is fetched, got {name!r}")
