"""`pgp compare`: run a benchmark, and write its report beside the results."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from PIL import Image

from pgp_lightning.errors import ConfigError
from pgp_lightning.evaluation.benchmark import ALONE, Benchmark
from pgp_lightning.evaluation.explorer import write_explorer
from pgp_lightning.evaluation.report import paired_markdown, paired_table, write_report
from pgp_lightning.training.command_line import quieten, reason_of, terse
from pgp_lightning.training.images import reassemble
from pgp_lightning.vlm.tiles import TileGrid

__all__ = ["compare"]


def compare(arguments: Sequence[str]) -> Path:
    """Run the command and return the results folder.

    Args:
        arguments: of the command line, `--config` among them.

    Raises:
        ConfigError: if the configuration cannot work.
        DataError: if too many records cannot be used.
    """
    quieten()
    parser = ArgumentParser(prog="pgp compare", description=Benchmark.__doc__, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML with the arguments below")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results; a stopped run goes on")
    parser.add_argument("--reference", type=str, default="pgp", help="the method that differences are to")
    parser.add_argument("--explore", type=list[str], default=[], help="rows that the failure explorer shows, pgp@5")
    parser.add_argument("--pairs", type=list[tuple[str, str]], default=[], help="methods to compare in pairs")
    parser.add_argument(
        "--split_pairs", type=list[tuple[str, str]], default=[], help="pairs, split by whether guide_alone is right"
    )
    parser.add_class_arguments(Benchmark, as_group=False)
    try:
        given = parser.parse_args(list(arguments))
        described = _plain(given)
        built: Any = parser.instantiate(given)
        own = ("config", "output", "reference", "explore", "pairs", "split_pairs")
        benchmark = Benchmark(**{key: value for key, value in built.items() if key not in own})
    except ArgumentError as error:
        raise ConfigError(terse(str(error))) from error
    except (TypeError, ValueError) as error:
        raise ConfigError(reason_of(error)) from error
    for key in own:
        described.pop(key, None)
    output: Path = built.output
    benchmark.run(output, described)
    report = write_report(output, reference=built.reference)
    splits = list(ALONE) if benchmark.guide_alone else []
    _write_pairs(output, built.pairs, built.split_pairs, splits, benchmark.keep_ratios)
    pictures = _Pictures(benchmark)
    page = write_explorer(
        output, pictures.image, pictures.grid, methods=built.explore or None, reference=built.reference
    )
    sys.stdout.write(report.markdown() + f"\nreport: {output / 'report.md'}, curve.svg, {page.name}\n")
    return output


def _plain(given: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return a parsed configuration as JSON has it, what is not set included."""
    found: dict[str, Any] = json.loads(json.dumps(given.as_dict(), default=str))
    return found


def _write_pairs(
    folder: Path,
    pairs: Sequence[tuple[str, str]],
    split_pairs: Sequence[tuple[str, str]],
    splits: Sequence[str],
    keep_ratios: Sequence[float],
) -> None:
    """Write paired.md: each pair at every budget, some of them also by whether the guide alone is right."""

    def at(pair: tuple[str, str]) -> list[tuple[str, str]]:
        return [(f"{pair[0]}@{100 * ratio:g}", f"{pair[1]}@{100 * ratio:g}") for ratio in keep_ratios]

    rows = [row for pair in pairs for row in paired_table(folder, at(pair))]
    for split in splits:
        parts = [row for pair in split_pairs for row in paired_table(folder, at(pair), split=split)]
        rows += [row for row in parts if row.part != "all"]
    if rows:
        (folder / "paired.md").write_text(paired_markdown(rows), encoding="utf-8")


class _Pictures:
    """The images of a benchmark, put together again from their tiles."""

    def __init__(self, benchmark: Benchmark) -> None:
        self._found: dict[str, tuple[Image.Image, TileGrid]] = {}
        for batch in benchmark.data.sample(benchmark.split, benchmark.images):
            starts = [0]
            for grid in batch.request.grids:
                starts.append(starts[-1] + grid.tiles)
            for key, image in zip(batch.keys, batch.request.images, strict=True):
                if key not in self._found:
                    grid, start = batch.request.grids[image], starts[image]
                    tiles = batch.request.tiles[start : start + grid.tiles]
                    picture = Image.fromarray(reassemble(tiles.numpy(), grid)[0])
                    picture.thumbnail((224, 224))
                    self._found[key] = picture, grid

    def image(self, key: str) -> Image.Image:
        """Return the image of a record."""
        return self._found[key][0]

    def grid(self, key: str) -> TileGrid:
        """Return how it was tiled."""
        return self._found[key][1]
