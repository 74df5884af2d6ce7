"""`pgp compare`: run a benchmark, and write its report beside the results."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from PIL import Image

from pgp_lightning.errors import ConfigError
from pgp_lightning.evaluation.benchmark import ALONE, Benchmark
from pgp_lightning.evaluation.explorer import explored_scenes, explorer_page
from pgp_lightning.evaluation.report import paired_markdown, paired_table, write_report
from pgp_lightning.evaluation.resume import Part
from pgp_lightning.evaluation.scoring import Scene, load_results
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
    parser.add_argument(
        "--reference",
        type=str | None,
        default=None,
        help="the method, or the row (pgp@5, full), that differences are to; by default the first method",
    )
    parser.add_argument("--explore", type=list[str], default=[], help="rows that the failure explorer shows, pgp@5")
    parser.add_argument(
        "--pairs", type=list[tuple[str, str]], default=[], help="methods to compare in pairs, at every budget"
    )
    parser.add_argument(
        "--split_pairs", type=list[tuple[str, str]], default=[], help="pairs, split by whether guide_alone is right"
    )
    parser.add_argument(
        "--part",
        type=str | None,
        default=None,
        metavar="NUMBER/PARTS",
        help="answer with the second of five shares of the methods (2/5) and write no report; the same command without "
        "this takes in what the parts have answered, answers the rest, and reports",
    )
    parser.add_class_arguments(Benchmark, as_group=False)
    try:
        given = parser.parse_args(list(arguments))
        described = _plain(given)
        built: Any = parser.instantiate(given)
        own = ("config", "output", "reference", "explore", "pairs", "split_pairs", "part")
        benchmark = Benchmark(**{key: value for key, value in built.items() if key not in own})
    except ArgumentError as error:
        raise ConfigError(terse(str(error))) from error
    except (TypeError, ValueError) as error:
        raise ConfigError(reason_of(error)) from error
    for key in own:
        described.pop(key, None)
    output: Path = built.output
    part = None if built.part is None else Part.read(built.part)
    reference: str = built.reference or next(iter(benchmark.pruners), "full")
    pairs, split_pairs = _check_names(benchmark, reference, built.explore, built.pairs, built.split_pairs)
    benchmark.run(output, described, part)
    if part is not None:
        sys.stdout.write(f"part {part} is answered: {part.inside(output)}\n")
        return output
    report = write_report(output, reference=reference)
    _write_pairs(output, pairs, split_pairs, list(ALONE) if benchmark.guide_alone else [])
    results, shown = load_results(output, [row.method for row in report.rows]), built.explore or None
    pictures = _Pictures(benchmark, explored_scenes(results, report, shown))
    page = output / "explorer.html"
    page.write_text(explorer_page(results, report, pictures.image, pictures.grid, shown), encoding="utf-8")
    sys.stdout.write(report.markdown() + f"\nreport: {output / 'report.md'}, curve.svg, {page.name}\n")
    return output


def _plain(given: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return a parsed configuration as JSON has it, what is not set included."""
    found: dict[str, Any] = json.loads(json.dumps(given.as_dict(), default=str))
    return found


Pairs = list[tuple[str, str]]


def _check_names(
    benchmark: Benchmark, reference: str, explore: Sequence[str], pairs: Pairs, split_pairs: Pairs
) -> tuple[Pairs, Pairs]:
    """Check what the report is asked for before anything runs, and return both kinds of pairs row by row.

    Raises:
        ConfigError: if it names a row that there will not be.
    """
    rows = benchmark.row_names()
    labels = list(dict.fromkeys(row.partition("@")[0] for row in rows))

    def check(what: str, names: Sequence[str], among: Collection[str]) -> None:
        if unknown := [name for name in names if name not in among]:
            raise ConfigError(f"{what} names {', '.join(unknown)}, expected one of {', '.join(among)}")

    check("reference", [reference], [*labels, *(row for row in rows if "@" in row)])
    check("explore", explore, [row for row in rows if row != "full"])
    for what, listed in (("pairs", pairs), ("split_pairs", split_pairs)):
        check(what, [name for pair in listed for name in pair], labels)
    if split_pairs and not benchmark.guide_alone:
        raise ConfigError("split_pairs are split by whether the guide alone is right: give guide_alone, or leave them")

    def by_row(listed: Pairs) -> Pairs:
        found = []
        for first, second in listed:
            for ratio in benchmark.keep_ratios:
                # The full model and the guide alone have no budget.
                at = [name if name in rows else f"{name}@{100 * ratio:g}" for name in (first, second)]
                found.append((at[0], at[1]))
        return list(dict.fromkeys(found))

    return by_row(pairs), by_row(split_pairs)


def _write_pairs(folder: Path, pairs: Pairs, split_pairs: Pairs, splits: Sequence[str]) -> None:
    """Write paired.md: each pair of rows, some of them also by whether the guide alone is right."""
    rows = paired_table(folder, pairs) if pairs else []
    for split in splits if split_pairs else ():
        rows += [row for row in paired_table(folder, split_pairs, split=split) if row.part != "all"]
    if rows:
        (folder / "paired.md").write_text(paired_markdown(rows), encoding="utf-8")


class _Pictures:
    """Images of a benchmark, put together again from their tiles.

    Args:
        benchmark: whose data is read once more.
        needed: the scenes whose images are held.
    """

    def __init__(self, benchmark: Benchmark, needed: Collection[Scene]) -> None:
        self._found: dict[Scene, tuple[Image.Image, TileGrid]] = {}
        for batch in benchmark.data.sample(benchmark.split, benchmark.images) if needed else ():
            starts = [0]
            for grid in batch.request.grids:
                starts.append(starts[-1] + grid.tiles)
            for scene, image in zip(zip(batch.sources, batch.keys, strict=True), batch.request.images, strict=True):
                if scene in needed and scene not in self._found:
                    grid, start = batch.request.grids[image], starts[image]
                    tiles = batch.request.tiles[start : start + grid.tiles]
                    picture = Image.fromarray(reassemble(tiles.numpy(), grid)[0])
                    picture.thumbnail((224, 224))
                    self._found[scene] = picture, grid
            if len(self._found) == len(needed):
                break

    def image(self, scene: Scene) -> Image.Image:
        """Return the image of a scene."""
        return self._found[scene][0]

    def grid(self, scene: Scene) -> TileGrid:
        """Return how it was tiled."""
        return self._found[scene][1]
