"""FLOPs of the parts of a vision-language model and of whole guides, as closed forms of the configuration.

They equal what torch's counter counts while the models run: a multiply-add is 2; linear layers, convolutions and
attention count, everything else does not; causal attention counts in full, as every query against every key. Numbers
and width of heads and key-value heads, and the gated MLP's width, are read from the configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import LlavaConfig

from pgp_lightning.errors import ConfigError
from pgp_lightning.vlm.memory import Config, tokens_per_tile

__all__ = [
    "Decoder",
    "attention_flops",
    "decode_flops",
    "head_flops",
    "layer_flops",
    "posterior_flops",
    "prefill_flops",
    "projector_flops",
    "vision_flops",
    "vision_row_flops",
]


class Decoder:
    """The sizes of a language model.

    Attributes:
        depth: number D of decoder layers.
        width: d.
        vocabulary: rows of the head.
        queries: width of all query heads together.
        keys: width of all key heads together.
        linear: FLOPs of one slot's linear layers in one decoder layer.
    """

    def __init__(self, config: Config) -> None:
        text: Any = config.text_config
        self.depth, self.width = int(text.num_hidden_layers), int(text.hidden_size)
        self.vocabulary, inner = int(text.vocab_size), int(text.intermediate_size)
        head = int(getattr(text, "head_dim", None) or self.width // text.num_attention_heads)
        self.queries, self.keys = head * int(text.num_attention_heads), head * int(text.num_key_value_heads)
        # q, k, v, o, gate, up, down: from, to.
        self._shapes = [(self.width, self.queries), (self.width, self.keys), (self.width, self.keys),
                        (self.queries, self.width), (self.width, inner), (self.width, inner),
                        (inner, self.width)]  # fmt: skip
        self.linear = 2 * sum(a * b for a, b in self._shapes)

    def adapter(self, rank: int) -> int:
        """Return the FLOPs that an unmerged adapter on all linear layers adds to one slot in one layer."""
        return 2 * rank * sum(a + b for a, b in self._shapes)

    def rows(self, count: int, slots: int, project: bool = False) -> int:
        """Return the FLOPs of recomputing rows of attention in one layer: their queries, and products with all keys.

        Args:
            count: number of rows.
            slots: number of keys.
            project: whether the keys are computed as well, where the layer has not run yet (FastV, PyramidDrop).
        """
        keys = 2 * slots * self.width * self.keys if project else 0
        return 2 * count * self.queries * (self.width + slots) + keys

    def check(self, slots: Sequence[int]) -> None:
        """Check that there is a number of slots for every layer.

        Raises:
            ConfigError: if there is not.
        """
        if len(slots) != self.depth:
            raise ConfigError(
                f"expected a number of slots for each of the {self.depth} decoder layers, got {len(slots)}"
            )


def vision_flops(config: Config, tiles: int) -> int:
    """Return the FLOPs of the vision tower: every layer, although LLaVA's projector reads the last but one."""
    vision: Any = config.vision_config
    width, patches = vision.hidden_size, _patches(config)
    patch = 2 * patches * width * vision.num_channels * _side(vision.patch_size) ** 2
    places = patches + 1  # the class token
    linear = 2 * places * (4 * width**2 + 2 * width * vision.intermediate_size)
    return int(tiles * (patch + vision.num_hidden_layers * (linear + 4 * places**2 * width)))


def vision_row_flops(config: Config, tiles: int, rows: int | None = None) -> int:
    """Return the FLOPs of recomputing attention in one layer of the vision tower: queries, keys and their products.

    Args:
        config: of the model.
        tiles: of the image.
        rows: queries of a tile; by default all, the class token's among them.
    """
    vision: Any = config.vision_config
    places, width = _patches(config) + 1, int(vision.hidden_size)
    count = places if rows is None else rows
    return tiles * 2 * width * (count * (width + places) + places * width)


def projector_flops(config: Config, tiles: int) -> int:
    """Return the FLOPs of the two layers between vision tower and language model."""
    vision: Any = config.vision_config
    joined = 1 if isinstance(config, LlavaConfig) else int(1 / config.downsample_ratio) ** 2
    width = Decoder(config).width
    return int(2 * tiles * tokens_per_tile(config) * width * (joined * vision.hidden_size + width))


