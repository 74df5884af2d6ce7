"""Train the guides that ship with the package: three seeds of the default run, exported.

    python -m pgp_lightning.embedded.train_guides --folder build/guides

To be run in the project's root; about six minutes a seed on two idle cores. Expect recall of 0.90 to 0.92 at 5 % on
test scenes for each (docs/embedded.md has the figures). Copy the folders to `pgp_lightning/embedded/guides` to ship
them. A seed that is there is not trained again, one that was stopped goes on.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path


def main() -> None:
    """Train and export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where runs and guides go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--config", type=Path, default=Path("configs/pgp.yaml"), help="another one for a trial")
    given = parser.parse_args()
    for seed in given.seeds:
        run, guide = given.folder / f"run_seed{seed}", given.folder / f"pgp_seed{seed}"
        if guide.exists():
            continue
        fit = ["-m", "pgp_lightning", "fit", "--config", str(given.config), "--trainer.default_root_dir", str(run)]
        fit += ["--seed_everything", str(seed), "--model.init_args.seed", str(seed), "--data.init_args.seed", str(seed)]
        fit += ["--ckpt_path", "last"] if any(run.glob("checkpoints/*.ckpt")) else []
        export = ["-m", "pgp_lightning.tools", "export", str(run), str(guide), "--verify"]
        for arguments in (fit, export):
            subprocess.run([sys.executable, *arguments], check=True)


if __name__ == "__main__":
    main()
