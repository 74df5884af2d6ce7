"""One pruner at a time, hooks that run, and threads that are done before the hooks are gone."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import TextIteratorStreamer

from pgp_lightning.errors import ConfigError
from pgp_lightning.prefill import KeepAll, Pruner, pruned
from pgp_lightning.prefill_driver import Driver
from pgp_lightning.prefill_inputs import Announced
from pgp_lightning.pruners.fastv import FastV
from pgp_lightning.pruners.guided import Guided
from pgp_lightning.pruners.vision_zip import VisionZip
from pgp_lightning.vlm.decoder_call import cache_keyword, cache_of_output
from pgp_lightning.vlm.inputs import prompt_inputs
from pgp_lightning.vlm.loading import as_vlm
from tests.tiny import row_of
from tests.unit.prefill.made import FAMILIES, Given, Masks, ask, build, hooks, random_masks, shared, without_stop

TWO = r"this model is inside a pruned\(\) already, here or in another thread"


def world(fresh: bool = False, family: str = "internvl") -> tuple[Any, Any, Any]:
    vlm = build(family) if fresh else shared(family)
    request = row_of(ask(vlm), 2)
    return vlm, prompt_inputs(vlm, request), request


@pytest.mark.parametrize("wrapper", ["itself", "the bare model", "another object", "an adapter"])
def test_a_second_pruner_on_a_model_is_refused_whatever_it_comes_in(wrapper: str):
    vlm, inputs, request = world(fresh=True)
    other: Any = {"itself": vlm, "the bare model": vlm.model, "another object": as_vlm(vlm.model)}.get(wrapper)
    if other is None:
        other = get_peft_model(vlm.model, LoraConfig(r=2, target_modules=vlm.adapter_targets))
    for outer, inner in ((vlm, other), (other, vlm)):
        with pruned(outer, Guided(Given(), 2, 0.3), inputs, request):
            expected = without_stop(vlm, inputs).sequences
            with pytest.raises(ConfigError, match=TWO), pruned(inner, FastV(3, 0.5), inputs, request):
                pass
            # The first goes on, and the second did not take its place.
            assert torch.equal(without_stop(vlm, inputs).sequences, expected)
            with pytest.raises(ConfigError, match=TWO), pruned(inner, FastV(3, 0.5), inputs, request):
                pass
    with pruned(other, FastV(3, 0.5), inputs, request):
        without_stop(vlm, inputs)


def test_of_two_threads_that_prune_one_model_one_is_refused():
    vlm, inputs, request = world()
    with pruned(vlm, Guided(Given(), 2, 0.3), inputs, request):
        expected = without_stop(vlm, inputs).sequences
    found: list[Any] = []
    gate = threading.Barrier(2)

    def serve() -> None:
        gate.wait()
        try:
            with pruned(vlm, Guided(Given(), 2, 0.3), inputs, request):
                found.append(without_stop(vlm, inputs, max_new_tokens=8).sequences[:, : expected.shape[1]])
                barrier.wait(60)
        except ConfigError as error:
            found.append(str(error))
            barrier.wait(60)

    barrier = threading.Barrier(2)
    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    texts = [part for part in found if isinstance(part, str)]
    (tokens,) = [part for part in found if not isinstance(part, str)]
    assert len(texts) == 1 and texts[0].startswith("this model is inside a pruned() already")
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("depth", [0, 2])
def test_threads_may_generate_at_once_inside_one_pruned(depth: int):
    vlm, inputs, request = world()
    pruner = Masks({depth: random_masks(request, 0.4)}, renumber=depth)
    found: dict[int, Any] = {}

    def serve(name: int) -> None:
        found[name] = without_stop(vlm, inputs, max_new_tokens=8 + name).sequences

    with pruned(vlm, pruner, inputs, request):
        expected = without_stop(vlm, inputs, max_new_tokens=11).sequences
        threads = [threading.Thread(target=serve, args=(name,)) for name in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert sorted(found) == [0, 1, 2]
    assert all(torch.equal(tokens, expected[:, : tokens.shape[1]]) for tokens in found.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("early", [False, True])
def test_a_stream_is_right_also_if_it_is_left_before_its_end(early: bool, family: str):
    vlm, inputs, request = world(family=family)
    pruner = Guided(Given(), 0, 0.3)
    with pruned(vlm, pruner, inputs, request):
        expected = vlm.model.generate(**inputs, max_new_tokens=20, do_sample=False, pad_token_id=0)
    before = hooks(vlm.model)
    streamer = TextIteratorStreamer(vlm.processor.tokenizer, skip_prompt=True, timeout=60)
    tokens: list[Any] = []
    started = threading.Event()

    def run() -> None:
        options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "streamer": streamer}
        tokens.append(vlm.model.generate(**inputs, **options))

    handle = vlm.decoder.register_forward_hook(lambda *_: started.set())
    thread = threading.Thread(target=run)
    with pruned(vlm, pruner, inputs, request):
        thread.start()
        assert started.wait(60)
        pieces = [] if early else list(streamer)
    # Whoever leaves early has waited: nothing runs any more.
    assert tokens and hooks(vlm.model)[1:] != [] and "generate" not in vars(vlm.model)
    handle.remove()
    assert hooks(vlm.model) == before
    pieces += list(streamer) if early else []
    thread.join(60)
    assert torch.equal(tokens[0], expected)
    assert "".join(pieces) == vlm.processor.tokenizer.decode(expected[0, inputs["input_ids"].shape[1] :])


@torch.no_grad()
def test_a_loop_of_ones_own_in_a_thread_ends_its_call_and_is_refused_behind_the_end():
    vlm, inputs, request = world()
    inside, go_on, left, said = threading.Event(), threading.Event(), threading.Event(), list[Any]()

    def wait(*_: Any) -> None:
        inside.set()
        go_on.wait(60)

    def run() -> None:
        with torch.no_grad():
            out = vlm.model(**inputs)
            said.append(out.logits[:, -1])
            left.wait(60)
            try:
                vlm.model(input_ids=said[0].argmax(dim=-1)[:, None], **{cache_keyword(vlm.model): cache_of_output(out)})
            except ConfigError as error:
                said.append(str(error))

    pruner = Masks({1: random_masks(request, 0.4)})
    with pruned(vlm, pruner, inputs, request):
        expected = vlm.model(**inputs).logits[:, -1]
        handle = vlm.decoder_layers[2].register_forward_pre_hook(wait)
        thread = threading.Thread(target=run)
        thread.start()
        assert inside.wait(60)
        threading.Timer(0.2, go_on.set).start()
    # The call that was running kept its hooks to its end.
    left.set()
    thread.join(60)
    handle.remove()
    assert torch.equal(said[0], expected) and "cache holds a prompt that pruned() has cut" in said[1]


def test_leaving_after_an_error_waits_for_nobody():
    vlm, inputs, request = world()
    inside, go_on = threading.Event(), threading.Event()
    handle = vlm.decoder_layers[4].register_forward_hook(lambda *_: inside.set())
    thread = threading.Thread(target=lambda: without_stop(vlm, inputs, stopping_criteria=[Held(go_on)]))
    with pytest.raises(KeyError), pruned(vlm, KeepAll(), inputs, request):
        thread.start()
        assert inside.wait(60)
        raise KeyError
    assert thread.is_alive()
    go_on.set()
    thread.join(60)
    handle.remove()


class Held:
    """A stopping criterion that waits."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        self.event.wait(60)
        return torch.ones(len(input_ids), dtype=torch.bool)


