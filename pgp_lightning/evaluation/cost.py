"""What answering with a pruned prompt costs, from configurations alone: FLOPs by part, key-value entries, break-even.

    python -m pgp_lightning.evaluation.cost      # Table 3 of the PGP paper beside our figures

A multiply-add is 2 (`flops.py` says what counts). The paper prints the mean of 100 samples and says neither what a
multiply-add counts nor how many tiles and slots of text the samples had. Counted as 2, its figures are those of 5 tiles
and 150 slots of text within 3 %; counted as 1, those of some 9.4 tiles and 475 slots fit as well. The release of SGP,
beside which the paper measures, cuts at most six tiles and a thumbnail, so the first is the likely one: its FLOPs are
FLOPs, not multiply-adds. Its figures include the answers' tokens, so our 150 slots do.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from pgp_lightning.errors import ConfigError
from pgp_lightning.evaluation.flops import (
    Decoder,
    decode_flops,
    head_flops,
    posterior_flops,
    prefill_flops,
    projector_flops,
    vision_flops,
)
from pgp_lightning.selection import keep_count
from pgp_lightning.vlm.memory import Config, cache_bytes, geometry, tokens_per_tile

__all__ = [
    "PAPER",
    "PAPER_GUIDE",
    "GuideFlops",
    "KVCost",
    "PruneCost",
    "Schedule",
    "break_even",
    "break_even_table",
    "kv_cost",
    "prune_cost",
    "table",
]

TERA = 10**12
GuideFlops = Callable[[int, int], int]
"""FLOPs of a guide's run on (tiles, slots of text): a `partial` of `posterior_flops` or `attention_flops`."""

PAPER: dict[tuple[float, int], float] = {(1.0, 0): 117.7, (0.2, 9): 83.4, (0.05, 2): 69.3, (0.05, 0): 67.3}
"""Table 3 of the paper: TFLOPs of InternVL2-26B by (keep ratio, L)."""
PAPER_GUIDE = 4.7
"""TFLOPs of the guide, from the same table."""


@dataclass(frozen=True)
class Schedule:
    """How many visual tokens every decoder layer reads in the prefill, in one row.

    Attributes:
        visual: number N of visual tokens of the unpruned prompt.
        layers: those that each layer reads, first to last.
    """

    visual: int
    layers: tuple[int, ...]

    @classmethod
    def cut(cls, depth: int, visual: int, kept: int, layer: int = 0) -> Schedule:
        """Return the schedule of a single cut.

        Args:
            depth: number D of decoder layers.
            visual: number N of visual tokens.
            kept: how many stay.
            layer: L, the first layer that reads only those; 0 prunes before the first.

        Raises:
            ConfigError: if the layer is none of the model's, or more is kept than there is.
        """
        if not 0 <= layer < depth:
            raise ConfigError(f"layer must be from 0 to {depth - 1}, got {layer}; the model has {depth} decoder layers")
        if not 0 <= kept <= visual:
            raise ConfigError(f"kept must be from 0 to the {visual} visual tokens there are, got {kept}")
        return cls(visual, (visual,) * layer + (kept,) * (depth - layer))

    @property
    def kept(self) -> int:
        """Visual tokens of the last layer: what stays after all cuts."""
        return self.layers[-1]

    @property
    def average(self) -> float:
        """Visual tokens of a layer, averaged over layers: what papers call equivalent or average tokens."""
        return sum(self.layers) / len(self.layers)

    def slots(self, text: int) -> tuple[int, ...]:
        """Return the prompt slots of each layer: its visual tokens and those of text, which are never pruned."""
        return tuple(count + text for count in self.layers)


@dataclass(frozen=True)
class KVCost:
    """The key-value cache of one row.

    Attributes:
        layers: entries of each layer; an entry is one slot's key and value.
        size: bytes of all layers together.
    """

    layers: tuple[int, ...]
    size: int

    @property
    def entries(self) -> int:
        """Entries of all layers together."""
        return sum(self.layers)


