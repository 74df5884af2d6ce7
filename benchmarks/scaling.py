"""Predict what a training takes on clusters: the tables of docs/scaling.md.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --step-seconds 52 --cluster A100-80 --gpus 1      # the utilisation that this means

Closed forms alone: seconds on a CPU, nothing is loaded or timed. Clusters and assumptions stand in scaling.yaml.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import yaml

from pgp_lightning.errors import ConfigError
from pgp_lightning.evaluation.flops import prefill_flops, vision_flops
from pgp_lightning.evaluation.scaling import (
    Assumptions,
    Cluster,
    Strategy,
    Workload,
    largest_batch,
    predict,
    utilisation,
)
from pgp_lightning.training.global_batch import micro_batches
from pgp_lightning.vlm.memory import geometry

GUIDES = ("InternVL2_5-1B", "InternVL2_5-8B", "InternVL2_5-26B")
STRATEGIES: tuple[Strategy, ...] = ("ddp", "zero2", "zero3")


def read(file: Path) -> tuple[dict[str, Cluster], Assumptions]:
    """Read clusters of one node each, and assumptions."""
    found = yaml.safe_load(file.read_text(encoding="utf-8"))
    clusters = {
        name: Cluster(
            gpus_per_node=row["gpus_per_node"],
            nodes=1,
            flops=row["teraflops"] * 1e12,
            single_flops=row["single_teraflops"] * 1e12,
            memory=row["gib"] * 2**30,
            intra=row["intra"] * 1e9,
            inter=row["inter"] * 1e9,
            price=row["price"],
        )
        for name, row in found["clusters"].items()
    }
    return clusters, Assumptions(**found.get("assumptions", {}))


def show(title: str, head: str, rows: Iterable[Iterable[object]]) -> None:
    """Print a table in Markdown."""
    columns = [cell.strip() for cell in head.split("|")]
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")


def records(work: Workload) -> Iterable[tuple[object, ...]]:
    """Yield what a record costs by its tiles."""
    for tiles in (1, 3, 5, 7):
        half, wide = replace(work, tiles=tiles).flops
        yield tiles, tiles * work.config.image_seq_length, f"{half / 1e12:.2f}", f"{wide / 1e12:.3f}"


def steps(
    work: Workload, clusters: dict[str, Cluster], gpus: list[int], given: Assumptions
) -> Iterable[tuple[object, ...]]:
    """Yield steps under DDP."""
    for name, cluster in clusters.items():
        for count in gpus:
            if not largest_batch(work, cluster.of(count), "ddp", given):
                yield name, count, "does not fit", *[""] * 8
                continue
            p = predict(work, cluster.of(count), "ddp", given=given)
            yield (
                name, count, f"{p.batch_size} x {p.accumulation}", f"{p.seconds:.2f}", f"{1e3 * p.communication:.1f}",
                f"{p.memory / 2**30:.1f}", f"{p.cores:.2f}", f"{p.read / 1e6:.1f}", f"{p.hours:.1f}",
                f"{p.gpu_hours:.0f}", f"{p.cost:.0f}",
            )  # fmt: skip


def strategies(
    guides: Iterable[str], clusters: dict[str, Cluster], tiles: int, given: Assumptions
) -> Iterable[tuple[object, ...]]:
    """Yield what fits into one node of each kind, and what it takes."""
    for guide in guides:
        work = Workload(geometry(guide), tiles)
        for name, cluster in clusters.items():
            cells: list[object] = [guide, f"{work.trained / 4e6:.0f} M", name]
            for strategy in STRATEGIES:
                if size := largest_batch(work, cluster, strategy, given):
                    p = predict(work, cluster, strategy, size, given)
                    cells += [f"{size} x {p.accumulation}: {p.memory / 2**30:.0f} GiB, {p.wire / 1e9:.3g} GB, "
                              f"{p.seconds:.1f} s"]  # fmt: skip
                else:
                    cells.append("does not fit")
            yield cells


def batches(work: Workload) -> Iterable[tuple[object, ...]]:
    """Yield the numbers of GPUs that share a step's records, and their micro-batches."""
    for gpus in range(1, work.records + 1):
        if work.records % gpus == 0:
            each = work.records // gpus
            sizes = [n for n in range(1, min(each, 16) + 1) if each % n == 0]
            yield gpus, each, ", ".join(f"{n} x {micro_batches(work.records, gpus, n)}" for n in sizes)


def llava_utilisation(slots: int) -> float:
    """Return what LLaVA-1.5-7B's published time means: 665,298 records in 10 hours on eight A100, all weights trained.

    Forward, twice that backward, and forward again for checkpointing; the tower is frozen.

    Args:
        slots: of a record on average, which is not published.
    """
    config = geometry("llava-1.5-7b")
    flops = 4 * prefill_flops(config, [slots] * config.text_config.num_hidden_layers) + vision_flops(config, 1)
    return 665_298 * flops / (8 * 312e12 * 10 * 3600)


def main() -> None:
    """Print the tables, or a fitted utilisation.

    Raises:
        SystemExit: if the GPUs cannot share a step's records.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("scaling.yaml"))
    parser.add_argument("--model", default=GUIDES[0], help="of docs/models.md")
    parser.add_argument("--tiles", type=int, default=7, help="of an image, the thumbnail included")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8, 16, 88, 176])
    parser.add_argument("--cluster", nargs="+", help="names in the configuration; all by default")
    parser.add_argument("--utilisation", type=float, help="in place of the configuration's")
    parser.add_argument("--step-seconds", type=float, help="measured: print the utilisation that it means")
    asked = parser.parse_args()
    clusters, given = read(asked.config)
    clusters = {name: clusters[name] for name in asked.cluster or clusters}
    given = replace(given, utilisation=asked.utilisation) if asked.utilisation else given
    work = Workload(geometry(asked.model), asked.tiles)
    try:
        if asked.step_seconds:
            for name, cluster in clusters.items():
                found = utilisation(work, cluster.of(asked.gpus[0]), asked.step_seconds)
                print(f"{asked.step_seconds:g} s a step on {asked.gpus[0]} x {name}: utilisation {found:.3f}")
            return
        print(f"{asked.model}, {asked.tiles} tiles, {given}")
        show("TFLOP of a record", "tiles | visual tokens | dtype of the base | float32", records(work))
        show(
            "DDP",
            "GPU | number | micro-batch x accumulation | s a step | of it ms communication | GiB | cores per GPU "
            "| MB/s per GPU | hours | GPU hours | cost",
            steps(work, clusters, asked.gpus, given),
        )
        head = "guide | trained | GPUs | " + " | ".join(STRATEGIES)
        show("One node: micro-batch x accumulation: memory, sent by each GPU in a step, time of a step", head,
             strategies(dict.fromkeys((asked.model, *GUIDES)), clusters, asked.tiles, given))  # fmt: skip
        show("Records of a step", "GPUs | records of each | batch_size x accumulation", batches(work))
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from error
    shares = ", ".join(f"{slots} slots {llava_utilisation(slots):.2f}" for slots in (750, 850, 1000))
    print(f"\nUtilisation of LLaVA-1.5-7B's published time: {shares}")


if __name__ == "__main__":
    main()
