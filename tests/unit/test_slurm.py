"""The batch scripts, run with stand-ins for the commands they call that record how they were called."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "slurm"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A folder to submit from, with stand-ins of srun, scontrol and pgp on its path."""
    commands = {
        "srun": 'printf "%s\\n" "$@" > arguments; echo "$MASTER_ADDR $SRUN_CPUS_PER_TASK" > environment',
        "scontrol": '[ "$*" = "show hostnames node[3-4]" ] && printf "node3\\nnode4\\n"',
        "pgp": 'printf "%s\\n" "$@" > arguments',
    }
    (tmp_path / "bin").mkdir()
    for name, body in commands.items():
        command = tmp_path / "bin" / name
        command.write_text(f"#!/usr/bin/env bash\n{body}\n")
        command.chmod(0o755)
    return tmp_path


def submit(folder: Path, *arguments: str, script: str = "fit", **variables: str) -> subprocess.CompletedProcess[str]:
    job = {
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_NAME": "first",
        "SLURM_JOB_NODELIST": "node[3-4]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NTASKS_PER_NODE": "4",
        "SLURM_CPUS_PER_TASK": "8",
        **variables,
    }
    return subprocess.run(
        ["bash", str(SCRIPTS / f"{script}.sbatch"), *arguments],
        cwd=folder,
        env=job,
        capture_output=True,
        text=True,
    )


def test_a_first_start_begins_the_run(cluster: Path):
    result = submit(cluster, "--config", "my overlay.yaml")
    assert result.returncode == 0, result.stderr
    assert (cluster / "arguments").read_text().splitlines() == [
        "--kill-on-bad-exit=1", "lightning", "fit", "--config", "configs/pgp.yaml", "--config", "my overlay.yaml",
        "--trainer.devices", "4", "--trainer.num_nodes", "2", "--trainer.default_root_dir", "runs/first",
    ]  # fmt: skip
    assert (cluster / "environment").read_text().split() == ["node3", "8"]


def test_a_start_after_a_checkpoint_continues_the_run(cluster: Path):
    (cluster / "runs" / "first" / "checkpoints").mkdir(parents=True)
    assert submit(cluster).returncode == 0
    assert "--ckpt_path" not in (cluster / "arguments").read_text()
    (cluster / "runs" / "first" / "checkpoints" / "last.ckpt").touch()
    assert submit(cluster).returncode == 0
    assert (cluster / "arguments").read_text().splitlines()[-2:] == ["--ckpt_path", "last"]


@pytest.mark.parametrize("arguments", [("--trainer.default_root_dir", "x"), ("--trainer.default_root_dir=x",)])
def test_another_folder_is_refused(cluster: Path, arguments: tuple[str, ...]):
    result = submit(cluster, *arguments)
    assert result.returncode == 2
    assert "--job-name" in result.stderr
    assert not (cluster / "arguments").exists()


def test_a_failing_command_fails_the_job(cluster: Path):
    (cluster / "bin" / "srun").write_text("#!/usr/bin/env bash\nexit 7\n")
    assert submit(cluster).returncode == 7


def test_a_job_of_an_array_takes_its_part(cluster: Path):
    words = ("--config", "my compare.yaml")
    array = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4"}
    assert submit(cluster, *words, script="evaluate", **array).returncode == 0
    assert (cluster / "arguments").read_text().splitlines() == ["compare", *words, "--part", "2/4"]
    assert submit(cluster, *words, script="evaluate").returncode == 0
    assert (cluster / "arguments").read_text().splitlines() == ["compare", *words]


def test_shards_are_built_with_every_core(cluster: Path):
    assert submit(cluster, "m.yaml", "--root", "my shards", script="build_shards").returncode == 0
    told = ["shards", "build", "m.yaml", "--root", "my shards", "--workers", "8"]
    assert (cluster / "arguments").read_text().splitlines() == told


def test_a_fit_is_warned_and_requeued():
    lines = (SCRIPTS / "fit.sbatch").read_text().splitlines()
    # B: would warn the script, which dies of it, and not the processes that train.
    assert "#SBATCH --signal=SIGUSR1@300" in lines
    for name in ("fit", "evaluate", "build_shards"):
        lines = (SCRIPTS / f"{name}.sbatch").read_text().splitlines()
        begun = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
        assert {"#SBATCH --requeue", "#SBATCH --open-mode=append"} <= set(lines[:begun])  # sbatch reads no further