def compiled(how: str) -> tuple[Any, Any, Any, Any]:
    """A model that torch.compile took something of; nothing is compiled before it is called."""
    vlm, inputs, request = world(fresh=True)
    model = vlm.model
    if how == "all of it":
        model.compile(backend="eager")
    elif how == "a layer":
        vlm.decoder_layers[1].compile(backend="eager")
    elif how == "the decoder":
        model.model.language_model = torch.compile(vlm.decoder, backend="eager")
    elif how == "its forward":
        model.forward = torch.compile(model.forward, backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    return vlm, model, inputs, request


@pytest.mark.parametrize("how", ["all of it", "a layer", "the decoder", "its forward", "a copy"])
def test_compiled_models_are_refused(how: str):
    vlm, model, inputs, request = compiled(how)
    message = r"is compiled, and compiled code does not run the hooks that prune: give pruned\(\) the model as it was"
    for one in {"a copy": (model,)}.get(how, (model, vlm, as_vlm(vlm.model))):
        with pytest.raises(ConfigError, match=message), pruned(one, KeepAll(), inputs, request):
            pass


def test_a_run_without_a_call_is_an_error():
    vlm, inputs, request = world()
    another = copy.deepcopy(vlm.model)
    with (
        pytest.raises(ConfigError, match="nothing was pruned: no call of this model ran its hooks"),
        pruned(vlm, Guided(Given(), 0, 0.3), inputs, request),
    ):
        another.generate(**inputs, max_new_tokens=1)


class Passing(nn.Module):
    """A layer that is called without its hooks, as compiled code might."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inner = [layer]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner[0].forward(*args, **kwargs)


@pytest.mark.parametrize("depth", [0, 2, 4])
def test_a_layer_whose_hooks_do_not_run_is_noticed(depth: int):
    vlm, inputs, request = world(fresh=True)
    pruner: Pruner = Masks({4: random_masks(request, 0.4)})
    message = f"{depth} of the first {depth + 1} decoder layers ran their hooks"
    with pruned(vlm, pruner, inputs, request):
        vlm.decoder_layers[depth] = Passing(vlm.decoder_layers[depth])
        with pytest.raises(ConfigError, match=message):
            without_stop(vlm, inputs)


def test_the_decoder_by_itself_is_refused():
    vlm, inputs, request = world()
    with pruned(vlm, KeepAll(), inputs, request), pytest.raises(ConfigError, match="decoder was called by itself"):
        vlm.decoder(inputs_embeds=torch.zeros(1, 4, vlm.width))


@pytest.mark.parametrize("kind", [PrefixTuningConfig, PromptTuningConfig])
def test_adapters_with_virtual_tokens_are_refused(kind: Any):
    vlm, inputs, request = world(fresh=True)
    vlm.model.config.vocab_size = 64  # peft asks for it on the outer configuration
    layers = {"num_layers": 5, "token_dim": 48, "num_attention_heads": 4} if kind is PrefixTuningConfig else {}
    wrapped = get_peft_model(vlm.model, kind(task_type="CAUSAL_LM", num_virtual_tokens=3, **layers))
    name = "PREFIX_TUNING" if kind is PrefixTuningConfig else "PROMPT_TUNING"
    message = f"the adapter is {name}, whose virtual tokens come before the prompt"
    with pytest.raises(ConfigError, match=message), pruned(wrapped, KeepAll(), inputs, request):
        pass


def test_a_call_that_comes_too_late_or_is_broken_off_keeps_nobody_waiting():
    vlm, inputs, _ = world()
    driver = Driver(vlm, KeepAll(), Announced(vlm, inputs, None, None))

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = vlm.decoder_layers[1].register_forward_pre_hook(interrupt)
    with driver.attached(), pytest.raises(KeyboardInterrupt):
        vlm.model(**inputs)
    handle.remove()
    said: list[str] = []

    def come_late() -> None:
        try:
            driver._enter(vlm.body, (), dict(inputs))
        except ConfigError as error:
            said.append(str(error))

    threads = [threading.Thread(target=come_late, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(said) == 2 and all("pruned() was left while a thread was calling the model" in text for text in said)


def test_a_thread_that_begins_to_generate_after_the_end_is_refused():
    vlm, inputs, request = world()
    with pruned(vlm, Guided(Given(), 0, 0.3), inputs, request):
        without_stop(vlm, inputs)
        # As Thread(target=model.generate) holds it.
        generate = vlm.model.generate
    with pytest.raises(ConfigError, match="left before this thread began to generate, and the whole model would answe"):
        generate(**inputs, max_new_tokens=2)
    assert len(vlm.model.generate(**inputs, max_new_tokens=2)) == 1


def test_a_configuration_given_by_place_is_looked_at_as_well():
    vlm, inputs, request = world()
    config = copy.deepcopy(vlm.model.generation_config)
    config.assistant_early_exit = 2
    with (
        pruned(vlm, Guided(Given(), 0, 0.3), inputs, request),
        pytest.raises(ConfigError, match="assistant_early_exit drafts with the first layers"),
    ):
        vlm.model.generate(inputs["input_ids"], config)


@torch.no_grad()
def test_no_cache_outlives_its_output():
    vlm, inputs, request = world()
    with pruned(vlm, Masks({1: random_masks(request, 0.4)}), inputs, request):
        cache = weakref.ref(cache_of_output(vlm.model(**inputs)))
        gc.collect()
        assert cache() is None


@torch.no_grad()
def test_threads_may_encode_at_once_what_the_tower_is_asked_for():
    vlm, inputs, request = world()
    pruner = VisionZip(0.4)
    both = threading.Barrier(2)
    found: list[Any] = []

    def serve() -> None:
        found.append(without_stop(vlm, inputs).sequences)  # `generate` encodes before it calls the model

    handle = vlm.projector.register_forward_pre_hook(lambda *_: (both.wait(60), None)[1])
    with pruned(vlm, pruner, inputs, request):
        threads = [threading.Thread(target=serve) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    handle.remove()
    with pruned(vlm, VisionZip(0.4), inputs, request):
        expected = without_stop(vlm, inputs).sequences
    assert len(found) == 2 and all(torch.equal(sequences, expected) for sequences in found)
