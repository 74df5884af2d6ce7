"""What has to hold of a model while it is pruned: one pruner, no compiled parts, and nobody generates when it ends."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any
from weakref import WeakSet

from torch import nn

from pgp_lightning.errors import ConfigError
from pgp_lightning.vlm.family import VLM

__all__ = ["alone", "generation_awaited", "refuse_compiled", "refuse_virtual_tokens"]

# Decoders inside `pruned`: wrappers and VLM objects of one model share theirs.
_OPEN: WeakSet[nn.Module] = WeakSet()
_OPENING = threading.Lock()


@contextmanager
def alone(vlm: VLM) -> Iterator[None]:
    """While open, nobody else may prune this model.

    Raises:
        ConfigError: if somebody does.
    """
    decoder = vlm.decoder
    with _OPENING:
        if decoder in _OPEN:
            raise ConfigError(
                "this model is inside a pruned() already, here or in another thread, and both would cut the same "
                "prompts: leave the first one before, or load the model twice"
            )
        _OPEN.add(decoder)
    try:
        yield
    finally:
        with _OPENING:
            _OPEN.discard(decoder)


def refuse_compiled(model: Any) -> None:  # noqa: ANN401 (transformers' classes, peft's)
    """Look for parts that torch.compile has taken over: compiled code may run without hooks, or keep them for ever.

    Raises:
        ConfigError: names the first.
    """
    waiting = [model] if isinstance(model, nn.Module) else []
    while waiting:
        module = waiting.pop()
        if _compiled(module):
            name = next(name for name, one in model.named_modules() if one is module)
            where = f"its {name}" if name else "the model"
            raise ConfigError(
                f"{where} ({type(module).__name__}) is compiled, and compiled code does not run the hooks that prune: "
                "give pruned() the model as it was before torch.compile, and compile nothing of it while it is pruned"
            )
        waiting += [child for child in module._modules.values() if child is not None]


def _compiled(module: nn.Module) -> bool:
    # Looked at and not asked by type: importing torch's compiler takes seconds.
    return (
        getattr(module, "_compiled_call_impl", None) is not None
        or "_orig_mod" in module._modules
        or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
    )


def refuse_virtual_tokens(model: Any) -> None:  # noqa: ANN401
    """Look for adapters that put slots of their own in front of the prompt.

    Raises:
        ConfigError: if there is one.
    """
    config: Any = getattr(model, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ConfigError(
            f"the adapter is {kind}, whose virtual tokens come before the prompt, where nobody announced them: prune "
            "with adapters of weights (LoRA and its like), or merge_and_unload another adapter first"
        )


@contextmanager
def generation_awaited(model: Any, asked: Callable[[Any, dict[str, Any]], None]) -> Iterator[None]:  # noqa: ANN401
    """While open, count who is inside the model's `generate`; at the end wait for other threads that are.

    A streamer's thread would go on with caches that nobody explains to the model any more. Only the object's `generate`
    is wrapped, which is undone at the end.

    Args:
        model: transformers' model.
        asked: called first with the generation's configuration and keywords; may refuse them.
    """
    inside: Counter[int] = Counter()
    changed, left = threading.Condition(), threading.Event()
    before, own = model.generate, vars(model).get("generate")

    @wraps(before)
    def generate(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        asked(kwargs.get("generation_config", args[1] if len(args) > 1 else None) or model.generation_config, kwargs)
        me = threading.get_ident()
        with changed:
            if left.is_set():
                raise ConfigError(
                    "pruned() was left before this thread began to generate, and the whole model would answer: start "
                    "the thread inside the `with`, and wait there until its first token has come"
                )
            inside[me] += 1
        try:
            return before(*args, **kwargs)
        finally:
            with changed:
                inside[me] -= 1
                changed.notify_all()

    model.generate = generate
    try:
        yield
        # Not after an exception: that would keep it back until others are done.
        with changed:
            changed.wait_for(lambda: not any(n for thread, n in inside.items() if thread != threading.get_ident()))
            left.set()
    finally:
        left.set()
        if own is None:
            del model.generate
        else:
            model.generate = own
