"""A pruner in twenty lines, beside random tokens on a few scenes of the embedded world.

    python examples/a_pruner_of_your_own.py

It keeps the visual tokens with the longest embeddings. docs/add_a_pruner.md goes through it in five steps.
"""

import argparse
import tempfile
from pathlib import Path

from torch import linalg

from pgp_lightning.evaluation.benchmark import Benchmark
from pgp_lightning.evaluation.report import build_report
from pgp_lightning.prefill import Pruner
from pgp_lightning.prefill_state import PrefillState
from pgp_lightning.selection import keep_top


class LongestTokens(Pruner):
    """Keeps the visual tokens whose embeddings are longest.

    Args:
        keep_ratio: share of each row's visual tokens that stay.
    """

    layers = (0,)

    def __init__(self, keep_ratio: float = 0.2) -> None:
        super().__init__()
        self.keep_ratio = keep_ratio

    def before_layer(self, depth: int, state: PrefillState) -> PrefillState:
        """Drop the others before the first decoder layer."""
        if depth not in self.layers:
            return state
        self.importance = state.to_tokens(linalg.vector_norm(state.hidden.float(), dim=-1))
        return state.keep_tokens(keep_top(self.importance, self.keep_ratio))


def main() -> None:
    """Compare it with the controls that every comparison has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--manifest", default="data_manifests/embedded.yaml")
    given = parser.parse_args()
    methods = {"longest": LongestTokens()}
    benchmark = Benchmark(methods, keep_ratios=(0.2,), manifest=given.manifest, images=given.images, max_new_tokens=8)
    with tempfile.TemporaryDirectory() as folder:
        benchmark.run(Path(folder))
        print(build_report(folder, reference="longest").markdown())


if __name__ == "__main__":
    main()
