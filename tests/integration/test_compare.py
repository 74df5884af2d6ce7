"""`pgp compare` as users call it: what it writes, a kill in the middle, and mistakes in one line."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import pgp_lightning
from pgp_lightning.evaluation.scoring import load_results
from pgp_lightning.tools import main
from tests.integration.failing import fails
from tests.unit.evaluation.scenes_made import Scenes, write_scenes

ROOT = Path(__file__).parents[2]
COMPARE = ROOT / "configs" / "compare" / "embedded.yaml"
GUIDES = Path(pgp_lightning.__file__).parent / "embedded" / "guides"
METHODS = ("pgp", "sgp", "fastv_L2", "divprune")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources = Scenes("objects", 4), Scenes("reading", 4)
    return write_scenes(tmp_path_factory.mktemp("scenes"), *sources)


@pytest.fixture(scope="module")
def config(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The shipped configuration with fewer methods, on few scenes."""
    found: dict[str, Any] = yaml.safe_load(COMPARE.read_text())
    found["methods"] = {name: found["methods"][name] for name in METHODS}
    for key in ("pairs", "split_pairs"):
        found[key] = [pair for pair in found[key] if set(pair) <= {*METHODS, "uniform", "random", "oracle"}]
    found |= {"manifest": str(manifest), "keep_ratios": [0.05, 0.2], "batch_size": 2, "max_new_tokens": 4}
    found |= {"keep_importance": ["pgp", "sgp"], "explore": ["pgp@5", "sgp@5"]}
    found.pop("timed_images", None)  # times differ from run to run
    return found


def written(config: dict[str, Any], folder: Path) -> Path:
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def command(path: Path, output: Path, *extra: str) -> list[str]:
    return [
        sys.executable, "-m", "pgp_lightning.tools", "compare", "--config", str(path), "--output", str(output), *extra
    ]  # fmt: skip


