"""The console script `pgp`: tools around a run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pgp_lightning.errors import ConfigError, DataError
from pgp_lightning.tools_shards import add_shards

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `pgp` and return the exit code: 0 for success, 1 for a failed check, 2 for a set-up that cannot work."""
    parser = argparse.ArgumentParser(prog="pgp", description="Tools around training a pruning guide.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    export = commands.add_parser("export", help="write the guide artefact of a run")
    export.add_argument("run", type=Path, help="the run's folder, or a checkpoint file")
    export.add_argument("folder", type=Path, help="where the artefact goes")
    export.add_argument("--verify", action="store_true", help="reload the artefact and compare its scores")
    export.set_defaults(call=_export)

    doctor = commands.add_parser("doctor", help="say whether a fit would work, before paying for it")
    doctor.add_argument("--config", type=Path, action="append", required=True, help="as for lightning fit")
    doctor.add_argument("--answer-model", help="also check that this model can be pruned by the guide")
    doctor.set_defaults(call=_doctor)

    convert = commands.add_parser("convert", help="rewrite an original InternVL checkpoint for transformers")
    convert.add_argument("source", help="a folder in the original layout, or OWNER/NAME on the hub")
    convert.add_argument("folder", type=Path, help="where the converted checkpoint goes; must not exist")
    convert.add_argument("--image-token-id", type=int, help="id of <IMG_CONTEXT>, where the source has no tokenizer")
    convert.set_defaults(call=_convert)

    add_shards(commands)

    prune = commands.add_parser("prune", help="answer one question with all visual tokens and with few")
    prune.add_argument("--image", type=Path, help="PNG, JPEG or WebP")
    prune.add_argument("--question")
    prune.add_argument("--scene", type=int, help="a test scene of the embedded world in place of image and question")
    prune.add_argument("--guide", default="embedded:pgp_seed0", help="folder of an exported guide")
    prune.add_argument("--answer-model", default="embedded:answer_model", help="folder, or OWNER/NAME on the hub")
    prune.add_argument("--keep-ratio", type=float, default=0.05, help="share of the visual tokens that stay")
    prune.add_argument("--layer", type=int, default=0, help="L: drop the others before this decoder layer")
    prune.add_argument("--max-new-tokens", type=int, default=64)
    prune.add_argument("--dtype", choices=("float32", "bfloat16"), help="by default bfloat16 with CUDA, else float32")
    prune.add_argument("--output", type=Path, default=Path("pruned.png"), help="picture of what was kept")
    prune.set_defaults(call=_prune)

    sweep = commands.add_parser("sweep", help="train a configuration with one thing changed at a time, and tabulate")
    sweep.add_argument("folder", type=Path, help="overlays and a sweep.yaml, e.g. configs/ablations")
    sweep.add_argument("--rows", nargs="+", default=[], help="only these, not their references; by default all")
    sweep.add_argument("--seeds", nargs="+", type=int, default=[], help="only these; by default all of a row")
    sweep.add_argument("--jobs", type=int, default=1, help="runs that are trained side by side, sharing the cores")
    sweep.add_argument("--output", type=Path, help="folder of runs and tables, in place of the sweep's own")
    sweep.set_defaults(call=_sweep)

    probe = commands.add_parser("probe", help="say whether a guide's visual states carry the question")
    probe.add_argument("guide", help="a base model or an exported guide: embedded:NAME, a folder, or a base on the hub")
    probe.add_argument(
        "--manifest", default="data_manifests/embedded.yaml", help="data with several questions an image"
    )
    probe.add_argument("--split", default="test")
    probe.add_argument("--root", help="folder of the shards, in place of the manifest's")
    probe.add_argument("--images", type=int, default=400, help="records to look at")
    probe.add_argument("--max-tiles", type=int, help="of an image, the thumbnail apart; by default the base's")
    probe.add_argument("--dtype", choices=("float32", "bfloat16"), help="by default bfloat16 with CUDA, else float32")
    probe.add_argument("--seed", type=int, default=0)
    probe.add_argument("--output", type=Path, help="JSON file for everything that was measured")
    probe.set_defaults(call=_probe)

    compare = commands.add_parser("compare", add_help=False, help="run pruning methods on the same questions")
    compare.add_argument("rest", nargs=argparse.REMAINDER)
    compare.set_defaults(call=_compare)

    words = list(sys.argv[1:] if arguments is None else arguments)
    # The command has options of its own, read from a class.
    given = argparse.Namespace(call=_compare, rest=words[1:]) if words[:1] == ["compare"] else parser.parse_args(words)
    try:
        return int(given.call(given))
    except DataError as error:
        return _fail(error, 1)
    except (ConfigError, FileNotFoundError) as error:
        return _fail(error, 2)


def _fail(error: Exception, code: int) -> int:
    sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
    return code


def _export(given: argparse.Namespace) -> int:
    from pgp_lightning.training.command_line import quieten
    from pgp_lightning.training.export import export_guide, verify_guide

    quieten()
    export_guide(given.run, given.folder)
    print(f"guide of {given.run} written to {given.folder}")
    if given.verify:
        compared, worst = verify_guide(given.run, given.folder)
        print(f"verified: {compared} scores, greatest difference {worst:g}")
        return 0 if worst == 0 else 1
    return 0


def _doctor(given: argparse.Namespace) -> int:
    from pgp_lightning.doctor import examine

    findings = examine(given.config, given.answer_model)
    for finding in findings:
        print(finding)
    bad = [finding for finding in findings if finding.state == "fail"]
    print(f"{len(bad)} of {len(findings)} checks failed" if bad else f"all {len(findings)} checks passed")
    return 1 if bad else 0


def _convert(given: argparse.Namespace) -> int:
    from pgp_lightning.vlm.loading import convert_base

    convert_base(given.source, given.folder, given.image_token_id)
    print(f"{given.source} written to {given.folder}, every tensor read back and compared")
    return 0


def _prune(given: argparse.Namespace) -> int:
    from pgp_lightning.evaluation.prune import open_picture, prune_picture
    from pgp_lightning.training.command_line import quieten

    quieten()
    if given.output.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp") or not given.output.parent.is_dir():
        raise ConfigError(f"--output must be a PNG, JPEG or WebP file in a folder that exists, got {given.output}")
    if given.scene is not None:
        if given.scene < 0:
            raise ConfigError(f"--scene must be at least 0, got {given.scene}")
        from PIL import Image

        from pgp_lightning.embedded.world import draw_scene

        scene = draw_scene("test", given.scene)
        image, question = Image.fromarray(scene.image), given.question or scene.questions[0].text
    elif given.image and given.question:
        image, question = open_picture(given.image), given.question
    else:
        raise ConfigError("give --image and --question, or --scene NUMBER")
    found = prune_picture(
        image,
        question,
        given.guide,
        given.answer_model,
        given.keep_ratio,
        given.layer,
        given.max_new_tokens,
        given.dtype,
    )
    found.draw(image).save(given.output)
    print(f"question     {question}\n{found.summary()}\npicture      {given.output}")
    return 0


def _sweep(given: argparse.Namespace) -> int:
    from pgp_lightning.evaluation.sweep import sweep

    return sweep(given.folder, given.output, given.rows, given.seeds, given.jobs)


def _probe(given: argparse.Namespace) -> int:
    import json

    from pgp_lightning.evaluation.probe import probe_guide
    from pgp_lightning.training.command_line import quieten

    if given.output and (not given.output.parent.is_dir() or given.output.is_dir()):
        raise ConfigError(f"--output must be a file in a folder that exists, got {given.output}")
    quieten()
    found = probe_guide(
        given.guide,
        given.manifest,
        given.split,
        given.root,
        given.images,
        given.max_tiles,
        given.dtype,
        given.seed,
    )
    print(found.summary())
    if given.output:
        given.output.write_text(json.dumps(found.as_json(), indent=2) + "\n", encoding="utf-8")
    return 0 if found.carries else 1


def _compare(given: argparse.Namespace) -> int:
    from pgp_lightning.evaluation.compare import compare

    compare(given.rest)
    return 0


if __name__ == "__main__":
    sys.exit(main())
