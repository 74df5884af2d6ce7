"""The manifests in `data_manifests/` say what is known of their data, and can be read where none of it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pgp_lightning.data.index import Index, Shard
from pgp_lightning.data.manifest import Manifest, Source
from pgp_lightning.data.writing import excess_rejects

FOLDER = Path(__file__).parents[3] / "data_manifests"
MIXTURES = ("internvl_1_2_finetune", "llava_mix665k", "gqa_grounded", "viscot")
# InternVL's internvl_1_2_finetune_custom.json: annotation file, folder of the images, records.
INTERNVL = {
    "sharegpt4v_cap100k": ("sharegpt4v_instruct_gpt4-vision_cap100k.jsonl", "data", 102_025),
    "llava_150k_zh": ("llava_instruct_150k_zh.jsonl", "data/coco", 157_712),
    "sharegpt4v_mix665k": ("sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.jsonl", "data", 665_058),
    "dvqa": ("dvqa_train_200k.jsonl", "data/dvqa", 200_000),
    "chartqa": ("chartqa_train_18k.jsonl", "data/chartqa", 18_317),
    "ai2d": ("ai2d_train_12k.jsonl", "data/ai2d", 12_413),
    "docvqa": ("docvqa_train_10k.jsonl", "data/docvqa", 10_211),
    "geoqa_plus": ("geoqa+.jsonl", "data/geoqa+", 72_318),
    "synthdog_en": ("synthdog_en.jsonl", "data/synthdog-en", 29_765),
}
VISCOT = [
    "cub",
    "docvqa",
    "dude",
    "flickr30k",
    "gqa",
    "infographicsvqa",
    "openimages",
    "sroie",
    "textcap",
    "textvqa",
    "visual7w",
    "vsr",
]


def train(name: str) -> tuple[Source, ...]:
    """Return the sources of a shipped manifest."""
    return Manifest.load(FOLDER / f"{name}.yaml").sources("train")


def test_internvls_mixture_is_complete() -> None:
    found = {
        source.name: (source.upstream.annotations, source.upstream.images, source.expected_records)
        for source in train("internvl_1_2_finetune")
        if source.upstream
    }
    assert found == INTERNVL
    assert sum(source.expected_records or 0 for source in train("internvl_1_2_finetune")) == 1_267_819
    assert all((source.repeat, source.max_tiles) == (1.0, None) for source in train("internvl_1_2_finetune"))


def test_llavas_mixture_allows_for_its_text() -> None:
    (source,) = train("llava_mix665k")
    assert source.upstream is not None and source.upstream.note is not None
    folders = {"coco": 364_100, "vg": 86_417, "ocr_vqa": 80_000, "gqa": 72_140, "textvqa": 21_953}
    assert all(f"{name} {number:,}" in source.upstream.note for name, number in folders.items())
    assert source.expected_records == sum(folders.values()) + 40_688
    assert 40_688 / 665_298 < source.expected_rejects["text-only"] < 0.07
    (same,) = [source for source in train("internvl_1_2_finetune") if source.name == "sharegpt4v_mix665k"]
    assert (same.allowed_rejects, same.expected_rejects) == (source.allowed_rejects, source.expected_rejects)


@pytest.mark.parametrize("name", MIXTURES)
def test_nothing_but_text_is_left_out_by_design(name: str, tmp_path: Path) -> None:
    for source in train(name):
        assert source.expected_rejects.keys() <= {"text-only"} and source.allowed_rejects <= 0.02
        for reason, allowed in (("text-only", bool(source.expected_rejects)), ("unknown-layout", False)):
            index = Index(tmp_path, source.name, (Shard(tmp_path / "a.tar", 94, 1, ""),), {}, {reason: 6})
            assert (excess_rejects(source, index) is None) == allowed, reason


def test_grounded_sources_have_boxes_and_claim_no_numbers() -> None:
    assert [source.name for source in train("viscot")] == VISCOT
    (gqa,) = train("gqa_grounded")
    for source in (gqa, *train("viscot")):
        assert source.build is not None and source.build.init_args["boxes"] == "pixels"
        assert source.upstream is not None and source.upstream.annotations == f"metadata/{source.name}_cot_train.jsonl"
        assert source.expected_records is None and not source.upstream.verified
    (textcap,) = [source for source in train("viscot") if source.name == "textcap"]
    assert textcap.build is not None and textcap.build.init_args["images"].endswith("/cot/textvqa")


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_names_origin_licence_and_builder(name: str) -> None:
    for source in train(name):
        assert source.upstream is not None and source.build is not None and source.url is None
        assert source.upstream.origin and source.upstream.licence
        raw = source.build.init_args
        assert raw["annotations"].startswith("data/raw/playground/") and raw["images"].startswith(
            "data/raw/playground/"
        )
        assert Path(raw["annotations"]).name == Path(source.upstream.annotations or "").name
        assert raw["images"] == f"data/raw/playground/{source.upstream.images}"
        entry = next(
            entry
            for entry in yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["splits"]["train"]
            if entry["name"] == source.name
        )
        assert isinstance(entry["upstream"]["verified"], bool)  # said, not left to a default


def test_licences_that_were_not_read_say_so() -> None:
    verified = {
        source.name for source in train("internvl_1_2_finetune") if source.upstream and source.upstream.verified
    }
    assert verified == {"sharegpt4v_cap100k", "sharegpt4v_mix665k"}


def test_the_readme_names_every_manifest_and_every_key() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"`{path.name}`" in text for path in FOLDER.glob("*.yaml"))
    keys = "name licence description root weights splits repeat weight max_tiles allowed_rejects expected_rejects"
    keys += (
        " on_damage upstream build annotations images records from verified note class_path init_args samples_per_shard"
    )
    assert all(f"`{key}`" in text for key in keys.split())


def test_the_readmes_example_is_read(tmp_path: Path) -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    example = text.split("```yaml\n")[1].split("```")[0]
    file = tmp_path / "mine.yaml"
    file.write_text(example)
    (charts,) = Manifest.load(file).sources("train")
    assert (charts.max_tiles, charts.on_damage, charts.expected_records) == (6, "fail", 18317)
