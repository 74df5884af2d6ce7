"""A mixture in upstream's formats, from its annotations to a fit over it: every record is accounted for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pgp_lightning.cli import main
from pgp_lightning.data import shards
from pgp_lightning.data.loader import TrainingLoader
from pgp_lightning.data.mixture import EpochPlan, Lane, Mixture, SourceOrder
from pgp_lightning.data.module import InstructionData
from tests.faulty_server import FAULTS, FaultyServer, Plan
from tests.integration.mixture_run import BATCH, LANES, Built, fit_config, make_mixture, planned_keys, run
from tests.integration.small_run import write_config
from tests.integration.stream_job import READER, mixture_of
from tests.trace import read_trace


class ImpatientData(InstructionData):
    """The data module with a cache that is quick to try again and to give up."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        # Three faults in a row, and on a loaded machine as many answers that are late.
        self.cache = replace(self.cache, timeout=1.0, backoff=0.02, retries=7)


def mixture_of_fit(built: Built) -> Mixture:
    return Mixture(built.sources(), lanes=LANES, batch_size=BATCH, mixing="even")


def check_shards(built: Built) -> None:
    """What the indices say is what was planted, and the commands print it."""
    for name, planted in built.planted.items():
        index, out = built.index(name), sum(planted["rejected"].values())
        assert (index.samples, dict(index.rejected)) == (planted["usable"], planted["rejected"]), name
        assert index.samples + out == planted["in"]
        counts = rf"{planted['in']:,} records in, {planted['usable']:,} used, {out:,} rejected"
        assert f"train/{name}: there: {counts}" in built.said["build"]
        assert f"train/{name}: intact: {counts}" in built.said["verify"]


def check_fit(built: Built, root: Path, out: str, steps: int) -> None:
    """Every record that was due was seen in its place, or is counted under the reason for which it was not."""
    long = built.long()
    planned = planned_keys(built, mixture_of_fit(built), steps)
    lines = read_trace(root)
    samples = [sample for line in lines for sample in line["samples"]]
    assert [index for _, _, index in samples] == list(range(steps * BATCH)) == list(range(len(planned)))
    replaced = Counter[str]()
    for due, (key, turn, _) in zip(planned, samples, strict=True):
        assert key not in long and turn == 0
        if due in long:
            assert key.rpartition("-")[0] == due.rpartition("-")[0]  # a record of the same source
            replaced[due.rpartition("-")[0]] += 1
        else:
            assert key == due
    counted = {name: int(n) for name, n in re.findall(r"(\w+)/too-long (\d+)", out)}
    assert counted == replaced
    assert (f"{replaced.total()} records could not be used" in out) == bool(replaced)


@pytest.fixture(scope="module")
def epoch(mixture: Built, tiny_base: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, int]:
    """A fit over an epoch of the mixture with a tiny model: its folder, what it printed, its steps."""
    folder = tmp_path_factory.mktemp("epoch")
    steps = mixture_of_fit(mixture).batches_per_epoch
    config = write_config(folder, fit_config(mixture.manifest, steps, tiny_base))
    command = ["-m", "pgp_lightning", "fit", "--config", str(config), f"--trainer.default_root_dir={folder / 'run'}"]
    return folder / "run", run(*command), steps


def test_the_shards_hold_what_was_planted(mixture: Built) -> None:
    check_shards(mixture)
    reasons = Counter(reason for planted in mixture.planted.values() for reason in planted["rejected"])
    assert len(reasons) == 16, reasons  # all that data_manifests/README.md lists
    sizes = [planted["in"] for planted in mixture.planted.values()]
    assert sum(sizes) == 1500 and 35 <= max(sizes) / min(sizes) <= 45