def results(folder: Path) -> dict[str, bytes]:
    """Return the answers, byte by byte, and what is made of them."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def whole(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    words = command(written(config, folder), folder / "out", "--images", "6")
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "| pgp | 5 % |" in done.stdout and "report.md" in done.stdout
    return folder / "out"


@pytest.mark.contract
def test_a_comparison_writes_its_report(whole: Path):
    made = {"report.md", "report.csv", "report.json", "curve.svg", "explorer.html", "paired.md"}
    names = {f"{name}@{budget}" for name in (*METHODS, "uniform", "random", "oracle") for budget in (5, 20)}
    names |= {"full", "guide_image_first", "guide_question_first"}
    lines = {f"{name}.jsonl" for name in names}
    assert {path.name for path in whole.iterdir()} == made | lines | {"methods.json", "benchmark.json"}
    answers = load_results(whole).answers
    assert {len(found) for found in answers.values()} == {12}

    report = json.loads((whole / "report.json").read_text())
    assert report["samples"] == 12 and {row["method"] for row in report["rows"]} == names
    with (whole / "report.csv").open() as file:
        table = {row["method"]: row for row in csv.DictReader(file)}
    assert table.keys() == names
    text = (whole / "report.md").read_text()
    assert "12 questions about 6 records" in text
    for row in report["rows"]:
        mine = answers[row["method"]]
        right = sum(answer.correct for answer in mine) / 12
        assert row["accuracy"]["mean"] == pytest.approx(right)
        assert row["kept"] == sum(answer.kept for answer in mine) / 12
        flops = sum(answer.extra["flops"] + answer.extra["guide_flops"] for answer in mine) / 12
        assert row["flops"] == pytest.approx(flops)
        assert row["recall"] == pytest.approx(sum(answer.recall for answer in mine) / 12)  # type: ignore[misc]
        budget = "all" if row["method"] == "full" else f"{100 * row['keep_ratio']:.3g} %"
        assert f"| {row['name']} | {budget} |" in text
        assert f" {100 * right:.1f} [" in text
    paired = (whole / "paired.md").read_text()
    wins = sum(a.correct and not b.correct for a, b in zip(answers["pgp@5"], answers["random@5"], strict=True))
    losses = sum(b.correct and not a.correct for a, b in zip(answers["pgp@5"], answers["random@5"], strict=True))
    assert f"| pgp@5 | random@5 | all | 12 | 6 | {wins} | {losses} |" in paired
    assert "| pgp@20 | sgp@20 | guide_image_first: no |" in paired
    assert (whole / "curve.svg").read_text().startswith("<svg")
    page = (whole / "explorer.html").read_text()
    assert "<html" in page and 'src="http' not in page and 'href="http' not in page
    shown = zip(answers["full"], answers["pgp@5"], answers["sgp@5"], strict=True)
    flipped = [full for full, *others in shown if any(other.correct != full.correct for other in others)]
    assert page.count("<article") == len(flipped) > 0 and all(answer.question in page for answer in flipped)


@pytest.mark.full
def test_a_killed_comparison_goes_on(config: dict[str, Any], whole: Path, tmp_path: Path):
    output, words = tmp_path / "out", command(written(config, tmp_path), tmp_path / "out", "--images", "6")
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first = output / "sgp@5.jsonl"
    while process.poll() is None and not (first.is_file() and first.stat().st_size):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert process.returncode == -9 and not (output / "report.md").exists()
    # What it was writing when it was killed.
    with (output / "pgp@20.jsonl").open("a") as file:
        file.write('{"key": "test-obj')
    assert main(words[3:]) == 0
    assert results(output) == results(whole)


def test_a_later_method_joins(config: dict[str, Any], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = shutil.copytree(whole, tmp_path / "out")
    more = {
        **config,
        "methods": {**config["methods"], "zip": {"class_path": "pgp_lightning.pruners.vision_zip.VisionZip"}},
    }
    assert main(command(written(more, tmp_path), output, "--images", "6")[3:]) == 0
    before, after = results(whole), results(output)
    assert {name for name in after if name not in before} == {"zip@5.jsonl", "zip@20.jsonl"}
    assert all(after[name] == before[name] for name in before if name.endswith(".jsonl"))
    assert "| zip | 5 % |" in capsys.readouterr().out


def test_parts_are_taken_in(config: dict[str, Any], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = command(written(config, tmp_path), tmp_path / "out", "--images=6")[3:]
    for part in ("1/3", "2/3"):
        assert main([*words, f"--part={part}"]) == 0
        assert capsys.readouterr().out == f"part {part} is answered: {tmp_path}/out/parts/{part.replace('/', '_of_')}\n"
    # Every third of full, oracle, divprune, fastv_L2, pgp, sgp, uniform, random and two rows of the guide alone.
    shares = {"1_of_3": ("full", "fastv_L2", "uniform", "guide_question_first"), "2_of_3": ("oracle", "pgp", "random")}
    for folder, labels in shares.items():
        found = {file.stem.partition("@")[0] for file in (tmp_path / "out" / "parts" / folder).glob("*.jsonl")}
        assert found == set(labels)
    # Of a part that was stopped, the rest is answered.
    stopped = tmp_path / "out" / "parts" / "2_of_3" / "random@5.jsonl"
    stopped.write_text("".join(stopped.read_text().splitlines(keepends=True)[:5]) + '{"key": "te')
    assert "another images (6, now 5)" in fails([*words, "--images=5"], capsys)
    assert main(words) == 0
    assert results(tmp_path / "out") == results(whole)


# Mistakes


def guided(folder: Path | str) -> dict[str, Any]:
    loader = "pgp_lightning.guides.posterior.PosteriorGuide.from_pretrained"
    guide = {"class_path": loader, "init_args": {"folder": str(folder)}}
    return {"class_path": "pgp_lightning.pruners.guided.Guided", "init_args": {"guide": guide}}


def changed(**keys: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.update(keys)


def mistyped(config: dict[str, Any]) -> None:
    config["methods"]["fastv_L2"]["init_args"]["layr"] = 2


def unknown_class(config: dict[str, Any]) -> None:
    config["methods"]["fastv_L2"]["class_path"] = "pgp_lightning.pruners.fastv.FastW"


def no_pruner(config: dict[str, Any]) -> None:
    config["methods"]["fastv_L2"] = {"class_path": "pgp_lightning.guides.simple.UniformGuide"}


def too_deep(config: dict[str, Any]) -> None:
    config["methods"]["fastv_L2"]["init_args"]["layer"] = 4


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (unknown_class, ["methods", "FastW"]),
        (no_pruner, ["methods", "UniformGuide", "Pruner"]),
        (mistyped, ["methods", "layr"]),
        (changed(imagez=3), ["imagez"]),
        (changed(part="2"), ["NUMBER/PARTS", "'2'"]),
        (changed(part="0/2"), ["from 1/2 to 2/2", "0/2"]),
        (changed(part="12/12"), ["no part 12/12", "10 methods", "fastv_L2"]),
        (changed(keep_ratios=[0]), ["keep_ratios", "(0, 1)", "[0.0]"]),
        (changed(keep_ratios=[0.05, 1.5]), ["keep_ratios", "(0, 1)", "1.5"]),
        (changed(images="some"), ["images", "some"]),
        (changed(split="vall"), ["vall"]),
        (changed(manifest="gone.yaml"), ["gone.yaml"]),
        (changed(answer_model="embedded:gone"), ["no model at 'embedded:gone'", "embedded:answer_model"]),
        (changed(guide_alone="nowhere/to/be/found"), ["no model at 'nowhere/to/be/found'"]),
        (changed(methods={"pgp": guided("nowhere")}, keep_importance=[]), ["nowhere holds no guide", "guide.json"]),
        (
            changed(methods={"pgp": guided("embedded:gone")}, keep_importance=[]),
            ["embedded:gone", "embedded:pgp_seed0"],
        ),
        (changed(methods={"a@5": guided("embedded:pgp_seed0")}, keep_importance=[]), ["'a@5'"]),
        (changed(reference="pgb"), ["reference names pgb", "pgp", "full", "pgp@5"]),
        (changed(explore=["pgp@5", "pgp@6", "sgp", "full"]), ["explore names pgp@6, sgp, full,"]),
        (changed(pairs=[["pgp", "fastv"]]), ["pairs names fastv,", "fastv_L2", "guide_image_first"]),
        (changed(split_pairs=[["pgp", "sgpp"]]), ["split_pairs names sgpp,"]),
        (changed(guide_alone=None), ["split_pairs", "give guide_alone"]),
        (too_deep, ["cannot prune before layer 4", "0 to 3"]),
    ],
    ids=lambda value: "" if callable(value) else value[0],
)
def test_a_mistake_is_one_line(
    config: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[dict[str, Any]], None],
    words: list[str],
):
    mine = json.loads(json.dumps(config))
    spoil(mine)
    line = fails(command(written(mine, tmp_path), tmp_path / "out", "--images=1")[3:], capsys)
    assert all(word in line for word in words), line
    assert not list(tmp_path.glob("out/report*"))
    assert "names" not in line or not (tmp_path / "out").exists()


def test_where_no_relevant_tokens_are_known_the_oracle_is_no_row(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    manifest = write_scenes(tmp_path, Scenes("objects", 1, known=False))
    path = written({**config, "manifest": str(manifest), "pairs": [["pgp", "oracle"]]}, tmp_path)
    assert "pairs names oracle," in fails(command(path, tmp_path / "out")[3:], capsys)


def test_rows_without_a_budget_can_be_reference_and_in_pairs(config: dict[str, Any], whole: Path, tmp_path: Path):
    output = shutil.copytree(whole, tmp_path / "out")
    (output / "gone@5.jsonl").write_text("".join((whole / "pgp@5.jsonl").read_text().splitlines(keepends=True)[:3]))
    given = {**config, "pairs": [["pgp", "full"], ["full", "guide_image_first"]]}
    words = command(written(given, tmp_path), output, "--images", "6", "--reference", "full")
    assert main(words[3:]) == 0
    lines = [line for line in (output / "paired.md").read_text().splitlines() if "| all |" in line]
    pairs = [("pgp@5", "full"), ("pgp@20", "full"), ("full", "guide_image_first")]
    assert [tuple(line.split(" | ")[:2]) for line in lines] == [(f"| {first}", second) for first, second in pairs]
    rows = {row["method"]: row["reference"] for row in json.loads((output / "report.json").read_text())["rows"]}
    assert set(rows.values()) == {"full", None} and "gone@5" not in rows


def test_without_a_reference_the_first_method_is_it(config: dict[str, Any], whole: Path, tmp_path: Path):
    output = shutil.copytree(whole, tmp_path / "out")
    given = {key: value for key, value in config.items() if key not in ("reference", "pairs")}
    path = written(given, tmp_path)
    assert main(command(path, output, "--images", "6")[3:]) == 0
    rows = {row["method"]: row["reference"] for row in json.loads((output / "report.json").read_text())["rows"]}
    assert rows["random@5"] == f"{next(iter(yaml.safe_load(path.read_text())['methods']))}@5"


@pytest.mark.parametrize(
    ("name", "content"),
    [("bottleneck.safetensors", None), ("adapter_model.safetensors", None), ("guide.json", b'{"method": ')],
)
def test_a_damaged_guide_is_one_line(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None
):
    shutil.copytree(GUIDES / "pgp_seed0", tmp_path / "guide")
    file = tmp_path / "guide" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if content is None else content)
    mine = {**config, "methods": {"pgp": guided(tmp_path / "guide")}, "keep_importance": []}
    line = fails(command(written(mine, tmp_path), tmp_path / "out")[3:], capsys)
    assert "damaged" in line and "export the guide again" in line and str(tmp_path / "guide") in line
    assert not (tmp_path / "out").exists()


def test_another_configuration_in_the_same_folder(
    config: dict[str, Any], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    before = results(whole)
    path = written(config, tmp_path)
    assert "another images (6, now 5)" in fails(command(path, whole, "--images=5")[3:], capsys)
    options = command(path, whole, "--images=6", "--methods.fastv_L2.init_args.query=all")[3:]
    assert "another methods.fastv_L2" in fails(options, capsys)
    assert results(whole) == before


@pytest.mark.full
def test_the_process_has_the_exit_code(config: dict[str, Any], tmp_path: Path):
    words = command(written(config, tmp_path), tmp_path / "out", "--imagez=5")
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: unrecognized arguments: --imagez=5"]


def test_help_says_what_there_is(capsys: pytest.CaptureFixture[str]):
    for name, words in {"compare": ["--methods", "--keep_ratios", "--pairs"], "prune": ["--scene", "--layer"]}.items():
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert not stop.value.code
        out = capsys.readouterr().out
        assert all(word in out for word in words), out
