"""The batch scripts on a real SLURM of two nodes: trained, warned, requeued, evaluated, and shards built."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.integration.small_run import small_config, write_config, write_manifest
from tests.slurm.cluster import NODES, ROOT, Cluster, missing, processes, running_cluster, wait
from tests.trace import read_trace

pytestmark = [
    pytest.mark.full,
    pytest.mark.slurm,
    pytest.mark.skipif(missing() is not None, reason=f"no SLURM here: {missing()}"),
    pytest.mark.timeout(1800),  # a test waits for several jobs
]

STEPS, SAVE_EVERY = 30, 4  # two micro-batches a step
TWO_TASKS = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0")
CURVES = ("train/", "val/", "health/", "lr-")  # all but times
METHODS = ("pgp", "divprune")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as found:
        yield found
    assert not processes(found.folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to submit from, as the repository's is to users."""
    found = tmp_path_factory.mktemp("submitted")
    for name in ("configs", "data_manifests"):
        (found / name).symlink_to(ROOT / name)
    return found


@pytest.fixture(scope="module")
def manifest(cluster: Cluster, folder: Path) -> Path:
    """A manifest whose shards a job has built."""
    found = write_manifest(folder, folder / "data")
    job = cluster.submit(folder, str(ROOT / "slurm" / "build_shards.sbatch"), str(found))
    log = folder / f"slurm-build-shards-{job}.out"
    assert cluster.finish(job) == {"COMPLETED"}, log.read_text()
    assert log.read_text().count(": there: ") == 5
    return found


@pytest.fixture(scope="module")
def fits(cluster: Cluster, folder: Path, manifest: Path) -> dict[str, str]:
    """Two jobs that train the same, side by side, by name."""
    config = write_config(folder, small_config(manifest, STEPS, SAVE_EVERY))
    words = (str(ROOT / "slurm" / "fit.sbatch"), "--config", str(config))
    # SLURM signals every process of a task, those that read data too.
    extra = {"disturbed": ["--data.init_args.workers=1"], "whole": []}
    return {name: cluster.submit(folder, f"--job-name={name}", *TWO_TASKS, *words, *extra[name]) for name in extra}


@pytest.fixture(scope="module")
def lines_before(cluster: Cluster, folder: Path, fits: dict[str, str]) -> list[list[int]]:
    """Disturb one of the jobs twice, wait for both, and return how many lines its traces had when it started again.

    By rank: within an optimiser step nothing keeps the ranks together, and one may be killed a micro-batch behind.
    """
    job, root = fits["disturbed"], folder / "runs" / "disturbed"
    seen: list[list[int]] = []

    def traced(lines: int) -> None:
        wait(lambda: len(read_trace(root)) >= lines or cluster.states(job) & {"FAILED", "COMPLETED"}, "steps")

    def restarted(times: int) -> None:
        wait(lambda: cluster.job(job)["Restarts"] == str(times), f"restart {times}")
        wait(lambda: not cluster.call("squeue", "--noheader", "--jobs", job, "--states=RUNNING"), "the end")
        seen.append([len(read_trace(root, rank)) for rank in range(len(NODES))])

    traced(9)
    cluster.call("scancel", "--signal=USR1", job)
    restarted(1)
    traced(seen[0][0] + 2 * SAVE_EVERY + 3)
    cluster.call("scontrol", "requeue", job)
    restarted(2)
    assert [cluster.finish(one) for one in fits.values()] == [{"COMPLETED"}] * 2, logs(folder)
    assert [cluster.job(fits[name])["Restarts"] for name in ("disturbed", "whole")] == ["2", "0"], logs(folder)
    return seen


def logs(folder: Path) -> str:
    return "\n".join(f"== {path.name}\n{path.read_text()}" for path in sorted(folder.glob("slurm-*.out")))


def scalars(root: Path) -> dict[str, list[tuple[int, float]]]:
    found = EventAccumulator(str(root), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in found.Tags()["scalars"] if tag.startswith(CURVES)]
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in tags}


def test_the_daemons_listen_on_loopback_only(cluster: Cluster):
    sockets = {
        link.readlink().name
        for process in processes(cluster.folder)
        for link in Path(f"/proc/{process}/fd").iterdir()
        if str(link.readlink()).startswith("socket:")
    }
    listening = [
        words[1].split(":")[0]
        for table in ("tcp", "tcp6")
        for words in map(str.split, Path(f"/proc/net/{table}").read_text().splitlines()[1:])
        if words[3] == "0A" and f"socket:[{words[9]}]" in sockets
    ]
    assert listening == ["0100007F"] * 3  # 127.0.0.1, in the machine's order


