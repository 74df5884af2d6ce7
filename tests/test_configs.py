"""Every shipped configuration and manifest is read as a user's would be."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI

from pgp_lightning.data.instructions import InstructionRecords
from pgp_lightning.data.manifest import Manifest
from pgp_lightning.data.mixture import check_topology
from pgp_lightning.data.module import InstructionData
from pgp_lightning.data.writing import make_builder
from pgp_lightning.evaluation.benchmark import Benchmark
from pgp_lightning.evaluation.compare import compare
from pgp_lightning.evaluation.module import ImportanceShards, PrunedAnswers
from pgp_lightning.evaluation.sweep import Sweep
from pgp_lightning.training.callbacks import BetaAnnealing
from pgp_lightning.training.command_line import RunCLI, TerseParser
from pgp_lightning.training.options import refusals
from pgp_lightning.training.pgp import PGP
from pgp_lightning.training.run import differences

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
OVERLAYS = [path for path in CONFIGS if path.parent.name == "overlays"]
COMPARE = [path for path in CONFIGS if path.parent.name == "compare"]
EVALUATE = [ROOT / "configs" / "evaluate.yaml"]
SWEEP = ROOT / "configs" / "ablations"
COMPLETE = [path for path in CONFIGS if path not in (*OVERLAYS, *COMPARE, *EVALUATE) and path.parent != SWEEP]
MANIFESTS = sorted((ROOT / "data_manifests").glob("*.yaml"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


class Parsed(LightningCLI):
    """Reads configurations and builds nothing."""

    def instantiate_classes(self) -> None:
        pass


def read(cli: type[LightningCLI], *paths: Path) -> LightningCLI:
    """Read configurations, later ones over earlier ones, without a subcommand."""
    return cli(
        LightningModule,
        LightningDataModule,
        args=[part for path in paths for part in ("--config", str(path))],
        run=False,
        subclass_mode_model=True,
        subclass_mode_data=True,
        parser_class=TerseParser,
        auto_configure_optimizers=False,
        save_config_callback=None,
        trainer_defaults={"logger": False},
    )


def test_there_are_configurations():
    assert ROOT / "configs" / "pgp.yaml" in COMPLETE and COMPARE and EVALUATE[0] in CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_a_configuration_begins_with_a_comment(path: Path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ") and len(lines[0]) > 20


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_what_a_comment_names_is_there(path: Path):
    named = re.findall(
        r"\b(?:tests|docs|configs|slurm|data_manifests)/[\w/.-]*\.(?:py|md|yaml|sbatch)", path.read_text("utf-8")
    )
    assert [one for one in named if not (ROOT / one).is_file()] == []


def test_the_mixtures_lanes_suit_every_number_of_gpus():
    written = yaml.safe_load((ROOT / "configs" / "overlays" / "internvl_mixture.yaml").read_text())["data"]["init_args"]
    for gpus in (n for n in range(1, 177) if 176 % n == 0):
        for workers in (0, 1, 2, written["workers"]):
            check_topology(written["lanes"], gpus, workers)


@pytest.mark.parametrize("path", COMPLETE, ids=name)
def test_a_complete_configuration_builds_its_objects(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)  # a configuration names its manifest from there
    cli = read(LightningCLI, path)
    assert isinstance(cli.model, PGP) and isinstance(cli.datamodule, InstructionData)
    assert cli.trainer.max_steps > 0 and cli.datamodule.base == cli.model.guide.arguments["base"]
    manifest = Manifest.load(cli.datamodule.manifest, cli.datamodule.root)
    assert {"train", "val"} <= manifest.splits.keys()
    records = sum(len(make_builder(source)) for source in manifest.sources("train") if source.build)
    assert records == 0 or records >= cli.datamodule.lanes * cli.datamodule.batch_size
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert written["trainer"]["default_root_dir"] == f"runs/{path.stem}"


@pytest.mark.parametrize("path", EVALUATE, ids=name)
def test_an_evaluation_builds_its_objects(path: Path, monkeypatch: pytest.MonkeyPatch):
    # tests/unit/evaluation/test_module.py runs it.
    monkeypatch.chdir(ROOT)
    cli = read(LightningCLI, path)
    assert isinstance(cli.model, PrunedAnswers) and isinstance(cli.datamodule, InstructionData)
    assert cli.datamodule.base == cli.model.vlm.base
    assert any(isinstance(callback, ImportanceShards) for callback in cli.trainer.callbacks)
    assert "test" in Manifest.load(cli.datamodule.manifest, cli.datamodule.root).splits


@pytest.mark.parametrize("path", COMPARE, ids=name)
def test_a_comparison_builds_every_method(path: Path, monkeypatch: pytest.MonkeyPatch):
    # tests/integration/test_compare.py runs it on a few scenes.
    monkeypatch.chdir(ROOT)
    built: list[tuple[Benchmark, Path, Any]] = []

    class BuiltError(Exception):
        pass

    def stop(benchmark: Benchmark, folder: Path, described: Any, part: None) -> None:
        built.append((benchmark, folder, described))
        raise BuiltError

    monkeypatch.setattr(Benchmark, "run", stop)
    with pytest.raises(BuiltError):
        compare(["--config", str(path)])
    ((benchmark, folder, described),) = built
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert str(folder) == written["output"] and described.keys() == inspect.signature(Benchmark).parameters.keys()
    assert list(benchmark.pruners) == list(written["methods"])
    for label, pruner in benchmark.pruners.items():
        assert f"{type(pruner).__module__}.{type(pruner).__name__}" == written["methods"][label]["class_path"]
    rows = {*benchmark.pruners, "random", "uniform", "oracle"}
    named = [written.get("reference", "pgp"), *(row.partition("@")[0] for row in written.get("explore", []))]
    named += [label for pair in (*written.get("pairs", []), *written.get("split_pairs", [])) for label in pair]
    assert set(named) <= rows
    assert {float(row.partition("@")[2]) / 100 for row in written.get("explore", [])} <= set(benchmark.keep_ratios)
    assert {row.partition("@")[0] for row in written.get("explore", [])} <= benchmark.keep_importance
    assert benchmark.split in Manifest.load(benchmark.manifest, benchmark.root).splits


def test_overlays_are_accepted_over_the_default(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    for path in OVERLAYS:
        read(Parsed, ROOT / "configs" / "pgp.yaml", path)


class Built(RunCLI):
    """Builds what `lightning fit` would run."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def test_every_row_of_the_ablation_differs_from_its_reference_in_what_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # tests/integration/test_sweep.py runs a sweep.
    monkeypatch.chdir(ROOT)
    sweep = Sweep.load(SWEEP, tmp_path)
    used = {overlay for row in sweep.rows.values() for overlay in (*sweep.every_row, *row.overlays)}
    assert used == {path.stem for path in SWEEP.glob("*.yaml")} - {"sweep"}
    plain = {}
    for row in sweep.rows:
        cli = Built.run(sweep.command(sweep.runs([row])[0]))
        assert isinstance(cli.model, PGP) and cli.datamodule.base == cli.model.guide.arguments["base"]
        assert sum(isinstance(callback, BetaAnnealing) for callback in cli.trainer.callbacks) == 1
        assert not list(refusals(cli.trainer, cli.datamodule))
        plain[row] = cli.plain
    changed = {row: differences(plain[sweep.reference_of(row)], plain[row]) for row in plain}
    changed |= {"half_length": differences(plain["default"], plain["half_length"])}
    assert [row for row, found in changed.items() if not found] == ["default"]
    assert changed["half_length"] == ["trainer.max_steps 800 -> 400"]
    assert changed["no_lora"] == ["model.guide.lora_rank 32 -> 0"]
    assert changed["beta_falling"] == [
        "callbacks.BetaAnnealing.end 0.5 -> 0.2",
        "callbacks.BetaAnnealing.start 0.2 -> 0.5",
    ]
    assert len(changed["exp_gate"]) == 2 and len(changed["unaware"]) == 2
    assert changed["beta_1.5"] == [
        "callbacks.BetaAnnealing.end 0.5 -> 1.5",
        "callbacks.BetaAnnealing.start 0.2 -> 1.5",
        "callbacks.BetaAnnealing.warmup_fraction 0.2 -> 0.0",
    ]
    assert changed["unaware_question_blind_half"] == ["model.question_blind 0.0 -> 0.5"]
    assert all(len(found) <= 3 for found in changed.values())


