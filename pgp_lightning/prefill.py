"""Pruning an unmodified model: a pruner rewrites the decoder's prefill state before a layer, and hooks carry it out.

From the first layer whose prompt was cut, each decoder layer gets the remaining slots, their rotary positions and a
mask of its own; layers that see the whole prompt are left to the model, so that pruning nothing changes no bit. Each
layer's key-value cache then holds its own prompt. During decoding, a layer with a cut prompt gets a mask that suits
its own cache. Rows that keep different counts are padded on the left, so the last slot stays the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from pgp_lightning.errors import ConfigError
from pgp_lightning.prefill_driver import Driver, Run
from pgp_lightning.prefill_guard import alone, generation_awaited, refuse_compiled, refuse_virtual_tokens
from pgp_lightning.prefill_inputs import Announced
from pgp_lightning.pruner import KeepAll, Pruner
from pgp_lightning.vlm.family import VLM
from pgp_lightning.vlm.loading import as_vlm
from pgp_lightning.vlm.request import Request

__all__ = ["KeepAll", "Pruner", "Run", "pruned"]


@contextmanager
def pruned(
    model: Any,  # noqa: ANN401 (transformers' classes, peft's, ours)
    pruner: Pruner,
    inputs: Mapping[str, Any],
    request: Request | None = None,
    visual: Tensor | None = None,
) -> Iterator[Run]:
    """While open, calls of the model, `generate` among them, prune these inputs; the model itself stays as it is.

        with pruned(model, pruner, inputs, request):
            model.generate(**inputs)

    Other inputs are refused. What follows the prompt is text and stays: generated tokens, guesses of assisted decoding,
    a known answer, the next turn. Leaving waits for threads that generate.

    Args:
        model: a `VLM`, transformers' InternVL or LLaVA, or a `PeftModel` around one.
        pruner: what to drop, and where.
        inputs: all that the model will be called with: `input_ids` and `attention_mask`, padded on the left to
            generate, and the pictures.
        request: the same questions as strings and tiles, for pruners whose guide reads them.
        visual: bool (B, N), the slots of visual tokens, where `inputs` holds embeddings in place of ids.

    Yields:
        A `Run`, filled by every prefill.

    Raises:
        ConfigError: if the model cannot be pruned in this way, is being pruned already, or inputs, request and pruner
            do not fit each other; from a call of the model, if it is not the announced one; at the end, if no call was
            pruned.
    """
    refuse_compiled(model.model if isinstance(model, VLM) else model)
    refuse_virtual_tokens(model)
    vlm = model if isinstance(model, VLM) else as_vlm(model)
    layers = vlm.decoder_layers
    config: Any = vlm.decoder.config
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if windowed else "full_attention"])
    if kinds != {"full_attention"}:
        raise ConfigError(f"pruning needs full attention in every decoder layer, got {', '.join(sorted(kinds))}")
    if beyond := [depth for depth in pruner.layers if not 0 <= depth < len(layers)]:
        raise ConfigError(f"cannot prune before layer {beyond[0]}: the model has the layers 0 to {len(layers) - 1}")
    driver = Driver(vlm, pruner, Announced(vlm, inputs, request, visual))
    with (
        alone(vlm),
        pruner.attached(vlm, inputs, request),
        driver.attached(),
        generation_awaited(vlm.model, driver.asked),
    ):
        yield driver.run
    if not driver.calls:
        raise ConfigError(
            "nothing was pruned: no call of this model ran its hooks inside pruned(). If another object was called, "
            "a compiled copy say, its answer is the whole model's; call the model that pruned() was given"
        )
