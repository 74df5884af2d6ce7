"""How many tiles pruning at L = 0 leaves to the vision tower, and what that saves, on made-up importance maps.

    python benchmarks/tile_skipping.py

Maps are bumps of importance on the image, seen by tiles and thumbnail alike: one object, four objects, and importance
spread at random over all tokens, which is the worst case. Costs are those of InternVL2-26B with a guide of
InternVL2-1B (closed forms, `pgp_lightning/evaluation/cost.py`); baseline: the same pruning with every tile encoded, and
the full model. Nothing is loaded and nothing timed; seeded. Real scenes: `configs/compare/tile_skipping.yaml`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch

from pgp_lightning.evaluation.cost import Schedule, prune_cost
from pgp_lightning.evaluation.flops import Decoder, posterior_flops
from pgp_lightning.selection import keep_count, keep_top
from pgp_lightning.vlm.memory import geometry
from pgp_lightning.vlm.tiles import TileGrid

TEXT = 150  # prompt slots of text
GRIDS = (TileGrid(2, 2, 16, True), TileGrid(3, 2, 16, True), TileGrid(4, 3, 16, True))
RATIOS = (0.025, 0.05, 0.11, 0.2)
Map = Callable[[TileGrid, np.random.Generator], np.ndarray]


def bumps(count: int, width: float = 0.06) -> Map:
    """Return a maker of maps (M,) with so many objects, whose size is a share of the image's sides."""

    def make(grid: TileGrid, generator: np.random.Generator) -> np.ndarray:
        cells = grid.rectangles()
        places = np.stack([cells[:, [0, 2]].mean(axis=1), cells[:, [1, 3]].mean(axis=1)], axis=1)
        centres = generator.uniform(0.1, 0.9, (count, 2))
        distance = ((places[:, None] - centres) ** 2).sum(axis=2)
        noise = 1e-3 * generator.random(len(places))
        return np.asarray(np.exp(-distance / (2 * width**2)).max(axis=1) + noise)

    return make


def spread(grid: TileGrid, generator: np.random.Generator) -> np.ndarray:
    """Return a map (M,) without any place."""
    return generator.random(grid.tokens)


MAPS: dict[str, Map] = {"one object": bumps(1), "four objects": bumps(4), "spread": spread}


def tiles_needed(grid: TileGrid, importance: np.ndarray, ratio: float) -> int:
    """Return how many tiles hold a token that is kept."""
    keep = keep_top(torch.from_numpy(importance).float()[None], ratio)[0]
    return int(keep.view(grid.tiles, -1).any(dim=1).sum())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", type=int, default=200, help="maps of each kind")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    config, guide = geometry("InternVL2-26B"), geometry("InternVL2-1B")
    depth = Decoder(config).depth
    print(f"TFLOPs of InternVL2-26B at L = 0, {TEXT} slots of text, guide included; {given.maps} maps of each kind")
    print("| tiles | kept | map | tiles needed | full | every tile | needed tiles | saved of the pruned run |")
    print("|---:|---:|---|---:|---:|---:|---:|---:|")
    for grid in GRIDS:
        scores = posterior_flops(guide, grid.tiles, TEXT)
        for ratio in RATIOS:
            for name, make in MAPS.items():
                generator = np.random.default_rng(given.seed)
                needed = [tiles_needed(grid, make(grid, generator), ratio) for _ in range(given.maps)]
                kept = keep_count(grid.tokens, ratio)
                schedule = Schedule.cut(depth, grid.tokens, kept)
                whole = Schedule.cut(depth, grid.tokens, grid.tokens)
                full = prune_cost(config, whole, tiles=grid.tiles, text=TEXT).total
                every = prune_cost(config, schedule, tiles=grid.tiles, text=TEXT, guide=scores).total
                some = [
                    prune_cost(config, schedule, tiles=grid.tiles, text=TEXT, guide=scores, tiles_encoded=n).total
                    for n in needed
                ]
                mean = float(np.mean(some))
                print(
                    f"| {grid.tiles} | {100 * ratio:g} % | {name} | {np.mean(needed):.1f} | {full / 1e12:.1f} | "
                    f"{every / 1e12:.1f} | {mean / 1e12:.1f} | {100 * (1 - mean / every):.0f} % |"
                )


if __name__ == "__main__":
    main()