def test_a_warned_and_a_killed_job_go_on_at_the_exact_sample(folder: Path, lines_before: list[list[int]]):
    whole, root = folder / "runs" / "whole", folder / "runs" / "disturbed"
    for rank in range(len(NODES)):
        expected, found = read_trace(whole, rank), read_trace(root, rank)
        warned, killed = (lines[rank] for lines in lines_before)
        assert [line["batch"] for line in expected] == list(range(2 * STEPS))
        assert all(line == expected[line["batch"]] for line in found)
        numbers = [line["batch"] for line in found]
        jumps = [place for place in range(1, len(numbers)) if numbers[place] != numbers[place - 1] + 1]
        # The warned job saved, so nothing is repeated; the killed one went on from its last regular checkpoint.
        assert numbers[-1] == 2 * STEPS - 1 and len(jumps) <= 1, numbers
        for place in jumps:
            assert place >= killed and numbers[place] % (2 * SAVE_EVERY) == 0, (lines_before, numbers)
            assert 0 < place - numbers[place] <= 2 * SAVE_EVERY, (lines_before, numbers)
        assert warned % 2 == 0 and warned < killed
    mine, theirs = (torch.load(r / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for r in (root, whole))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_three_starts_leave_one_curve_and_one_log(folder: Path, fits: dict[str, str], lines_before: list[list[int]]):
    whole, root = folder / "runs" / "whole", folder / "runs" / "disturbed"
    assert len(list(root.glob("events.*"))) == 3 and len(list(root.rglob("events.*"))) == 3
    found, expected = scalars(root), scalars(whole)
    assert [step for step, _ in expected["train/loss"]] == list(range(STEPS))
    assert found == expected
    log = (folder / f"slurm-disturbed-{fits['disturbed']}.out").read_text()
    step = lines_before[0][0] // 2
    warned = log.split("distributed_backend=gloo")[1]  # until the second start; a killed process is another's lost peer
    assert "error: another process" not in warned and "Aborted" not in log and "Received SIGTERM" not in log
    assert f"warned by SIGUSR1: saved {Path('runs/disturbed/checkpoints/last.ckpt')} at optimiser step {step}" in log
    assert f"run runs/disturbed stopped after {STEPS} optimiser steps" in log


def test_an_array_shares_a_comparison(cluster: Cluster, folder: Path, manifest: Path):
    config: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "compare" / "embedded.yaml").read_text())
    config["methods"] = {name: config["methods"][name] for name in METHODS}
    config |= {"manifest": str(manifest), "keep_ratios": [0.2], "batch_size": 2, "max_new_tokens": 2, "images": 4}
    config |= {"guide_alone": None, "split_pairs": [], "pairs": [], "keep_importance": [], "explore": []}
    config |= {"timed_images": 0, "output": str(folder / "compared")}
    (folder / "compare.yaml").write_text(yaml.safe_dump(config))
    words = ["--gpus-per-node=0", str(ROOT / "slurm" / "evaluate.sbatch"), "--config", str(folder / "compare.yaml")]
    array = cluster.submit(folder, "--array=1-2", *words)
    report = cluster.submit(folder, f"--dependency=afterok:{array}", *words)
    wait(lambda: cluster.job(f"{array}_2")["JobState"] == "RUNNING", "a task to run")
    cluster.call("scontrol", "requeue", f"{array}_2")
    assert cluster.finish(array) == {"COMPLETED"}, logs(folder)
    assert cluster.job(f"{array}_2")["Restarts"] == "1"
    assert cluster.finish(report) == {"COMPLETED"}, logs(folder)

    rows = {"full", *(f"{name}@20" for name in (*METHODS, "oracle", "uniform", "random"))}
    parts = {file.name: file.read_bytes() for file in (folder / "compared" / "parts").glob("*_of_2/*.jsonl")}
    assert len(list((folder / "compared" / "parts").glob("*_of_2/*.jsonl"))) == len(rows)
    assert {file.name: file.read_bytes() for file in (folder / "compared").glob("*.jsonl")} == parts
    told = json.loads((folder / "compared" / "report.json").read_text())
    assert {row["method"] for row in told["rows"]} == rows and (folder / "compared" / "report.md").is_file()
