"""The guides that come with the package: they load, they know what matters, and damage is said clearly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import pgp_lightning
from pgp_lightning.data.collate import Batch, Item, collate
from pgp_lightning.data.conversation import ConversationReader
from pgp_lightning.data.records import RawRecord
from pgp_lightning.embedded.records import EmbeddedRecords
from pgp_lightning.errors import ConfigError
from pgp_lightning.guides.posterior import PosteriorGuide
from pgp_lightning.selection import recall
from pgp_lightning.vlm.loading import load_processor, packaged

SEEDS = (0, 1, 2)
FOLDER = Path(pgp_lightning.__file__).parent / "embedded" / "guides"


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    """The first question of 32 validation scenes, of every family."""
    processor = load_processor("embedded:guide")
    reader = ConversationReader(processor, "first", None, None)
    found = []
    for family, size in {"objects": 14, "counting": 10, "reading": 8}.items():
        scenes = EmbeddedRecords("val", family, size)  # type: ignore[arg-type]
        items = []
        for index in range(size):
            key, image, _, record = scenes[index]
            items.append(Item(reader(RawRecord(key, image, json.dumps(record).encode())), family, index))
        found.append(collate(items))
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_its_top_five_per_cent_are_what_matters(batches: list[Batch], seed: int):
    guide = PosteriorGuide.from_pretrained(f"embedded:pgp_seed{seed}")
    assert not any(module.training for module in guide.modules())
    found = []
    for batch in batches:
        assert batch.request.relevant is not None
        found.append(recall(guide(batch.request), batch.request.relevant, 0.05))
    values = torch.cat(found)
    # Some questions, "is there a ...", have no token that matters.
    assert len(values) == 32 and int(values.isnan().sum()) <= 4
    assert values.nanmean() >= 0.8, values.nanmean()


def test_seeds_are_guides_of_their_own(batches: list[Batch]):
    request = batches[2].select([0, 1]).request
    scores = [PosteriorGuide.from_pretrained(f"embedded:pgp_seed{seed}")(request) for seed in SEEDS]
    assert all(one.shape == (2, 320) and one.isfinite().all() for one in scores)
    assert not torch.equal(scores[0], scores[1]) and not torch.equal(scores[1], scores[2])


@pytest.mark.parametrize("seed", SEEDS)
def test_files_hold_nothing_of_the_machine_they_were_made_on(seed: int):
    folder = FOLDER / f"pgp_seed{seed}"
    assert packaged(f"embedded:pgp_seed{seed}", "guides") == folder
    files = sorted(folder.iterdir())
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    for path in files:
        content = path.read_bytes()
        for trace in (b"/root", b"/home", b"/work", b"/tmp", b"/Users", b"\\Users", b"runs/", b"http"):
            assert trace not in content, (path.name, trace)
    facts = json.loads((folder / "guide.json").read_text())
    assert facts["arguments"]["base"] == "embedded:guide" and facts["training"]["seed"] == seed
    adapter = json.loads((folder / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "embedded:guide"


@pytest.mark.parametrize(
    "name", ["embedded:pgp", "embedded:", "embedded:../models/guide", "embedded:pgp_seed0/", "embedded:."]
)
def test_a_name_that_the_package_does_not_have(name: str):
    with pytest.raises(ConfigError, match=r"no guide at 'embedded:.*: the package holds embedded:pgp_seed0, "):
        PosteriorGuide.from_pretrained(name)
    with pytest.raises(ConfigError, match=r"no model at 'embedded:.*: the package holds embedded:answer_model, "):
        packaged(name, "models")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def scribble(path: Path) -> None:
    path.write_bytes(b"\0" * 100)


def remove(path: Path) -> None:
    path.unlink()


def no_arguments(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "arguments": None}))


def strange_argument(path: Path) -> None:
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "arguments": {**facts["arguments"], "lora_rnk": 3}}))


def other_rank(path: Path) -> None:
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "arguments": {**facts["arguments"], "lora_rank": 8}}))


def other_heads(path: Path) -> None:
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "arguments": {**facts["arguments"], "head_layers": 1}}))


def a_list(path: Path) -> None:
    path.write_text("[]")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("bottleneck.safetensors", truncate),
        ("bottleneck.safetensors", scribble),
        ("bottleneck.safetensors", remove),
        ("adapter_model.safetensors", truncate),
        ("adapter_model.safetensors", scribble),
        ("adapter_model.safetensors", remove),
        ("guide.json", truncate),
        ("guide.json", scribble),
        ("guide.json", a_list),
        ("guide.json", no_arguments),
        ("guide.json", strange_argument),
        ("guide.json", other_rank),
        ("guide.json", other_heads),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_damaged_copy_is_refused(tmp_path: Path, name: str, damage: Callable[[Path], None]):
    folder = tmp_path / "guide"
    shutil.copytree(FOLDER / "pgp_seed0", folder)
    PosteriorGuide.from_pretrained(folder)  # whole, it loads from anywhere
    damage(folder / name)
    with pytest.raises(ConfigError) as error:
        PosteriorGuide.from_pretrained(folder)
    assert str(folder) in str(error.value) and "export the guide again" in str(error.value)
    assert len(str(error.value)) < 600
