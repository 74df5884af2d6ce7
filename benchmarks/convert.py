"""Measure the conversion of an original InternVL checkpoint: seconds, and memory beyond what importing takes.

    python benchmarks/convert.py --gib 2.0 --folder /tmp --repeats 3

Makes a sharded checkpoint of random bfloat16 numbers in the original layout (InternLM2 text of width 2048 with its full
vocabulary, a tower of InternViT-300M's width) and converts it. The baseline reads the converted folder's tensors with
safetensors' `safe_open`, writes them with `save_file` in shards of the same size and waits for the disk, without
conversion or verification. Both run in turns, each time in a process of its own; what is printed are medians, with the
least and the most in brackets.

Peak memory is of that process, less what it had when the imports were done, sampled every 5 ms from /proc: resident
memory, which counts pages of mapped files, and anonymous memory, which counts none and cannot be given back to the
kernel at will. Everything is written below `--folder`, which should be on the disk in question, and removed afterwards.
Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pgp_lightning.vlm.conversion import convert_checkpoint
from pgp_lightning.vlm.original_config import convert_config, image_token_id
from pgp_lightning.vlm.shard_files import Stored, read_folder

WIDTH, INNER, HEADS, KEYS, VOCABULARY = 2048, 8192, 16, 8, 92553
TOWER, TOWER_INNER, TOWER_LAYERS = 1024, 4096, 4
GIB = 2**30


def shapes_of(layers: int) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the checkpoint's tensors."""
    shapes: dict[str, tuple[int, ...]] = {
        "vision_model.embeddings.class_embedding": (1, 1, TOWER),
        "vision_model.embeddings.position_embedding": (1, 1025, TOWER),
        "vision_model.embeddings.patch_embedding.weight": (TOWER, 3, 14, 14),
        "vision_model.embeddings.patch_embedding.bias": (TOWER,),
        "mlp1.0.weight": (4 * TOWER,),
        "mlp1.0.bias": (4 * TOWER,),
        "mlp1.1.weight": (WIDTH, 4 * TOWER),
        "mlp1.1.bias": (WIDTH,),
        "mlp1.3.weight": (WIDTH, WIDTH),
        "mlp1.3.bias": (WIDTH,),
        "language_model.model.tok_embeddings.weight": (VOCABULARY, WIDTH),
        "language_model.model.norm.weight": (WIDTH,),
        "language_model.output.weight": (VOCABULARY, WIDTH),
    }
    for layer in range(TOWER_LAYERS):
        for name, rows, columns in (
            ("attn.qkv", 3 * TOWER, TOWER),
            ("attn.proj", TOWER, TOWER),
            ("mlp.fc1", TOWER_INNER, TOWER),
            ("mlp.fc2", TOWER, TOWER_INNER),
        ):
            shapes[f"vision_model.encoder.layers.{layer}.{name}.weight"] = (rows, columns)
            shapes[f"vision_model.encoder.layers.{layer}.{name}.bias"] = (rows,)
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1", "ls2"):
            shapes[f"vision_model.encoder.layers.{layer}.{name}"] = (TOWER,)
    for layer in range(layers):
        stem, head = f"language_model.model.layers.{layer}", WIDTH // HEADS
        shapes[f"{stem}.attention.wqkv.weight"] = ((HEADS + 2 * KEYS) * head, WIDTH)
        shapes[f"{stem}.attention.wo.weight"] = (WIDTH, WIDTH)
        shapes[f"{stem}.feed_forward.w1.weight"] = (INNER, WIDTH)
        shapes[f"{stem}.feed_forward.w3.weight"] = (INNER, WIDTH)
        shapes[f"{stem}.feed_forward.w2.weight"] = (WIDTH, INNER)
        shapes[f"{stem}.attention_norm.weight"] = (WIDTH,)
        shapes[f"{stem}.ffn_norm.weight"] = (WIDTH,)
    return shapes


def bytes_of(shapes: dict[str, tuple[int, ...]]) -> int:
    """Return the size of tensors of these shapes in bfloat16."""
    return 2 * sum(torch.Size(shape).numel() for shape in shapes.values())


