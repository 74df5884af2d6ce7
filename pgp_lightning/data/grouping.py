"""Batches of records of similar size: less padding, with the order still a pure function of the place.

Within a lane, `group_batches` batches in a row are a block. Its records are sorted by estimated slots, cut into
batches, and the batches are delivered in a shuffled order; every record stays within its block, so an epoch has the
same records and a run resumes by making its block again. Sizes are estimated from the record's JSON alone, for the
record that is due: whatever replaces one that cannot be used comes in its place, whatever its size.

Sources of different sizes meet less often in a batch, and so their shares are exact over whole blocks of all lanes
rather than over any few batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import chain
from typing import Any

from pgp_lightning.data.conversation import ConversationReader, stated_size
from pgp_lightning.data.mixture import EpochPlan, Lane
from pgp_lightning.data.records import parse_text
from pgp_lightning.errors import ConfigError, DataError

__all__ = ["Place", "SlotEstimate", "lane_batches"]

# The source of a record, and its candidates: its own position in the source's order, then its substitutes'.
Place = tuple[int, Iterator[int]]

# A token has about four bytes of UTF-8 in English and three in Chinese, where a character has three.
_BYTES_PER_TOKEN = 4
_SIZES_REMEMBERED = 4096


class SlotEstimate:
    """Estimates a record's longest prompt with answer, in slots, without decoding its image or tokenising its text.

    Args:
        reader: what tiles the images, chooses the turns, and limits the length.
    """

    def __init__(self, reader: ConversationReader) -> None:
        self.reader = reader
        self._visual = lru_cache(maxsize=_SIZES_REMEMBERED)(self._count_visual)

    def __call__(self, text: bytes | None, size: Callable[[], tuple[int, int]], max_tiles: int | None = None) -> int:
        """Return the estimate, 0 for a record that cannot be used.

        Args:
            text: its JSON.
            size: opens the image and returns width and height; called if the record does not state them.
            max_tiles: the source's own limit.

        Raises:
            ConfigError, DataError: if `size` does.
        """
        try:
            record: Any = parse_text(text)
            turns = record["turns"][:1] if self.reader.turns == "first" else record["turns"]
            system = record.get("system") or ""
            words = max(len((system + turn["question"] + turn["answer"]).encode()) for turn in turns)
            width, height = stated_size(record) or size()
            visual = self._visual(width, height, max_tiles)
        except (ConfigError, DataError):
            raise
        except (ValueError, TypeError, LookupError):  # a surprise to be counted when it is read
            return 0
        # What is too long gets fewer tiles until it fits.
        return min(visual + words // _BYTES_PER_TOKEN, self.reader.budget)

    def _count_visual(self, width: int, height: int, max_tiles: int | None) -> int:
        return self.reader.rule(max_tiles).grid(width, height).tokens


def lane_batches(plan: EpochPlan, number: int, first: int, slots: Callable[[int, int], int]) -> Iterator[list[Place]]:
    """Yield a lane's batches of an epoch in order.

    Args:
        plan: the epoch's plan.
        number: the lane.
        first: batches of the lane that were consumed before.
        slots: source and position in its order -> estimated slots; called only where batches are grouped.
    """
    mixture = plan.mixture
    group, size = mixture.group_batches, mixture.batch_size
    count = mixture.batches_per_epoch // mixture.lanes
    begun, skip = divmod(first, group)
    lane = Lane(plan, number, begun * group * size)
    for block in range(begun, -(-count // group)):
        batches = min(group, count - block * group)
        places = [lane.take() for _ in range(batches * size)]
        if batches > 1:
            places = _sorted(places, slots)
        cut = [places[start : start + size] for start in range(0, len(places), size)]
        order = plan.group_order(number, block, batches) if batches > 1 else [0]
        yield from (cut[batch] for batch in order[skip:])
        skip = 0


def _sorted(places: list[Place], slots: Callable[[int, int], int]) -> list[Place]:
    """Sort places by the estimated slots of the records that are due there; equals stay in order."""
    sized = []
    for source, candidates in places:
        due = next(candidates)
        sized.append((slots(source, due), (source, chain([due], candidates))))
    return [place for _, place in sorted(sized, key=lambda entry: entry[0])]
