"""What the variants of a training step cost, compared and printed."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from pgp_lightning.evaluation.training_flops import PARTS, Flops, Shape

__all__ = ["Measured", "agrees", "print_costs", "print_counts", "ratios"]


@dataclass
class Measured:
    """What one variant cost."""

    shape: Shape
    flops: Flops
    """By the closed forms."""
    counted: Flops
    """By torch's counter."""
    peak_bytes: int
    """Of live tensors; on CUDA, of the allocator."""
    start_bytes: int
    """The same before the step: weights."""
    seconds: list[float] = field(default_factory=list)
    """Of each timed step."""
    processor_seconds: list[float] = field(default_factory=list)
    """Processor time of the same, all threads together: on one thread, others on the machine lengthen it little."""

    @property
    def total(self) -> int:
        """FLOPs of the step."""
        return sum(map(sum, self.flops.values()))

    @property
    def median(self) -> float:
        """Seconds of the step."""
        return statistics.median(self.seconds)


def ratios(found: dict[str, Measured], variant: str) -> dict[str, float]:
    """Compare a variant with ours: FLOPs by the closed forms, peak memory, seconds of the medians and of each turn."""
    mine, other = found["ours"], found[variant]
    flops = other.total / mine.total
    result = {"flops": flops, "checkpointed_memory": found["checkpointed"].peak_bytes / other.peak_bytes}
    if mine.seconds and other.seconds:
        turns = [theirs / own for theirs, own in zip(other.seconds, mine.seconds, strict=True)]
        speed = other.median / mine.median
        result |= {"speed": speed, "speed_min": min(turns), "speed_max": max(turns), "speed_to_flops": speed / flops}
        result["processor"] = statistics.median(other.processor_seconds) / statistics.median(mine.processor_seconds)
    return result


def agrees(one: Measured) -> bool:
    """Tell whether every closed form equals what torch counted, and nothing was counted besides."""
    return {part: flops for part, flops in one.flops.items() if sum(flops)} == one.counted


def print_counts(found: dict[str, Measured]) -> None:
    """Print the FLOPs of every part and peak memory."""
    print(f"\n{'GFLOP, forward + backward':28}" + "".join(f"{variant:>22}" for variant in found))
    for part in PARTS:
        cells = ["{:.4g} + {:.4g}".format(*(f / 1e9 for f in one.flops[part])) for one in found.values()]
        print(f"{part:28}" + "".join(f"{cell:>22}" for cell in cells))
    lines = {
        "all": [f"{one.total / 1e9:.5g}" for one in found.values()],
        "to ours": [f"{one.total / found['ours'].total:.3f}" for one in found.values()],
        "each equals the counter": ["yes" if agrees(one) else "NO" for one in found.values()],
        "GiB at the peak": [f"{one.peak_bytes / 2**30:.3g}" for one in found.values()],
        "of which weights": [f"{one.start_bytes / 2**30:.3g}" for one in found.values()],
    }
    for title, cells in lines.items():
        print(f"{title:28}" + "".join(f"{cell:>22}" for cell in cells))
    for variant in ("a", "b"):
        print(f"peak memory, checkpointed / {variant}: {ratios(found, variant)['checkpointed_memory']:.2f}", flush=True)


def print_costs(found: dict[str, Measured], peak: float) -> None:
    """Print what every timed variant cost."""
    print(f"\nmatmul peak {peak / 1e9:.1f} GFLOP/s")
    print(f"{'':14}{'seconds (min - max)':>28}{'processor s':>13}{'of peak':>9}")
    for variant, one in found.items():
        if one.seconds:
            seconds = f"{one.median:.4g} ({min(one.seconds):.4g} - {max(one.seconds):.4g})"
            processor = statistics.median(one.processor_seconds)
            print(f"{variant:14}{seconds:>28}{processor:>13.4g}{one.total / one.median / peak:>9.0%}")
    for variant in ("a", "b"):
        ratio = ratios(found, variant)
        if "speed" in ratio:
            turns = f"{ratio['speed_min']:.3f} - {ratio['speed_max']:.3f}"
            print(
                f"{variant} / ours: FLOPs {ratio['flops']:.3f}, time {ratio['speed']:.3f} ({turns}), "
                f"time to FLOPs {ratio['speed_to_flops']:.2f}; processor time {ratio['processor']:.3f}",
                flush=True,
            )