def make_checkpoint(folder: Path, size: int, shard_bytes: int) -> None:
    """Write an original checkpoint of about a size, at least one decoder layer deep."""
    one = bytes_of(shapes_of(1))
    layers = 1 + max(0, round((size - one) / (bytes_of(shapes_of(2)) - one)))
    folder.mkdir()
    vision = {"hidden_size": TOWER, "num_hidden_layers": TOWER_LAYERS, "num_attention_heads": 16,
              "intermediate_size": TOWER_INNER, "image_size": 448, "norm_type": "layer_norm", "qkv_bias": True,
              "qk_normalization": False}  # fmt: skip
    text = {"architectures": ["InternLM2ForCausalLM"], "vocab_size": VOCABULARY, "hidden_size": WIDTH,
            "intermediate_size": INNER, "num_hidden_layers": layers, "num_attention_heads": HEADS,
            "num_key_value_heads": KEYS, "bias": False, "max_position_embeddings": 32768}  # fmt: skip
    config = {"model_type": "internvl_chat", "ps_version": "v2", "vision_config": vision, "llm_config": text}
    (folder / "config.json").write_text(json.dumps(config))
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes_of(layers).items():
        if groups[-1] and bytes_of(groups[-1] | {name: shape}) > shard_bytes:
            groups.append({})
        groups[-1][name] = shape
    places = {}
    generator = torch.Generator().manual_seed(0)
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        # Bits of random integers are as random as can be, and made faster than normal numbers.
        tensors = {
            name: torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator).view(torch.bfloat16)
            for name, shape in group.items()
        }
        save_file(tensors, folder / file, {"format": "pt"})
        places |= dict.fromkeys(group, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def convert(source: Path, target: Path, shard_bytes: int) -> None:
    """Convert, verification included."""
    config = json.loads((source / "config.json").read_text())
    convert_checkpoint(source, target, convert_config(config, image_token_id(config, None)), shard_bytes=shard_bytes)


def copy(source: Path, target: Path, shard_bytes: int) -> None:
    """Read all tensors and write them with the library; source is a converted folder."""
    target.mkdir()
    room = shard_bytes
    shards: list[list[Stored]] = [[]]
    for one in read_folder(source).values():
        size = 2 * torch.Size(one.shape).numel()
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        room -= size
        shards[-1].append(one)
    for number, shard in enumerate(shards):
        tensors = {}
        for one in shard:
            with safe_open(one.file, framework="pt") as opened:
                tensors[one.name] = opened.get_tensor(one.name)
        file = target / f"{number}.safetensors"
        save_file(tensors, file, {"format": "pt"})
        with file.open("rb") as written:
            os.fsync(written.fileno())


def memory() -> dict[str, int]:
    """Return this process's resident and anonymous bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS:", "RssAnon:"))}
    return {"resident": 1024 * int(found["VmRSS"]), "anonymous": 1024 * int(found["RssAnon"])}


def watched(call: Callable[[], None]) -> dict[str, float]:
    """Call, and return the seconds it took and the peaks of memory above what there was before."""
    before, done = memory(), threading.Event()
    peak = dict(before)

    def sample() -> None:
        while not done.wait(0.005):
            for kind, value in memory().items():
                peak[kind] = max(peak[kind], value)

    sampler = threading.Thread(target=sample)
    sampler.start()
    start, processor = time.perf_counter(), time.process_time()
    call()
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    done.set()
    sampler.join()
    return {"seconds": seconds, "processor": processor, **{kind: peak[kind] - before[kind] for kind in before}}


def in_a_process(way: str, source: Path, target: Path, shard_bytes: int) -> dict[str, float]:
    """Run one way in a process of its own, and remove what it wrote."""
    arguments = [sys.executable, __file__, "--run", way, str(source), str(target), str(shard_bytes)]
    done = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True)
    shutil.rmtree(target)
    # What the kernel still has to write is not the next one's.
    os.sync()
    result: dict[str, float] = json.loads(done.stdout)
    return result


def main(arguments: list[str] | None = None) -> None:
    """Make the checkpoint, run both ways in turns, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0, help="size of the checkpoint, at least 0.94")
    parser.add_argument("--shard-gib", type=float, default=0.25, help="greatest size of a file")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to be used")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--run", nargs=4, metavar=("WAY", "SOURCE", "TARGET", "BYTES"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.run:
        way: Callable[..., None] = {"convert": convert, "copy": copy}[given.run[0]]
        source, target, shard_bytes = Path(given.run[1]), Path(given.run[2]), int(given.run[3])
        print(json.dumps(watched(lambda: way(source, target, shard_bytes))))
        return
    shard_bytes = int(given.shard_gib * GIB)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        original, converted = Path(folder) / "original", Path(folder) / "converted"
        make_checkpoint(original, int(given.gib * GIB), shard_bytes)
        convert(original, converted, shard_bytes)
        size = sum(file.stat().st_size for file in original.glob("*.safetensors"))
        print(f"{size / GIB:.2f} GiB in {len(list(original.glob('*.safetensors')))} files, torch {torch.__version__}")
        runs: dict[str, list[dict[str, Any]]] = {"convert": [], "copy": []}
        for _ in range(given.repeats):
            for name, start in (("copy", converted), ("convert", original)):
                runs[name].append(in_a_process(name, start, Path(folder) / "target", shard_bytes))
    columns = (("seconds", 1, "s"), ("processor", 1, "s of processor"), ("anonymous", 2**20, "MiB anonymous"))
    for name, found in runs.items():
        line = f"{name:8}"
        for key, unit, label in (*columns, ("resident", 2**20, "MiB resident")):
            values = [one[key] / unit for one in found]
            line += f"  {statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f}) {label}"
        print(line)
    ours, baseline = (statistics.median(one["seconds"] for one in runs[name]) for name in ("convert", "copy"))
    print(f"convert / copy: {ours / baseline:.2f}")


if __name__ == "__main__":
    main()
