"""What a training step of the posterior guide really computed and held: floating-point operations and live tensors.

Counters, for the closed forms of `pgp_lightning/evaluation/training_flops.py` to be held against.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, mm_flop, sdpa_backward_flop_count, sdpa_flop_count

from pgp_lightning.evaluation.training_flops import Flops
from pgp_lightning.guides.posterior import PosteriorGuide

__all__ = ["LiveBytes", "count_flops"]


def count_flops(guide: PosteriorGuide, rank: int, step: Callable[[], Tensor]) -> Flops:
    """Run a step, forward and backward, under torch's counter and split what it counts by part.

    A part begins where its module is entered, and in the backward pass where the gradient of its output is ready. The
    adapter's products are known by a side of its rank.

    Args:
        guide: what the step trains.
        rank: of the adapter; no other size in the model may equal it.
        step: returns the loss.

    Returns:
        FLOPs of each part, and of "other" if anything ran outside all parts.
    """
    adapter = 0

    def product(*shapes: torch.Size, **rest: object) -> int:
        nonlocal adapter
        flops = int(mm_flop(*shapes[:2]))
        adapter += flops if rank in (*shapes[0], *shapes[1]) else 0
        return flops

    aten = torch.ops.aten
    formulas = {
        aten.mm: product,
        aten.addmm: lambda bias, *shapes, **rest: product(*shapes),
        # torch counts the attention kernels of CUDA but not the one of the CPU; these are its own formulas.
        aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **rest: sdpa_flop_count(*shapes[:3]),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda *shapes, **rest: sdpa_backward_flop_count(*shapes[:4])
        ),
    }
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    current, phase, seen, seen_adapter = "other", 0, 0, 0

    def enter(part: str) -> None:
        nonlocal current, seen, seen_adapter
        total = counter.get_total_flops()
        counts[current][phase] += total - seen - (adapter - seen_adapter)
        counts["adapter"][phase] += adapter - seen_adapter
        current, seen, seen_adapter = part, total, adapter

    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    counter.mod_tracker = _Untracked()  # type: ignore[assignment]
    with counter, _parts(guide, enter):
        loss = step()
        enter("other")
        phase = 1
        loss.backward()
        enter("other")
    return {part: (forward, backward) for part, (forward, backward) in counts.items() if forward + backward}


class _Untracked:
    """Stands for the counter's tracker of modules, whose hooks keep recomputed tensors alive and so spoil a tally."""

    parents: ClassVar = {"Global"}

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


@contextmanager
def _parts(guide: PosteriorGuide, enter: Callable[[str], None]) -> Iterator[None]:
    """Call `enter` with the name of each part of a step that begins, and with "other" after its forward pass."""
    model = guide.vlm.model
    modules = {
        "tower": model.model.vision_tower,
        "projector": model.model.multi_modal_projector,
        "decoder": guide.vlm.decoder,
        "head": model.lm_head,
        "bottleneck": guide.bottleneck,
    }
    passes = 0
    handles = []

    def attach(name: str, module: nn.Module) -> None:
        part = name

        def before(module: nn.Module, inputs: object) -> None:
            nonlocal part, passes
            if name == "decoder":
                passes += 1
                part = f"decoder, pass {passes}"
            enter(part)

        def after(module: nn.Module, inputs: object, output: object) -> None:
            enter("other")
            output = getattr(output, "last_hidden_state", output)
            here = part
            tensors: list[Any] = list(output) if isinstance(output, tuple) else [output]
            for tensor in tensors:
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: enter(here))

        handles.extend([module.register_forward_pre_hook(before), module.register_forward_hook(after)])

    for name, module in modules.items():
        attach(name, module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class LiveBytes(TorchDispatchMode):
    """Tallies the tensors alive while it is on: bytes of their storages, shared ones once.

    A machine-independent stand-in for the peak of a CUDA allocator. Kernels' scratch memory is not seen.

    Args:
        modules: whose parameters, gradients and buffers are there from the beginning.
    """

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        self.bytes = 0
        """Of the tensors alive now."""
        for module in modules:
            for tensor in [*module.parameters(), *module.buffers()]:
                self._take(tensor)
                if tensor.grad is not None:
                    self._take(tensor.grad)
        self.start = self.peak = self.bytes
        """Bytes at the beginning, and the most since."""

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """Run an operation and take its results into the tally."""
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, tuple | list) else [results]:
            if isinstance(result, Tensor):
                self._take(result)
        self.peak = max(self.peak, self.bytes)
        return results

    def _take(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._alive.get(key)
        if known is not None and known[0]() is storage:
            return

        def drop(reference: weakref.ref[torch.UntypedStorage]) -> None:
            # The address may be another storage's by now.
            if (mine := self._alive.get(key)) is not None and mine[0] is reference:
                self.bytes -= self._alive.pop(key)[1]

        self._alive[key] = (weakref.ref(storage, drop), storage.nbytes())
        self.bytes += storage.nbytes()
