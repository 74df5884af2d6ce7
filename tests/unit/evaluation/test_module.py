"""Pruned answers under a trainer, and importance maps in shards."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml

from pgp_lightning.cli import main
from pgp_lightning.data.module import InstructionData
from pgp_lightning.errors import ConfigError
from pgp_lightning.evaluation.benchmark import Benchmark
from pgp_lightning.evaluation.module import ImportanceShards, PrunedAnswers
from pgp_lightning.evaluation.scoring import Answer, load_answers
from pgp_lightning.guides.posterior import PosteriorGuide
from pgp_lightning.prefill import KeepAll, Pruner
from pgp_lightning.pruners.guided import Guided
from pgp_lightning.training.pgp import PGP
from tests.unit.evaluation.scenes_made import Last, write_scenes

ROOT = Path(__file__).parents[3]
N, KEPT, LONGEST = 320, 16, 4


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def guide() -> PosteriorGuide:
    return PosteriorGuide.from_pretrained("embedded:pgp_seed0")


@pytest.fixture(scope="module")
def benchmark(manifest: Path, tmp_path_factory: pytest.TempPathFactory, guide: PosteriorGuide) -> list[Answer]:
    """What the runner of comparisons writes about the same questions."""
    folder = tmp_path_factory.mktemp("results")
    methods: dict[str, Pruner] = {"pgp": Guided(guide)}
    options: dict[str, Any] = {"keep_ratios": (0.05,), "max_new_tokens": LONGEST, "keep_importance": ("pgp",)}
    Benchmark(methods, manifest=str(manifest), **options).run(folder)
    return load_answers(folder / "pgp@5.jsonl")


def trainer(*callbacks: pl.Callback) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )


def data(manifest: Path, base: str = "embedded:answer_model", **options: Any) -> InstructionData:
    return InstructionData(str(manifest), base, **{"val_batch_size": 2, "turns": "all", **options})


def samples(folder: Path) -> dict[str, dict[str, Any]]:
    """Read all shards of a folder with nothing but tarfile and numpy."""
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar.getmembers():
                key, _, suffix = member.name.partition(".")
                content = tar.extractfile(member).read()  # type: ignore[union-attr]
                assert suffix not in found[key], "written twice"
                is_array = suffix.endswith("npy")
                found[key][suffix] = np.load(io.BytesIO(content), allow_pickle=False) if is_array else content.decode()
    return dict(found)


def test_figures_of_a_test_are_the_benchmarks(manifest: Path, guide: PosteriorGuide, benchmark: list[Answer]):
    module = PrunedAnswers(Guided(guide), max_new_tokens=LONGEST)
    (found,) = trainer().test(module, data(manifest), verbose=False)
    by_source = {name: [a for a in benchmark if f"-{name}-" in a.key] for name in ("objects", "reading")}

    def right(answers: list[Answer]) -> float:
        return sum(answer.correct for answer in answers) / len(answers)

    assert len(benchmark) == 20 and 0 < right(benchmark) < 1
    assert found == pytest.approx(
        {
            "test/exact_match": right(benchmark),
            "test/exact_match/objects": right(by_source["objects"]),
            "test/exact_match/reading": right(by_source["reading"]),
            "test/kept": KEPT / N,
            "test/layer_average": KEPT / N,
            "test/kv_entries": sum(answer.kv_entries for answer in benchmark) / len(benchmark),
        }
    )


def test_layers_count(manifest: Path):
    module = PrunedAnswers(Last(0.25), max_new_tokens=1)
    (found,) = trainer().test(module, data(manifest, turns="first"), verbose=False)
    assert found["test/kept"] == 0.25 and found["test/layer_average"] == pytest.approx((1 + 3 * 0.25) / 4)
    (full,) = trainer().test(
        PrunedAnswers(KeepAll(), max_new_tokens=LONGEST), data(manifest, turns="first"), verbose=False
    )
    assert full["test/kept"] == full["test/layer_average"] == 1.0
    assert full["test/kv_entries"] - found["test/kv_entries"] == pytest.approx(3 * 0.75 * N)


def test_nothing_is_trained(guide: PosteriorGuide):
    module = PrunedAnswers(Guided(guide))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert {name.partition(".")[0] for name in before} == {"pruner", "model"}
    with pytest.raises(Exception, match="training_step"):
        trainer().fit(module, torch.utils.data.DataLoader([0]))


def test_predictions_go_to_shards(manifest: Path, tmp_path: Path, guide: PosteriorGuide, benchmark: list[Answer]):
    folder = tmp_path / "new" / "importance"
    module = PrunedAnswers(Guided(guide), max_new_tokens=LONGEST)
    trainer(ImportanceShards(str(folder), samples_per_shard=7)).predict(module, data(manifest))
    assert [path.name for path in sorted(folder.iterdir())] == [f"0-00000{number}.tar" for number in range(3)]
    found = samples(folder)
    assert list(found) == [f"{answer.key}/{answer.turn}" for answer in benchmark]
    for answer in benchmark:
        sample = found[f"{answer.key}/{answer.turn}"]
        assert set(sample) == {"importance.npy", "kept.npy", "answer.txt"}
        assert sample["answer.txt"] == answer.given and answer.keep is not None and answer.importance is not None
        kept, importance = sample["kept.npy"], sample["importance.npy"]
        assert kept.dtype == bool and kept.tolist() == answer.keep.tolist()
        assert importance.dtype == np.float16 and importance.shape == (N,)
        np.testing.assert_allclose(importance, answer.importance, rtol=2e-3)


def test_a_used_folder_is_refused(manifest: Path, tmp_path: Path):
    module = PrunedAnswers(Last(), max_new_tokens=1)
    trainer(ImportanceShards(str(tmp_path))).predict(module, data(manifest, turns="first"))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) == 1 and all(set(s) == {"kept.npy", "answer.txt"} for s in samples(tmp_path).values())
    with pytest.raises(ConfigError, match="holds shards already: give another folder, or remove them"):
        trainer(ImportanceShards(str(tmp_path))).predict(module, data(manifest, turns="first"))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("number", [0, -1])
def test_a_shard_has_to_hold_something(number: int):
    with pytest.raises(ConfigError, match=f"samples_per_shard must be at least 1, got {number}"):
        ImportanceShards("folder", number)


def test_shards_of_a_training_module(manifest: Path, tmp_path: Path, guide: PosteriorGuide, benchmark: list[Answer]):
    trainer(ImportanceShards(str(tmp_path))).predict(PGP(guide), data(manifest, "embedded:guide"))
    found = samples(tmp_path)
    assert list(found) == [f"{answer.key}/{answer.turn}" for answer in benchmark]
    for answer in benchmark:
        sample = found[f"{answer.key}/{answer.turn}"]
        assert set(sample) == {"importance.npy"} and answer.importance is not None
        np.testing.assert_allclose(sample["importance.npy"], answer.importance, rtol=2e-3)


def test_importance_beyond_float16_stays_finite(manifest: Path, tmp_path: Path):
    class Loud(Last):
        def before_layer(self, depth: int, state: Any) -> Any:
            self.importance = torch.full((len(state.hidden), N), 1e6)
            return super().before_layer(depth, state)

    module = PrunedAnswers(Loud(), max_new_tokens=1)
    trainer(ImportanceShards(str(tmp_path))).predict(module, data(manifest, turns="first"))
    assert all((sample["importance.npy"] == 65504).all() for sample in samples(tmp_path).values())


@pytest.mark.parametrize("call", ["test", "predict"])
def test_data_that_was_tiled_for_another_model_is_refused(manifest: Path, tiny_base: str, call: str):
    module = PrunedAnswers(Last(), max_new_tokens=1)
    with pytest.raises(ConfigError, match=r"data\.base and the answer model must tile alike: .*set data\.base to"):
        getattr(trainer(), call)(module, data(manifest, tiny_base))


# On the command line, and in two processes


def test_the_shipped_configuration_runs(
    tmp_path: Path, manifest: Path, benchmark: list[Answer], capsys: pytest.CaptureFixture[str]
):
    config = yaml.safe_load((ROOT / "configs" / "evaluate.yaml").read_text())
    config["trainer"] |= {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    config["trainer"]["callbacks"][0]["init_args"]["folder"] = str(tmp_path / "importance")
    config["model"]["init_args"]["max_new_tokens"] = LONGEST
    config["data"]["init_args"] |= {"manifest": str(manifest), "val_batch_size": 2}
    path = tmp_path / "evaluate.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["test", "--config", str(path)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "test/exact_match " in line]
    right = sum(answer.correct for answer in benchmark) / len(benchmark)
    assert float(line.split()[-2]) == pytest.approx(right)
    assert main(["predict", "--config", str(path)]) == 0
    assert len(samples(tmp_path / "importance")) == len(benchmark)
    capsys.readouterr()
    assert main(["predict", "--config", str(path)]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "holds shards already: give another folder" in error


SCRIPT = """
import json, sys
import lightning.pytorch as pl
from pgp_lightning.data.module import InstructionData
from pgp_lightning.evaluation.module import ImportanceShards, PrunedAnswers
from pgp_lightning.guides.posterior import PosteriorGuide
from pgp_lightning.pruners.guided import Guided

