"""The cost model of a training, against torch's counter, a real guide, bytes that two processes sent, and by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from pgp_lightning.errors import ConfigError
from pgp_lightning.evaluation.flops import head_flops
from pgp_lightning.evaluation.scaling import Assumptions, Cluster, Workload, largest_batch, predict, utilisation
from pgp_lightning.objective import divergence_loss, objective, reconstruction_loss
from pgp_lightning.training.global_batch import micro_batches
from pgp_lightning.vlm.memory import fit_memory, geometry, parameters
from tests.ranks import on_two_ranks
from tests.tiny import ANSWERS, GRIDS, QUESTIONS, tiny_request
from tests.unit.guides.made import make

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "scaling.py"
NODE = Cluster(8, 1, flops=300e12, single_flops=20e12, memory=80 * 2**30, intra=300e9, inter=25e9, price=2.0)


@pytest.fixture(scope="module")
def paper() -> Workload:
    return Workload(geometry("InternVL2_5-1B"))


class Step(nn.Module):
    """A training step on one record."""

    def __init__(self, guide: Any) -> None:
        super().__init__()
        self.guide = guide.train()
        self.request = tiny_request(QUESTIONS[:1], GRIDS[:1])

    def forward(self) -> Tensor:
        guide, request = self.guide, self.request
        found = guide.bottleneck_pass(request, guide.visual_tokens(request))
        latents = guide.bottleneck.sample(found.posterior, torch.zeros_like(found.states))
        predicted = guide.reconstruction_pass(request, list(ANSWERS[:1]), latents)
        return objective(reconstruction_loss(*predicted), divergence_loss(found.divergence, found.mask), 0.5)


def test_flops_of_a_record_equal_torchs_counter(tiny_base: str):
    guide = make(tiny_base, gradient_checkpointing=True)
    step = Step(guide)
    prompt = guide.vlm.processor.prompt(QUESTIONS[0], ANSWERS[0], "question_first")
    behind = len(prompt.after) + len(prompt.answer) - 1  # the last token is predicted and not read
    work = Workload(guide.vlm.model.config, tiles=3, text=len(prompt.before), answer=behind, rank=4)
    aten = torch.ops.aten
    kernels: dict[Any, Any] = {  # which torch's counter lacks
        aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **rest: sdpa_flop_count(*shapes[:3]),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda *shapes, **rest: sdpa_backward_flop_count(*shapes[:4])
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=kernels) as counter:
        step().backward()
    # The model takes every slot behind the image for supervised.
    unsupervised = behind - len(prompt.answer)
    assert sum(work.flops) - counter.get_total_flops() == 2 * head_flops(work.config, unsupervised)
    visual, width = 12, 48
    assert work.flops[1] >= 3 * 4 * 2 * visual * width**2  # the bottleneck alone


@pytest.mark.parametrize("rank", [4, 32])
def test_trained_bytes_are_those_of_a_real_guide(tiny_base: str, rank: int):
    guide = make(tiny_base, lora_rank=rank)
    trained = [p for p in guide.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert Workload(guide.vlm.model.config, rank=rank).trained == sum(p.numel() * p.element_size() for p in trained)


def test_adapter_and_bottleneck_are_computed_in_float32_beside_a_half_precision_base(tiny_base: str):
    products: Counter[tuple[bool, torch.dtype]] = Counter()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                a, b = args[-2:]
                products[5 in (*a.shape, *b.shape), a.dtype] += 1  # 5: a rank that no other size equals
            return func(*args, **(kwargs or {}))

    guide = make(tiny_base, dtype="bfloat16", lora_rank=5)
    with Watch():
        Step(guide)().backward()
    assert products[True, torch.float32] and not products[True, torch.bfloat16]
    # The bottleneck's four layers, forward and twice backward; all others are the base's.
    assert products[False, torch.float32] == 12 and products[False, torch.bfloat16] > 12


def test_trained_parameters_of_the_papers_guide(paper: Workload):
    assert paper.trained == 4 * 20_813_056  # counted of a built guide by benchmarks/two_pass_step.py


def send(rank: int, base: str) -> tuple[int, int, float]:
    torch.set_num_threads(1)
    guide = make(base, gradient_checkpointing=True)
    model = DistributedDataParallel(Step(guide))
    given: list[int] = []

    def count(state, bucket):  # torch refuses annotations that are strings
        buffer = bucket.buffer()
        given.append(buffer.numel() * buffer.element_size())
        reduced = torch.distributed.all_reduce(buffer.div_(2), async_op=True)
        return reduced.get_future().then(lambda done: done.value()[0])

    model.register_comm_hook(None, count)
    written = []
    for _ in range(2):  # steps of three micro-batches; the first also finds out about buckets
        with model.no_sync():
            model().backward()
            model().backward()
        assert len(given) == 0
        torch.distributed.barrier()
        before = _written()
        model().backward()
        written.append(_written() - before)
        total = sum(given)
        given.clear()
    return total, written[-1], Workload(guide.vlm.model.config, rank=4).wire("ddp", 2, 3)


def _written() -> int:
    """Bytes that the process has handed to the system, to sockets as well."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("wchar")))


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.skipif(not Path("/proc/self/io").is_file(), reason="needs Linux's count of bytes written")
def test_bytes_of_ddp_are_those_that_two_processes_send(tiny_base: str):
    for reduced, written, predicted in on_two_ranks(send, tiny_base):
        assert reduced == predicted  # 2 (n - 1) / n is 1 for two
        # Headers of messages come on top.
        assert predicted <= written < 1.05 * predicted + 4096