def test_a_fit_accounts_for_every_record_of_an_epoch(mixture: Built, epoch: tuple[Path, str, int]) -> None:
    root, out, steps = epoch
    check_fit(mixture, root, out, steps)
    planned = planned_keys(mixture, mixture_of_fit(mixture), steps)
    usable = sum(planted["usable"] for planted in mixture.planted.values())
    # Once each, and all but a remainder that does not fill a round.
    assert len(set(planned)) == len(planned) > usable - LANES * BATCH
    assert mixture.long() & set(planned)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_thousand_records(tmp_path: Path) -> None:
    built = make_mixture(tmp_path / "data", 50_000)
    print({name: round(seconds, 1) for name, seconds in built.seconds.items()})
    print(built.said["build"])
    check_shards(built)
    steps = 20
    config = write_config(tmp_path, fit_config(built.manifest, steps, "embedded:guide"))
    command = ["-m", "pgp_lightning", "fit", "--config", str(config), f"--trainer.default_root_dir={tmp_path / 'run'}"]
    check_fit(built, tmp_path / "run", run(*command), steps)
    for at in ("0", "0.95"):
        print(run("benchmarks/stream_restart.py", str(built.manifest), f"--at={at}"))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The shards whose tables this process reads, in order."""
    found: list[Path] = []
    table = shards._Table
    monkeypatch.setattr(shards, "_Table", lambda shard: found.append(shard.path) or table(shard))
    return found


def block_shards(mixture: Mixture, batch: int) -> tuple[set[Path], int]:
    """Return the shards of a global micro-batch's block, and how many its windows of all sources reach into."""
    epoch, within = divmod(batch, mixture.batches_per_epoch)
    place, number = divmod(within, mixture.lanes)
    group, size = mixture.group_batches, mixture.batch_size
    begin = place // group * group
    count = min(group, mixture.batches_per_epoch // mixture.lanes - begin) * size
    plan = EpochPlan(mixture, epoch)
    lane = Lane(plan, number, begin * size)
    orders = [SourceOrder(source, mixture.seed, n) for n, source in enumerate(mixture.sources)]
    found, reached = set(), set()
    for _ in range(count):
        source, candidates = lane.take()
        due = next(candidates)
        found.add(orders[source].locate(due)[0].path)
        first = epoch * mixture.takes[source] + int(plan.offsets[number, source])  # of the lane's stretch
        window = first + (due - first) // mixture.window * mixture.window
        stop = min(window + mixture.window, first + int(plan.counts[number, source]))
        reached |= {orders[source].locate(position)[0].path for position in range(window, stop)}
    return found, len(reached)


@pytest.mark.parametrize("group", [1, 8])
def test_a_restart_opens_the_shards_of_its_first_block_alone(mixture: Built, opened: list[Path], group: int) -> None:
    options = {"lanes": 8, "batch_size": 4, "window": 20, "mixing": "even", "group_batches": group}
    stream = mixture_of(mixture.manifest, options)
    for share in (0.0, 0.5, 0.95):
        batch = int(share * stream.batches_per_epoch)
        loader = TrainingLoader(stream, READER, 2 * stream.batches_per_epoch)
        loader.load_state_dict({**loader.state_dict(), "global_batches": batch})
        opened.clear()
        next(iter(loader))
        expected, reached = block_shards(stream, batch)
        assert sorted(opened) == sorted(expected), share  # none twice
        assert len(opened) <= min(reached, group * stream.batch_size)
        print(f"{share:.0%}, group_batches {group}: {len(opened)} of {sum(len(s.shards) for s in stream.sources)}")


@pytest.fixture
def served(mixture: Built) -> Iterator[FaultyServer]:
    """The shards behind a server that fails four requests of ten; the indices come whole."""
    whole = {f"/train/{name}/index.json": "" for name in mixture.planted}
    with FaultyServer(mixture.shards, Plan(seed=3, rate=0.4, always=whole)) as server:
        yield server


def fit_from(server: FaultyServer, folder: Path, mixture: Built, steps: int, base: str) -> int:
    """Fit over the served shards with two workers and return the exit code."""
    config = fit_config(mixture.manifest, steps, base)
    config["data"]["class_path"] = f"{__name__}.ImpatientData"
    config["data"]["init_args"] |= {"root": server.url, "cache": str(folder / "cache")}
    path = write_config(folder, config)
    return main(["fit", "--config", str(path), f"--trainer.default_root_dir={folder / 'run'}"])


@pytest.mark.filterwarnings("ignore:a record of .* cannot be used")
def test_a_fit_from_a_faulty_server_is_the_fit_from_the_disk(
    mixture: Built, epoch: tuple[Path, str, int], served: FaultyServer, tiny_base: str, tmp_path: Path
) -> None:
    root, _, steps = epoch
    assert fit_from(served, tmp_path, mixture, steps, tiny_base) == 0
    assert read_trace(tmp_path / "run") == read_trace(root)  # same records in the same places, same losses
    assert {fault for _, fault in served.log} == {*FAULTS, ""}
    shard_files = {f"/train/{s.name}/{x.path.name}" for s in mixture.sources() for x in s.shards}
    assert shard_files <= {path for path, fault in served.log if not fault}
    assert len(list((tmp_path / "cache" / "shards").glob("*.tar"))) == len(shard_files)


def test_a_fit_whose_shard_never_comes_names_it_and_fails(
    mixture: Built, tiny_base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = mixture_of_fit(mixture)
    due = planned_keys(mixture, stream, 1)[0]
    source = next(s for s in stream.sources if s.name == due.rpartition("-")[0])
    shard = next(path.name for path, keys in mixture.keys(source).items() if due in keys)
    path = f"/train/{source.name}/{shard}"
    with FaultyServer(mixture.shards, Plan(always={path: "drop"})) as server:
        assert fit_from(server, tmp_path, mixture, 4, tiny_base) == 2  # a network's fault, not the data's
        lines = capsys.readouterr().err.splitlines()
        (error,) = (line for line in lines if line.startswith("error: "))
        assert f"{server.url}{path} could not be fetched in 8 tries" in error
    assert read_trace(tmp_path / "run") == [] and not list(tmp_path.rglob("*.ckpt"))