@dataclass(frozen=True)
class PruneCost:
    """FLOPs of answering one question with an answer model of which tokens may be pruned, by part.

    Attributes:
        vision: the answer model's vision tower.
        projector: its projector.
        guide: whatever scores the tokens beforehand, its own vision tower included.
        prefill: the answer model's decoder on the prompt, and its head on the last slot.
        decode: its decoder and head on every further token.
    """

    vision: int
    projector: int
    guide: int
    prefill: int
    decode: int

    @property
    def answer_model(self) -> int:
        """All but the guide's."""
        return self.vision + self.projector + self.prefill + self.decode

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.answer_model + self.guide


def kv_cost(config: Config, slots: Sequence[int], steps: int = 0, dtype: torch.dtype = torch.bfloat16) -> KVCost:
    """Return the key-value cache of a row.

    Args:
        config: of the model.
        slots: prompt slots of each decoder layer, see `Schedule.slots`.
        steps: tokens decoded since, each an entry in every layer.
        dtype: of the cache.

    Raises:
        ConfigError: if there is not one number for every layer.
    """
    decoder = Decoder(config)
    decoder.check(slots)
    layers = tuple(n + steps for n in slots)
    return KVCost(layers, sum(layers) * cache_bytes(config, 1, dtype) // decoder.depth)


def prune_cost(
    config: Config,
    schedule: Schedule,
    *,
    tiles: int,
    text: int,
    guide: int = 0,
    new_tokens: int = 1,
    tiles_encoded: int | None = None,
    slots: Sequence[int] | None = None,
    cached: Sequence[int] | None = None,
) -> PruneCost:
    """Return the FLOPs of answering one question about one image.

    Args:
        config: of the answer model.
        schedule: visual tokens of its decoder layers.
        tiles: of the image, the thumbnail included.
        text: prompt slots of text.
        guide: FLOPs of the guide, if there is one.
        new_tokens: length of the answer, its stop token included.
        tiles_encoded: tiles that the answer model's vision tower runs on; by default all.
        slots: prompt slots that each layer reads; by default the schedule's tokens and the text.
        cached: prompt slots that each layer's cache holds for decoding; by default those that it read.

    Raises:
        ConfigError: if the first layer reads more visual tokens than the encoded tiles give.
    """
    encoded = tiles if tiles_encoded is None else tiles_encoded
    most = encoded * tokens_per_tile(config)
    if schedule.layers[0] > most or encoded > tiles:
        raise ConfigError(
            f"tiles_encoded must be at most {tiles} and give the {schedule.layers[0]} visual tokens that the first "
            f"layer reads, got {encoded} ({most} tokens); tiles can be skipped only where tokens are pruned at layer 0"
        )
    slots = schedule.slots(text) if slots is None else slots
    return PruneCost(
        vision=vision_flops(config, encoded),
        projector=projector_flops(config, encoded),
        guide=guide,
        prefill=prefill_flops(config, slots) + head_flops(config),
        decode=decode_flops(config, slots if cached is None else cached, new_tokens - 1),
    )


def break_even(
    config: Config,
    guide: GuideFlops,
    *,
    keep_ratio: float,
    layer: int,
    text: int,
    new_tokens: int = 1,
    tiles: Iterable[int] = range(1, 41),
) -> int | None:
    """Return the smallest number of tiles at which guide and pruned model together cost less than the full model.

    Every tile is encoded by both models; the vision towers' costs grow with the tiles as the decoders' do, so a guide
    that is too large for its answer model stays so, and there may be no such number.

    Args:
        config: of the answer model.
        guide: FLOPs of the guide for (tiles, slots of text).
        keep_ratio: share of the visual tokens that stays.
        layer: L at which the others go.
        text: prompt slots of text, for both models.
        new_tokens: length of the answer.
        tiles: numbers to try.

    Returns:
        The number of tiles, or None if it is none of those tried.
    """
    depth = Decoder(config).depth
    for count in sorted(tiles):
        visual = count * tokens_per_tile(config)
        schedules = (Schedule.cut(depth, visual, keep_count(visual, keep_ratio), layer),
                     Schedule.cut(depth, visual, visual))  # fmt: skip
        pruned, full = (prune_cost(config, s, tiles=count, text=text, new_tokens=new_tokens) for s in schedules)
        if pruned.total + guide(count, text) < full.total:
            return count
    return None


def table(tiles: int = 5, text: int = 150, new_tokens: int = 1, tiles_encoded: int | None = None) -> str:
    """Return Table 3 of the paper (InternVL2-26B pruned by a guide of InternVL2-1B) as Markdown, beside its figures.

    Args:
        tiles: of 448 pixels and 256 visual tokens, thumbnail included; the paper does not say.
        text: prompt slots of text; the paper does not say.
        new_tokens: length of the answer.
        tiles_encoded: tiles that still have a token at L = 0; by default half of them. Images differ.
    """
    config, base = geometry("InternVL2-26B"), geometry("InternVL2-1B")
    depth, visual = Decoder(config).depth, tiles * tokens_per_tile(config)
    some = (tiles + 1) // 2 if tiles_encoded is None else tiles_encoded
    guide = posterior_flops(base, tiles, text)
    lines = [
        f"TFLOPs (a multiply-add is 2) of InternVL2-26B with a guide of InternVL2-1B: {tiles} tiles ({visual} visual "
        f"tokens), {text} slots of text, {new_tokens} new token{'s'[: new_tokens != 1]}. Skipping: the answer model "
        f"encodes only tiles with a kept token, here {some}.",
        "",
        "| kept, from layer | kept, layer average | KV entries | guide | answer model | both, of full | skipping: "
        "answer model | both, of full | paper: guide + answer model |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    full = 0
    for ratio, layer in (*PAPER, (0.025, 2), (0.025, 0)):
        schedule = Schedule.cut(depth, visual, keep_count(visual, ratio), layer)
        cost = partial(prune_cost, config, schedule, tiles=tiles, text=text, new_tokens=new_tokens)
        kept, paper = f"{schedule.kept}, {schedule.average:.0f}", PAPER.get((ratio, layer), "")
        entries = f"{kv_cost(config, schedule.slots(text), new_tokens - 1).entries:,}"
        if ratio == 1:
            full = cost().total
            cells = ["all", kept, entries, "", _tera(full), "", "", "", str(paper)]
        else:
            here = cost(guide=guide)
            cells = [f"{100 * ratio:.3g} %, {layer}", kept, entries, _tera(guide), *_shares(here, full)]
            # Layers below L read every token, so that no tile can be left out.
            cells += _shares(cost(guide=guide, tiles_encoded=some), full) if layer == 0 else ["", ""]
            cells.append(f"{PAPER_GUIDE} + {paper}" if paper else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def break_even_table(text: int = 150) -> str:
    """Return as Markdown from how many tiles a guide of InternVL2-1B pays, for answer models of its family."""
    guide, budgets = partial(posterior_flops, geometry("InternVL2-1B")), ((0.05, 0), (0.05, 2), (0.2, 0), (0.2, 9))
    lines = [
        f"Tiles from which a guide of InternVL2-1B and the pruned answer model take fewer FLOPs than the full one "
        f"({text} slots of text, every tile encoded by both; none: not up to 40 tiles).",
        "",
        f"| answer model | {' | '.join(f'{100 * ratio:.3g} %, L = {layer}' for ratio, layer in budgets)} |",
        f"|---|{'---|' * len(budgets)}",
    ]
    for name in ("InternVL2-1B", "InternVL2-2B", "InternVL2_5-4B", "InternVL2-8B", "InternVL2-26B"):
        least = (break_even(geometry(name), guide, keep_ratio=r, layer=layer, text=text) for r, layer in budgets)
        lines.append(f"| {name} | {' | '.join('none' if n is None else str(n) for n in least)} |")
    return "\n".join(lines)


def _shares(cost: PruneCost, full: int) -> list[str]:
    return [_tera(cost.answer_model), f"{_tera(cost.total)}, {100 * cost.total / full:.1f} %"]


def _tera(flops: int) -> str:
    return f"{flops / TERA:.1f}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Table 3 of the PGP paper by closed forms.")
    parser.add_argument("--tiles", type=int, default=5)
    parser.add_argument("--text", type=int, default=150, help="prompt slots of text")
    parser.add_argument("--new-tokens", type=int, default=1)
    parser.add_argument("--tiles-encoded", type=int, help="tiles the answer model encodes where it skips some")
    given = parser.parse_args()
    sizes = {"tiles": given.tiles, "new_tokens": given.new_tokens, "tiles_encoded": given.tiles_encoded}
    print(table(text=given.text, **sizes), break_even_table(given.text), sep="\n\n")


if __name__ == "__main__":
    main()
