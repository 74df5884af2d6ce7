"""How the names of a tar's members make records of it, by WebDataset's rule, and which part of the rule is broken."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from webdataset.tariterators import base_plus_ext

from pgp_lightning.data.records import IMAGE_EXTENSIONS

__all__ = ["broken_rule", "key_and_extension"]

_HERE = re.compile(r"^(?:\./+)+")  # as `tar cf a.tar .` writes it


def key_and_extension(name: str) -> tuple[str | None, str | None]:
    """Return a member's key, its path up to the first dot of the file's name, and what follows that; None for no key.

    A leading `./` is no part of the path.
    """
    key, extension = base_plus_ext(_HERE.sub("", name))
    return key, extension


def broken_rule(names: Sequence[str]) -> str:
    """Say by which of its members' names a shard holds other records than meant; empty if by none.

    Args:
        names: of the members, in the order of the tar.
    """
    split = [(name, *key_and_extension(name)) for name in names]
    neighbours = [
        (key, [(name, extension or "") for name, _, extension in group])
        for key, group in groupby((entry for entry in split if entry[1] is not None), key=lambda entry: entry[1])
    ]
    for key, members in neighbours:
        images = [entry for entry in members if entry[1].rpartition(".")[2].lower() in IMAGE_EXTENSIONS]
        if dotted := next((name for name, extension in images if "." in extension and len(images) > 1), None):
            return f"{dotted}: the key ends at the first dot, so {len(images)} images share the key {key!r}: rename"
    files = Counter((key, (extension or "").lower()) for _, key, extension in split if key is not None)
    if twice := next((place for place, times in files.items() if times > 1), None):
        return f"two members have one name, {'.'.join(map(str, twice))}: a record has one image and one JSON: rename"
    apart = Counter(key for key, _ in neighbours)
    if scattered := next((key for key, times in apart.items() if times > 1), None):
        places = [number for number, (_, key, _) in enumerate(split, 1) if key == scattered]
        return (
            f"the members of the key {scattered!r} do not stand together (they are number "
            f"{', '.join(map(str, places[:4]))} of the tar): only neighbours are one record, in whichever order: write "
            f"the tar sorted by name (tar --sort=name)"
        )
    if keyless := next((name for name, key, _ in split if key is None), None):
        return f"{keyless}: a name without an extension, or that begins with a dot, belongs to no record: rename"
    return ""