def test_the_mixtures_overlay_goes_over_the_papers_model(monkeypatch: pytest.MonkeyPatch):
    # Reading needs neither shards nor raw files: who fits has them, or is told which are missing.
    monkeypatch.chdir(ROOT)
    overlays = ROOT / "configs" / "overlays"
    cli = read(
        Parsed, ROOT / "configs" / "pgp.yaml", overlays / "internvl2_5_1b.yaml", overlays / "internvl_mixture.yaml"
    )
    data = InstructionData(**cli.config.data.init_args.as_dict())
    assert (data.turns, data.mixing, data.group_batches, data.batch_size) == ("first", "even", 8, 16)
    assert data.lanes % data.workers == 0 and data.base == "OpenGVLab/InternVL2_5-1B"
    manifest = data.read_manifest()
    assert manifest.name == "internvl_1_2_finetune" and len(manifest.sources("train")) == 9
    assert "internvl_mixture.yaml" in (overlays / "internvl2_5_1b.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", MANIFESTS, ids=name)
def test_a_manifest_names_what_exists(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    manifest = Manifest.load(path)
    assert path.read_text(encoding="utf-8").startswith("# ") and manifest.licence and manifest.description
    builds = [source for sources in manifest.splits.values() for source in sources if source.build]
    for source in builds:
        builder = make_builder(source)  # imports the class and gives it its init_args; opens nothing
        if isinstance(builder, InstructionRecords):  # made of files that only users have
            assert source.upstream is not None and {"annotations", "images"} <= vars(builder).keys()
        else:
            assert len(builder) > 0
    assert builds, f"{path} builds nothing: nobody could make its shards"


def test_the_embedded_manifest_needs_no_files():
    splits = Manifest.load(ROOT / "data_manifests" / "embedded.yaml").splits
    records = {split: [len(make_builder(source)) for source in sources] for split, sources in splits.items()}
    assert records == {"train": [1600, 1200, 800], "val": [48, 36, 24], "test": [448, 336, 224]}