def test_bytes_over_the_wire_by_hand(tiny_base: str):
    guide = make(tiny_base)
    config = guide.vlm.model.config
    work = Workload(config, rank=4)
    named = list(guide.vlm.model.named_parameters())

    def size(*words: str) -> int:
        found = [p.numel() for n, p in named if any(w in n for w in words) and "lora" not in n and p.dim() > 1]
        return sum(found)

    layers = size("language_model.layers")
    words, head = size("embed_tokens"), size("lm_head")
    everything = sum(p.numel() for n, p in named if "lora" not in n)
    adapter = 4 * sum(p.numel() for n, p in named if "lora" in n)
    bottleneck = 4 * sum(p.numel() for p in guide.bottleneck.parameters())
    assert everything == parameters(config)
    # Both passes and their two recomputations; both passes; forward and backward; once.
    frozen = 2 * (4 * layers + 2 * words + 2 * head + (everything - layers - words - head))
    assert work.gathered == frozen + 4 * adapter + 2 * bottleneck
    s = work.trained
    assert s == adapter + bottleneck
    assert work.wire("ddp", 4, 11) == 1.5 * s
    assert work.wire("zero2", 4, 11) == 0.75 * 12 * s
    assert work.wire("zero3", 4, 11) == work.wire("fsdp2", 4, 11) == 0.75 * 11 * (s + work.gathered)


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp2"])
def test_one_gpu_sends_nothing(paper: Workload, strategy: Any):
    alone = predict(paper, NODE.of(1), strategy)
    assert alone.wire == alone.communication == 0
    assert alone.seconds == alone.compute
    assert alone.gpu_hours == alone.hours == alone.seconds * 7200 / 3600
    assert alone.cost == 2.0 * alone.hours


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_more_gpus_are_faster_until_communication_dominates(paper: Workload, strategy: Any):
    counts = [1, 2, 4, 8, 16, 88, 176]
    found = [predict(paper, NODE.of(n), strategy) for n in counts]
    for fewer, more in pairwise(found):
        assert more.seconds < fewer.seconds or more.communication > more.compute
        assert more.accumulation * more.batch_size * more.gpus == 176
    # A link that is slow enough turns it round.
    slow = replace(NODE, intra=1e6, inter=1e6)
    assert predict(paper, slow.of(2)).seconds > predict(paper, slow.of(1)).seconds


def test_seconds_of_a_step_by_hand(paper: Workload):
    given = Assumptions(utilisation=0.5, link=0.5, launch=0.0)
    found = predict(paper, replace(NODE, nodes=2), "ddp", 11, given)
    half, wide = paper.flops
    assert found.compute == pytest.approx(11 * (half / 150e12 + wide / 10e12))
    # Two nodes: a ring leaves each over 8 links of 25 GB/s.
    assert found.communication == pytest.approx(2 * 15 / 16 * paper.trained / (0.5 * 200e9))
    assert found.seconds == pytest.approx(found.compute + found.communication)
    assert found.cost == 2.0 * found.gpu_hours == 2.0 * 16 * found.hours
    hidden = predict(paper, replace(NODE, nodes=2), "ddp", 11, replace(given, overlap=1.0))
    assert hidden.seconds == pytest.approx(found.compute)
    starved = predict(paper, replace(NODE, nodes=2), "ddp", 11, replace(given, decode=4.0))
    assert starved.seconds == starved.data == 11 * 4.0 / 4
    assert starved.cores == pytest.approx(4)
    launching = predict(paper, replace(NODE, nodes=2), "ddp", 1, replace(given, launch=1.0))
    assert launching.compute == 11 * 573 * 24
    assert utilisation(paper, replace(NODE, nodes=2), found.compute) == pytest.approx(0.5)


def test_memory_is_that_of_fit_memory(paper: Workload):
    whole = fit_memory(paper.config, rows=16, tiles=7, text_slots=192)
    assert paper.memory("ddp", 1, 16, 1e9) == pytest.approx(whole.total, rel=1e-6)
    for strategy in ("zero2", "zero3"):
        assert paper.memory(strategy, 8, 16, 0) < paper.memory(strategy, 2, 16, 0) < whole.total
    everything = whole.total - whole.weights - whole.trained
    assert paper.memory("zero3", 8, 16, 0) == pytest.approx((whole.weights + whole.trained) / 8 + everything, rel=1e-6)
    assert paper.memory("zero2", 8, 16, 0) == pytest.approx(
        whole.weights + whole.trained * (1 + 3 / 8) / 4 + everything, rel=1e-6
    )


def test_micro_batches_fit_and_divide(paper: Workload):
    assert largest_batch(paper, NODE.of(1), "ddp") == 16
    assert largest_batch(paper, NODE, "ddp") == 11
    small = replace(NODE, memory=8 * 2**30)
    size = largest_batch(paper, small, "ddp")
    assert 0 < size < 11 and micro_batches(176, 8, size) * size * 8 == 176
    large = Workload(geometry("InternVL2_5-26B"))
    tight = replace(NODE, memory=24 * 2**30)
    assert largest_batch(large, tight, "ddp") == 0
    assert largest_batch(large, tight, "zero3") > 0
    with pytest.raises(ConfigError, match="not one record fits"):
        predict(large, tight)


def test_gpus_that_cannot_share_are_refused(paper: Workload):
    with pytest.raises(ConfigError, match="cannot be dealt to 24 processes"):
        predict(paper, NODE.of(24))
    with pytest.raises(ConfigError, match="no whole nodes of 8"):
        NODE.of(44)


def test_the_script_prints_the_tables(run_script: Callable[..., str]):
    printed = run_script(SCRIPT, "--cluster", "H100", "--gpus", 1, 8)
    assert "| H100 | 8 | 11 x 2 |" in printed and "| 11 | 16 |" in printed
