"""The data module under Lightning's own Trainer."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from data_world import WordProcessor
from lightning.pytorch.callbacks import ModelCheckpoint

from pgp_lightning.data.collate import Batch
from pgp_lightning.data.module import InstructionData
from pgp_lightning.errors import ConfigError, DataError
from pgp_lightning.vlm import loading

MANIFEST = """
name: tiny
licence: Apache-2.0
description: pictures of one colour
root: {root}
splits:
  train:
    - {{name: a, build: {{class_path: data_world.PictureBuilder, init_args: {{name: a, size: 50}}}}}}
    - {{name: b, build: {{class_path: data_world.PictureBuilder, init_args: {{name: b, size: 11}}}}}}
  val:
    - {{name: a, build: {{class_path: data_world.PictureBuilder, init_args: {{name: v, size: 9}}}}}}
"""


class Recorder(pl.LightningModule):
    """A model that learns nothing and remembers what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained: list[tuple[list[str], list[int], int]] = []
        self.validated: list[str] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        assert batch.request.tiles.dtype == torch.uint8
        self.trained.append((batch.keys, batch.indices, batch.epoch))
        return self.weight * len(batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated += batch.keys

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A manifest whose shards are built on first use, and a processor without a model."""
    monkeypatch.setattr(loading, "load_processor", lambda base: WordProcessor())
    file = tmp_path / "tiny.yaml"
    file.write_text(MANIFEST.format(root=tmp_path / "data"))
    return str(file)


def data(manifest: str, **changes: Any) -> InstructionData:
    """Return a data module of 4 lanes."""
    return InstructionData(manifest, "tiny", **{"batch_size": 2, "lanes": 4, "seed": 3, **changes})


def trainer(folder: Path, max_steps: int, **changes: Any) -> pl.Trainer:
    """Return a Trainer that is quiet and saves every two optimizer steps."""
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "default_root_dir": folder,
        "max_steps": max_steps,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "check_val_every_n_epoch": None,
        "val_check_interval": 10,
        "num_sanity_val_steps": 0,
        "accumulate_grad_batches": 2,
        "callbacks": [ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)],
    }
    return pl.Trainer(**{**options, **changes})


def test_builds_trains_validates_and_resumes_at_the_exact_record(manifest: str, tmp_path: Path) -> None:
    whole = Recorder()
    trainer(tmp_path / "whole", 12).fit(whole, data(manifest))
    assert [indices for _, indices, _ in whole.trained] == [[2 * i, 2 * i + 1] for i in range(24)]
    per_epoch = 61 // 8 * 4  # batches
    assert [epoch for _, _, epoch in whole.trained] == [i // per_epoch for i in range(24)]
    assert whole.validated == [f"v-{i:04d}" for i in range(9)] * 2
    assert (tmp_path / "data" / "train" / "b" / "index.json").is_file()

    trainer(tmp_path / "parts", 6).fit(Recorder(), data(manifest))
    for step in (2, 4, 6):
        rest = Recorder()
        checkpoint = tmp_path / "parts" / f"step={step}.ckpt"
        trainer(tmp_path / f"rest{step}", 12).fit(rest, data(manifest), ckpt_path=checkpoint)
        assert rest.trained == whole.trained[2 * step :]
    with pytest.raises(ConfigError, match="seed was 3 and is 4"):
        trainer(tmp_path / "other", 12).fit(Recorder(), data(manifest, seed=4), ckpt_path=checkpoint)


def test_overfits_the_same_batches_and_resumes(manifest: str, tmp_path: Path) -> None:
    whole, given = Recorder(), trainer(tmp_path / "whole", 8, overfit_batches=3)
    given.fit(whole, data(manifest))
    plain = Recorder()
    trainer(tmp_path / "plain", 2).fit(plain, data(manifest))
    keys = [keys for keys, _, _ in plain.trained[:3]]
    # Three do not divide by two micro-batches a step, and yet every step has two.
    assert [keys for keys, _, _ in whole.trained] == (6 * keys)[:16] and given.global_step == 8
    assert whole.weight.item() == pytest.approx(-0.1 * 8 * 2)
    assert given.current_epoch == 1 and len(whole.validated) == 5  # three batches of the five that nine records make
    rest = Recorder()
    checkpoint = tmp_path / "whole" / "step=4.ckpt"
    trainer(tmp_path / "rest", 8, overfit_batches=3).fit(rest, data(manifest), ckpt_path=checkpoint)
    assert rest.trained == whole.trained[8:]


def test_needs_a_number_of_steps_and_lanes_that_fit(manifest: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer.max_steps must say how long training is, got -1"):
        trainer(tmp_path, -1, max_epochs=1).fit(Recorder(), data(manifest))
    with pytest.raises(ConfigError, match="4 lanes cannot be dealt to 1 ranks x 3 workers"):
        trainer(tmp_path, 2).fit(Recorder(), data(manifest, workers=3))
    with pytest.raises(
        ConfigError, match="less than one round of lanes x batch_size = 64 x 2: set lanes to 16 or less"
    ):
        trainer(tmp_path, 2).fit(Recorder(), data(manifest, lanes=64))
    for name in ("batch_size", "val_batch_size", "limit_val_records", "max_length", "group_batches"):
        with pytest.raises(ConfigError, match=f"data.{name} must be at least 1, got 0"):
            data(manifest, **{name: 0})
    with pytest.raises(ConfigError, match=r"data\.workers must be at least 0, got -1"):
        data(manifest, workers=-1)
    with pytest.raises(ConfigError, match=r"data\.cache_gib must be above 0, got 0"):
        data(manifest, cache_gib=0)


def test_validation_alone_and_its_limit(manifest: str, tmp_path: Path) -> None:
    model = Recorder()
    trainer(tmp_path, 2).validate(model, data(manifest, lanes=64, limit_val_records=4, val_batch_size=3), verbose=False)
    assert model.validated == [f"v-{i:04d}" for i in range(4)]
    with pytest.raises(ConfigError, match=r"splits\.test is missing"):
        data(manifest).setup("test")


def test_all_turns_and_another_root(manifest: str, tmp_path: Path) -> None:
    model = Recorder()
    trainer(tmp_path, 2).fit(model, data(manifest, turns="all", root=str(tmp_path / "elsewhere")))
    assert all(max(Counter(keys).values()) == 2 and len(keys) == 4 for keys, _, _ in model.trained)
    assert (tmp_path / "elsewhere" / "val" / "a" / "index.json").is_file() and not (tmp_path / "data").exists()


def test_a_missing_shard_stops_a_run_before_it_starts(manifest: str, tmp_path: Path) -> None:
    data(manifest).prepare_data()
    (tmp_path / "data" / "train" / "a" / "a-00000.tar").unlink()
    with pytest.raises(DataError, match=r"a-00000.tar is missing, though index.json lists it: delete .*train/a"):
        trainer(tmp_path, 2).fit(Recorder(), data(manifest))


def test_the_manifest_says_how_sources_are_weighed_tiled_and_repaired(manifest: str, tmp_path: Path) -> None:
    data(manifest).prepare_data()
    file = Path(manifest)
    changed = file.read_text().replace("name: tiny", "name: tiny\nweights: explicit")
    changed = changed.replace("- {name: a, build", "- {name: a, weight: 1, max_tiles: 2, build", 1)
    changed = changed.replace("- {name: b, build", "- {name: b, weight: 3, on_damage: substitute, build", 1)
    file.write_text(changed)
    (tmp_path / "data" / "train" / "b" / "b-00000.tar").unlink()
    module = data(manifest, mixing="even", group_batches=3)
    module.prepare_data()
    module.setup("fit")
    mixture = module.mixture
    assert mixture is not None and mixture.takes == (14, 42)  # of 61, in rounds of 4 lanes x 2
    assert (mixture.mixing, mixture.group_batches, mixture.weights) == ("even", 3, "explicit")
    assert [(one.max_tiles, one.on_damage) for one in mixture.sources] == [(2, "fail"), (None, "substitute")]
    with pytest.raises(DataError, match=r"none of 11 records in a row can be used: damaged-shard 11"):
        trainer(tmp_path, 8).fit(Recorder(), module)
