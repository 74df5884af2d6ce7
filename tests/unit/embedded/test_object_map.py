"""The object map: what it calls an object, counted pixel by pixel, and how it finds a picture again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from PIL import Image

from pgp_lightning.embedded.object_map import ObjectMap
from pgp_lightning.embedded.records import EmbeddedRecords
from pgp_lightning.embedded.world import GRID, RULE, Scene, draw_scene
from pgp_lightning.errors import ConfigError
from pgp_lightning.evaluation.resume import alike, attributes, fingerprint
from pgp_lightning.guides.base import Guide
from pgp_lightning.guides.simple import RandomGuide
from pgp_lightning.vlm.request import Request

RECORDS = {"objects": 2, "reading": 2}
SCENES = [EmbeddedRecords("test", family, count).scene(i) for family, count in RECORDS.items() for i in range(count)]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two sources of scenes among others that nobody could build."""
    ours = [
        {
            "name": family,
            "build": {
                "class_path": "pgp_lightning.embedded.records.EmbeddedRecords",
                "init_args": {"split": "test", "family": family, "records": count},
            },
        }
        for family, count in RECORDS.items()
    ]
    others = [{"name": "found"}, {"name": "made", "build": {"class_path": "no.such.Builder"}}]
    path = tmp_path_factory.mktemp("manifest") / "few.yaml"
    splits = {"train": others, "test": [*others, *ours]}
    path.write_text(yaml.safe_dump({"name": "few", "licence": "x", "root": "nowhere", "splits": splits}))
    return str(path)


def ask(scenes: list[Scene], images: list[int]) -> Request:
    tiles = [RULE.cut(Image.fromarray(scene.image))[0] for scene in scenes]
    questions = [f"how many {place}" for place in range(len(images))]
    return Request(questions, torch.from_numpy(np.concatenate(tiles)), [GRID] * len(scenes), images)


def by_hand(scene: Scene) -> list[bool]:
    """Count, token by token, how many of the 64 pixels that it shows belong to anything."""
    found = []
    for rectangle in GRID.rectangles():
        left, top, right, bottom = (round(256 * float(edge)) for edge in rectangle)
        step = (right - left) // 8
        seen = [scene.owner[y, x] >= 0 for y in range(top, bottom, step) for x in range(left, right, step)]
        assert len(seen) == 64
        found.append(sum(seen) >= 5)  # 20 of 256
    return found


def test_objects_equal_a_slow_twin(manifest: str):
    images = [2, 0, 3, 1, 0]
    shown = ObjectMap(manifest).objects(ask(SCENES, images))
    assert shown.dtype == torch.bool and shown.tolist() == [by_hand(SCENES[image]) for image in images]
    assert int(shown.sum(dim=1).min()) > 30 and int(shown.sum(dim=1).max()) < 160


def test_whatever_a_question_is_about_is_an_object(manifest: str):
    shown = ObjectMap(manifest).objects(ask(SCENES, [0, 1, 2, 3])).numpy()
    for scene, tokens in zip(SCENES, shown, strict=True):
        every = np.zeros(GRID.tokens, dtype=bool)
        for question in scene.questions:
            every |= scene.relevant(question)
        assert (tokens | ~every).all() and tokens.sum() > max(scene.relevant(q).sum() for q in scene.questions)


def test_objects_come_first_and_ties_in_a_random_guides_order(manifest: str):
    guide, request = ObjectMap(manifest, seed=3), ask(SCENES, [0, 3, 3])
    importance, shown, random = guide(request), guide.objects(request), RandomGuide(3)(request)
    assert importance.dtype == torch.float32 and torch.equal(importance >= 1, shown)
    for row in range(3):
        for part in (shown[row], ~shown[row]):
            assert torch.equal(importance[row, part].argsort(), random[row, part].argsort())


def test_a_row_does_not_depend_on_its_batch(manifest: str):
    guide, request = ObjectMap(manifest), ask(SCENES, [3, 1])
    alone = replace(ask(SCENES[1:2], [0]), questions=request.questions[1:])
    assert torch.equal(guide(alone)[0], guide(request)[1])


def test_only_pictures_that_are_asked_about_must_be_known(manifest: str):
    stranger = draw_scene("val", 0)
    guide = ObjectMap(manifest)
    assert guide.objects(ask([stranger, SCENES[0]], [1])).tolist() == [by_hand(SCENES[0])]
    with pytest.raises(ConfigError, match=r"'how many 1' is asked about is no scene of split 'test' of .*few\.yaml"):
        guide(ask([stranger, SCENES[0]], [1, 0]))


def test_other_tiles_and_tokens_are_refused(manifest: str):
    guide, request = ObjectMap(manifest), ask(SCENES[:1], [0])
    with pytest.raises(ConfigError, match="5 tiles of 128 pixels with 64 tokens each: give the object map"):
        guide(replace(request, grids=[GRID._replace(tokens_per_side=16)]))
    with pytest.raises(ConfigError, match="tile by embedded:guide"):
        guide(replace(request, tiles=request.tiles[:4], grids=[GRID._replace(thumbnail=False)]))


@pytest.mark.parametrize(
    ("split", "message"),
    [("train", r"no source of split 'train' is built by .*EmbeddedRecords"), ("val", r"splits\.val is missing")],
)
def test_a_split_without_scenes_is_refused(manifest: str, split: str, message: str):
    with pytest.raises(ConfigError, match=message):
        ObjectMap(manifest, split)


def test_a_comparison_tells_maps_apart_by_what_they_are(manifest: str, tmp_path: Path):
    used, fresh = ObjectMap(manifest), ObjectMap(manifest)
    used(ask(SCENES, [0]))
    assert alike(used) == alike(fresh) and fingerprint(used) == fingerprint(fresh) and not used.state_dict()
    assert attributes(used) == {
        "class": "pgp_lightning.embedded.object_map.ObjectMap",
        "manifest": manifest,
        "split": "test",
        "random.class": "pgp_lightning.guides.simple.RandomGuide",
        "random.seed": 0,
    }
    fewer = tmp_path / "few.yaml"
    fewer.write_text(Path(manifest).read_text().replace("records: 2", "records: 1"))
    for other in (ObjectMap(manifest, seed=1), ObjectMap(str(fewer))):
        assert alike(other) != alike(used)


def test_it_can_be_named_in_yaml(manifest: str):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--guide", type=Guide)
    given: dict[str, Any] = {
        "class_path": "pgp_lightning.embedded.object_map.ObjectMap",
        "init_args": {"manifest": manifest, "split": "test"},
    }
    guide = parser.instantiate(parser.parse_object({"guide": given})).guide
    assert isinstance(guide, ObjectMap) and alike(guide) == alike(ObjectMap(manifest))


def test_the_scene_of_a_record_is_the_one_in_its_shard():
    records = EmbeddedRecords("test", "reading", 2)
    assert {q.text for q in records.scene(1).questions} >= {turn["question"] for turn in records[1][3]["turns"]}
    for index in (-1, 2):
        with pytest.raises(IndexError):
            records.scene(index)