manifest, folder = sys.argv[1:]
options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
trainer = pl.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", callbacks=[ImportanceShards(folder + "/importance")], **options
)
module = PrunedAnswers(Guided(PosteriorGuide.from_pretrained("embedded:pgp_seed0")), max_new_tokens=LONGEST)
data = InstructionData(manifest, "embedded:answer_model", val_batch_size=2, turns="all")
(found,) = trainer.test(module, data, verbose=False)
with open(f"{folder}/{trainer.global_rank}.json", "w") as file:
    json.dump(found, file)
trainer.predict(module, data, return_predictions=False)
"""


@pytest.mark.full
@pytest.mark.distributed
def test_two_processes_share_the_work_of_one(tmp_path: Path, manifest: Path, benchmark: list[Answer]):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("LONGEST", str(LONGEST)))
    words = [sys.executable, str(script), str(manifest), str(tmp_path)]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    right = sum(answer.correct for answer in benchmark) / len(benchmark)
    for rank in (0, 1):
        figures = json.loads((tmp_path / f"{rank}.json").read_text())
        assert figures["test/exact_match"] == pytest.approx(right)
        assert figures["test/kv_entries"] == pytest.approx(sum(a.kv_entries for a in benchmark) / len(benchmark))
        assert {"test/exact_match/objects", "test/exact_match/reading"} < figures.keys()
    folder = tmp_path / "importance"
    assert [path.name for path in sorted(folder.iterdir())] == ["0-000000.tar", "1-000000.tar"]
    found = samples(folder)
    assert found.keys() == {f"{answer.key}/{answer.turn}" for answer in benchmark}
    assert all(found[f"{answer.key}/{answer.turn}"]["answer.txt"] == answer.given for answer in benchmark)