def prefill_flops(config: Config, slots: Sequence[int]) -> int:
    """Return the FLOPs of the decoder layers on a prompt; the head is not among them.

    Args:
        config: of the model.
        slots: prompt slots of each decoder layer, so that any schedule can be said.

    Raises:
        ConfigError: if there is not one number for every layer.
    """
    Decoder(config).check(slots)
    return sum(layer_flops(config, n) for n in slots)


def layer_flops(config: Config, slots: int) -> int:
    """Return the FLOPs of one decoder layer on a prompt of so many slots."""
    decoder = Decoder(config)
    return int(slots * decoder.linear + 4 * slots**2 * decoder.queries)


def head_flops(config: Config, positions: int = 1) -> int:
    """Return the FLOPs of the language model's head on a number of slots; generating needs it on the last only."""
    decoder = Decoder(config)
    return int(2 * positions * decoder.width * decoder.vocabulary)


def decode_flops(config: Config, cached: Sequence[int], steps: int) -> int:
    """Return the FLOPs of decoding steps, the head included.

    Args:
        config: of the model.
        cached: entries that each layer's cache holds before the first step.
        steps: tokens that pass through the decoder; n new tokens take n - 1, as the prefill gives the first.

    Raises:
        ConfigError: if there is not one number for every layer.
    """
    decoder = Decoder(config)
    decoder.check(cached)
    seen = steps * sum(cached) + decoder.depth * steps * (steps + 1) // 2  # step t sees t - 1 earlier ones and itself
    return int(steps * decoder.depth * decoder.linear + 4 * seen * decoder.queries) + head_flops(config, steps)


def posterior_flops(config: Config, tiles: int, text: int, *, lora_rank: int = 0, head_layers: int = 2) -> int:
    """Return the FLOPs of the posterior guide's one pass: tower, projector, decoder, gate and variance networks.

    Args:
        config: of the guide's base.
        tiles: of the image.
        text: slots before the visual tokens; the pass is cut behind those, and has no head.
        lora_rank: of an adapter that runs beside the weights; 0 if merged.
        head_layers: depth of the gate and variance networks.
    """
    decoder, visual = Decoder(config), tiles * tokens_per_tile(config)
    slots = visual + text
    adapter = decoder.depth * slots * decoder.adapter(lora_rank)
    networks = 2 * head_layers * 2 * visual * decoder.width**2
    encoded = vision_flops(config, tiles) + projector_flops(config, tiles)
    return int(encoded + prefill_flops(config, [slots] * decoder.depth) + adapter + networks)


def attention_flops(config: Config, tiles: int, text: int, *, new_tokens: int, rows: int) -> int:
    """Return the FLOPs of a guide that answers and sums the attention paid to visual tokens on the way (SGP).

    Beside the prefill and the decoding of its answer, every layer recomputes rows of attention, of the prompt's last
    slots and of each token decoded. A model that writes its attention out needs no recomputation.

    Args:
        config: of the guide.
        tiles: of the image.
        text: slots of text.
        new_tokens: length of its answer; the last token is never read.
        rows: of the prompt that are recomputed: the text behind the visual tokens, with the release one more.
    """
    decoder, steps = Decoder(config), new_tokens - 1
    slots = tiles * tokens_per_tile(config) + text
    again = decoder.rows(rows, slots) + sum(decoder.rows(1, slots + t) for t in range(1, new_tokens))
    encoded = vision_flops(config, tiles) + projector_flops(config, tiles)
    prompt = [slots] * decoder.depth
    answer = prefill_flops(config, prompt) + head_flops(config) + decode_flops(config, prompt, steps)
    return int(encoded + answer + decoder.depth * again)


def _side(value: int | Sequence[int]) -> int:
    return value if isinstance(value, int) else value[0]


def _patches(config: Config) -> int:
    vision: Any = config.vision_config
    return int(_side(vision.image_size) // _side(vision.patch_size)) ** 2
