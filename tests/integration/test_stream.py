"""The stream over real shards in real processes: every record once, any topology, and kills at any moment."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pgp_lightning.data.loader import TrainingLoader
from pgp_lightning.data.mixture import Mixture
from tests.integration.mixture_run import Built
from tests.integration.stream_job import READER, line_of, mixture_of, processes, read_log, start, undisturbed

OPTIONS = {"seed": 5, "lanes": 8, "batch_size": 4, "window": 50, "mixing": "even", "group_batches": 1}


def job_of(built: Built, folder: Path, until: int, ranks: int = 1, workers: int = 2, **settings: Any) -> dict[str, Any]:
    """Return a job over the mixture."""
    job = {"manifest": str(built.manifest), "options": OPTIONS, "until": until, "ranks": ranks, "workers": workers}
    job["most"] = until  # batches that a process takes before it waits to be killed
    return {**job, "log": str(folder / "log"), "state": str(folder / "state.json"), "pause": 0.0, **settings}


def finish(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Run all ranks of a job to their end and return the global micro-batches in order."""
    log = Path(job["log"])
    ranks = [start(job, rank) for rank in range(job["ranks"])]
    for rank, process in enumerate(ranks):
        assert process.wait() == 0, (log / f"{rank}.txt").read_text()
    return sorted((line for rank in range(job["ranks"]) for line in read_log(log, rank)), key=lambda x: x["number"])


def check_shares(names: list[str], shares: dict[str, float], stretch: int) -> float:
    """Return by how much a source's share of any so many records in a row is off at most."""
    worst = 0.0
    for name, share in shares.items():
        seen = np.concatenate([[0], np.cumsum([one == name for one in names])])
        worst = max(worst, float(np.abs((seen[stretch:] - seen[:-stretch]) / stretch - share).max()))
    return worst


@pytest.mark.full
@pytest.mark.distributed
def test_two_ranks_of_two_workers_see_every_record_once_per_epoch(mixture: Built, tmp_path: Path) -> None:
    stream, epochs = mixture_of(mixture.manifest, OPTIONS), 2
    per_epoch = stream.batches_per_epoch
    lines = finish(job_of(mixture, tmp_path, epochs * per_epoch, ranks=2))
    assert [line["number"] for line in lines] == list(range(epochs * per_epoch))
    assert [index for line in lines for index in line["indices"]] == list(range(epochs * per_epoch * 4))
    assert not any(line["rejected"] for line in lines)
    everything = {key for source in stream.sources for keys in mixture.keys(source).values() for key in keys}
    assert len(everything) == sum(planted["usable"] for planted in mixture.planted.values())
    counts = Counter(dict.fromkeys(everything, 0))
    for epoch in range(epochs):
        part = lines[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert {line["epoch"] for line in part} == {epoch}
        keys = [key for line in part for key in line["keys"]]
        missing = {key for key, number in counts.items() if number < epoch}  # an epoch's remainder opens the next
        assert missing <= set(keys)
        counts.update(keys)
        assert set(counts) == everything and max(counts.values()) - min(counts.values()) <= 1
        assert counts.total() == (epoch + 1) * sum(stream.takes)
        behind = sum(number <= epoch for number in counts.values())
        if epoch == 0:
            assert max(counts.values()) == 1 and behind < stream.lanes * stream.batch_size
    shares = {name: planted["usable"] / len(everything) for name, planted in mixture.planted.items()}
    worst = check_shares([name for line in lines for name in line["sources"]], shares, 2000)
    print(f"the worst of {epochs * per_epoch * 4 - 1999} stretches of 2,000 records is off by {worst:.2%}")
    assert worst < 0.01


def test_square_roots_of_sizes_are_the_shares_of_an_epoch(mixture: Built) -> None:
    stream = mixture_of(mixture.manifest, {**OPTIONS, "weights": "sqrt"})
    names = [name for line in undisturbed(stream, stream.batches_per_epoch) for name in line["sources"]]
    roots = {name: planted["usable"] ** 0.5 for name, planted in mixture.planted.items()}
    shares = {name: root / sum(roots.values()) for name, root in roots.items()}
    worst = check_shares(names, shares, len(names))
    print(f"shares of an epoch of {len(names)} records are off by {worst:.3%} at most")
    assert worst < 0.01


def leg(
    stream: Mixture, state: dict[str, Any], workers: int, until: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Go on from a state in this process with so many workers, to a global micro-batch."""
    loader = TrainingLoader(stream, READER, until, workers=workers)
    loader.load_state_dict(state)
    return [line_of(batch, n) for n, batch in enumerate(loader, state["global_batches"])], loader.state_dict()


@pytest.mark.distributed
def test_a_run_changes_its_ranks_and_workers_at_every_resume(mixture: Built, tmp_path: Path) -> None:
    options = {**OPTIONS, "group_batches": 4}
    stream = mixture_of(mixture.manifest, options)
    expected = undisturbed(stream, 92)
    found, state = leg(stream, TrainingLoader(stream, READER, 92).state_dict(), 0, 22)  # each ends inside a block
    for number, (ranks, workers, until) in enumerate([(2, 2, 46), (1, 4, 70), (1, 0, 92)]):
        if ranks == 1:
            lines, state = leg(stream, state, workers, until)
        else:
            job = job_of(mixture, tmp_path / str(number), until, ranks, workers, options=options)
            Path(job["log"]).mkdir(parents=True)
            Path(job["state"]).write_text(json.dumps(state))
            lines = finish(job)
            state = json.loads(Path(job["state"]).read_text())
        assert state["global_batches"] == until
        found += lines
    assert found == expected


@pytest.mark.full
@pytest.mark.parametrize(
    ("kills", "until"), [(3, 50), pytest.param(30, 320, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_a_stream_killed_at_random_moments(mixture: Built, tmp_path: Path, kills: int, until: int) -> None:
    options = {**OPTIONS, "group_batches": 4}
    job = job_of(mixture, tmp_path, until, options=options, pause=0.04)
    log = Path(job["log"])
    rng = random.Random(kills)
    begins = []
    for _ in range(kills):
        begins.append(len(read_log(log)))
        more = rng.randrange(1, 8)
        process, goal = start({**job, "most": more + 3}), begins[-1] + more
        while len(read_log(log)) < goal and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        process.kill()  # SIGKILL: nothing can be tidied up
        assert process.wait() == -9, (log / "0.txt").read_text()
        cut_short(log)
    begins.append(len(read_log(log)))
    finish(job)
    found, expected = read_log(log), undisturbed(mixture_of(mixture.manifest, options), until)
    order = [line["number"] for line in found]
    assert found == [expected[number] for number in order]
    for first, stop in zip(begins, [*begins[1:], len(found)], strict=True):
        run = order[first:stop]
        assert run == list(range(run[0], run[0] + len(run)))
        # It goes on behind the last batch, or at it, if the process was killed before its state was saved.
        assert run[0] in ((0,) if first == 0 else (order[first - 1], order[first - 1] + 1))
    assert order[-1] == until - 1
    assert json.loads(Path(job["state"]).read_text())["global_batches"] == until
    print(f"{kills} kills; {len(found) - until} of {until} micro-batches were delivered again")
    deadline = time.monotonic() + 300
    while left := processes(log):  # of any of the killed
        assert time.monotonic() < deadline, f"these live on: {left}"
        time.sleep(0.1)


def cut_short(log: Path) -> None:
    """Remove a line that was being written when its process was killed, which the next would continue."""
    path = log / "0.jsonl"
    data = path.read_bytes() if path.exists() else b""
    path.write_bytes(data[: data.rfind(b"\n") + 1])
