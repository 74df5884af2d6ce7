"""What a family of vision-language models says of itself, and all that the rest of the package knows of a model.

Guides, pruners, data and evaluation ask a `VLM` and its `Processor`; only the families' own files know transformers'
module names. A family whose visual tokens are merged overrides `visual_tokens` and brings a tile rule with a grid
of its own; positions of one axis are laid out in `slots.py`, which is where several axes would come in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.import_utils import is_flash_attn_2_available

from pgp_lightning.errors import ConfigError
from pgp_lightning.vlm.processor import ChatTemplate, Processor
from pgp_lightning.vlm.settings import Setting
from pgp_lightning.vlm.tiles import TileRule

__all__ = ["VLM", "Attention", "Facts", "check_pair", "choose_attention", "load_whole", "without_wrapper"]

Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]


class Facts(NamedTuple):
    """What a checkpoint's own files say, the tokenizer apart."""

    rule: TileRule
    template: ChatTemplate
    max_length: int


class VLM(ABC):
    """A model seen from outside: its parts by name, its processor, where it came from.

    Args:
        model: transformers' own model, unmodified.
        processor: its processor; a model without one can be pruned, and that is all.
        base: where it came from.
    """

    family: ClassVar[str]
    mean: ClassVar[tuple[float, float, float]]
    std: ClassVar[tuple[float, float, float]]
    # What a vision layer calls its self-attention.
    vision_attention_name: ClassVar[str] = "self_attn"
    # Full module paths: vision towers have projections of the same names and stay as they are.
    adapter_targets: ClassVar[str] = (
        r"(.*\.)?language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
    )

    def __init__(self, model: Any, processor: Processor | None, base: str) -> None:  # noqa: ANN401 (transformers' classes)
        self.model, self.base = without_wrapper(model), base
        self._processor = processor

    @property
    def processor(self) -> Processor:
        """Tokenizer, tile rule and chat format.

        Raises:
            ConfigError: if the model came without.
        """
        if self._processor is None:
            raise ConfigError(
                f"{self.base} has no processor: load it with load_vlm, or make VLM(model, processor, base)"
            )
        return self._processor

    @processor.setter
    def processor(self, processor: Processor) -> None:
        self._processor = processor

    @classmethod
    @abstractmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        """Say whether a folder's `config.json` is of this family."""

    @classmethod
    @abstractmethod
    def facts(cls, folder: Path, config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> Facts:
        """Read tile rule, chat format and length limit from a checkpoint's own files.

        Raises:
            ConfigError: if the checkpoint is of a kind that is not supported.
        """

    @classmethod
    def settings(
        cls, folder: Path, config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None
    ) -> dict[str, Setting]:
        """Return by name what `facts` took from files that might say it, and from which.

        Raises:
            ConfigError: if files contradict each other, or none says it.
        """
        return {}

    @classmethod
    @abstractmethod
    def load_model(
        cls, folder: Path, config: Mapping[str, Any], processor: Processor, dtype: torch.dtype, attention: str
    ) -> PreTrainedModel:
        """Load the weights (safetensors only)."""

    @classmethod
    @abstractmethod
    def is_family_of(cls, model: nn.Module) -> bool:
        """Say whether a model in memory is of this family."""

    @abstractmethod
    def as_features(self, visual: Tensor) -> Any:  # noqa: ANN401
        """Lay visual tokens (T, n, d) out as the family's own `get_image_features` returns them."""

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """Run vision tower and projector: normalised pixels (T, 3, S, S) to visual tokens (T, n, d)."""

    @contextmanager
    def skipping_tiles(self, needed: Tensor) -> Iterator[None]:
        """While open, tiles that are not needed, bool (T,), pass the vision tower by; their visual tokens are zero.

        For families whose tower encodes every tile by itself. Raises ConfigError if the tower gets another number.
        """

        def drop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
            pixels: Tensor = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
            if len(pixels) != len(needed):
                raise ConfigError(f"the model got {len(pixels)} tiles and the guide scored {len(needed)}")
            some = pixels[needed.to(pixels.device)]
            return ((some, *args[1:]), kwargs) if args else (args, kwargs | {"pixel_values": some})

        def spread(module: nn.Module, args: object, output: Tensor) -> Tensor:
            full = output.new_zeros(len(needed), *output.shape[1:])
            full[needed.to(output.device)] = output
            return full

        hooks = (
            self.vision_tower.register_forward_pre_hook(drop, with_kwargs=True),
            self.projector.register_forward_hook(spread),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @property
    def body(self) -> nn.Module:
        """The model without its head: it embeds ids and pictures, and runs the decoder."""
        body: nn.Module = self.model.model
        return body

    @property
    def decoder(self) -> nn.Module:
        """The language model without its head."""
        decoder: nn.Module = self.model.model.language_model
        return decoder

    @property
    def decoder_layers(self) -> nn.ModuleList:
        """The language model's layers, first to last."""
        layers: nn.ModuleList = self.model.model.language_model.layers
        return layers

    @property
    def head(self) -> nn.Module:
        """What turns hidden states into logits."""
        head: nn.Module = self.model.lm_head
        return head

    @property
    def vision_tower(self) -> nn.Module:
        """The vision tower without the projector."""
        tower: nn.Module = self.model.model.vision_tower
        return tower

    @property
    def projector(self) -> nn.Module:
        """What maps the vision tower's features to visual tokens."""
        projector: nn.Module = self.model.model.multi_modal_projector
        return projector

    @property
    @abstractmethod
    def vision_layers(self) -> nn.ModuleList:
        """The vision tower's layers, first to last."""

    def vision_attention(self, layer: int) -> nn.Module:
        """Return the self-attention of a vision layer, by its index, which may count from the end.

        Raises:
            ConfigError: if there is no such layer.
        """
        count = len(self.vision_layers)
        if not -count <= layer < count:
            raise ConfigError(f"there is no vision layer {layer}: the tower has {count}")
        return self.vision_layers[layer].get_submodule(self.vision_attention_name)

    @property
    def width(self) -> int:
        """Hidden size d of the language model."""
        return int(self.model.get_input_embeddings().get_parameter("weight").shape[1])

    def visual_slots(self, ids: Tensor) -> Tensor:
        """Return which prompt slots hold visual tokens: int64 ids (B, N) to bool (B, N)."""
        slots: Tensor = ids == self.model.config.image_token_id
        return slots

    def visual_tokens(self, tiles: Tensor) -> Tensor:
        """Encode and project tiles: uint8 (T, 3, S, S) to visual tokens (T, n, d) in the model's dtype.

        Raises:
            ConfigError: if tiles are of another size than the model's.
        """
        if self._processor is not None and tiles.shape[-1] != self._processor.rule.tile_size:
            raise ConfigError(
                f"{self.base} takes tiles of {self._processor.rule.tile_size} pixels, got {tiles.shape[-1]}: "
                "tile the images by its own rule; guide and answer model must be of one family"
            )
        return self.encode(self.normalise(tiles, self.model.dtype))

    @classmethod
    def normalise(cls, tiles: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Turn uint8 tiles (T, 3, S, S) into the pixels the vision tower was trained on, on the tiles' device."""
        mean = torch.tensor(cls.mean, device=tiles.device).view(3, 1, 1)
        std = torch.tensor(cls.std, device=tiles.device).view(3, 1, 1)
        return ((tiles.to(torch.float32) / 255 - mean) / std).to(dtype)


def without_wrapper(model: Any) -> Any:  # noqa: ANN401 (transformers' classes)
    """Return the model inside peft's wrapper, its adapter's layers in place; any other model as it is."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model


def load_whole(kind: type[PreTrainedModel], folder: Path, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """Load a checkpoint in transformers' layout, all of it and nothing else.

    transformers itself draws random numbers for weights that a checkpoint lacks.

    Raises:
        ConfigError: if weights are missing, unknown, of another shape, or not in safetensors files.
    """
    load: Any = kind.from_pretrained  # whose types do not know that loading information comes with the model
    try:
        model, found = load(
            folder, dtype=dtype, attn_implementation=attention, use_safetensors=True, output_loading_info=True
        )
    except (OSError, RuntimeError, ImportError, ValueError) as error:
        reason = " ".join(str(error).split())[:400]
        raise ConfigError(f"{folder} does not load as {kind.__name__}: {reason}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if wrong := sorted(map(str, found[what])):
            named = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
            raise ConfigError(
                f"{folder} has {what.replace('_', ' ')}: {named}; copy or download the whole folder again"
            )
    whole: PreTrainedModel = model
    return whole


def choose_attention(wanted: Attention, dtype: torch.dtype) -> str:
    """Return the attention implementation to ask transformers for.

    `auto` is flash-attn where transformers finds it usable, with a CUDA device of compute capability 8 or more and half
    precision; else it is torch's own scaled dot product attention.

    Raises:
        ConfigError: if flash attention is asked for and cannot run here.
    """
    reasons = []
    if find_spec("flash_attn") is None:
        reasons.append("flash-attn is not installed (pip install 'pgp-lightning[flash]')")
    if not torch.cuda.is_available():
        reasons.append("there is no CUDA device")
    elif torch.cuda.get_device_capability() < (8, 0):
        reasons.append("the device is older than compute capability 8.0")
    elif not reasons and not is_flash_attn_2_available():
        reasons.append("transformers finds the installed flash-attn too old or broken")
    if dtype not in (torch.bfloat16, torch.float16):
        reasons.append(f"dtype is {str(dtype).removeprefix('torch.')}, not bfloat16")
    if wanted == "auto":
        return "sdpa" if reasons else "flash_attention_2"
    if wanted == "flash_attention_2" and reasons:
        raise ConfigError(f"attention: flash_attention_2 cannot run here: {'; '.join(reasons)}; use auto or sdpa")
    return wanted


def check_pair(guide: Processor, answer_model: Processor) -> None:
    """Check that a guide's scores can be laid on an answer model's visual tokens: same tiles, same grid, same order.

    Tokenizers, chat formats, vision towers and widths may differ.

    Raises:
        ConfigError: names what differs.
    """
    ours, theirs = guide.rule, answer_model.rule
    differ = [
        f"{name} is {getattr(ours, name)!r} for the guide and {getattr(theirs, name)!r} for the answer model"
        for name in ("tile_size", "tokens_per_side", "fit", "thumbnail", "min_tiles", "max_tiles", "padding")
        if getattr(ours, name) != getattr(theirs, name) and (name != "padding" or ours.fit == theirs.fit == "pad")
    ]
    if differ:
        raise ConfigError(
            f"guide and answer model do not share their visual tokens: {'; '.join(differ)}; "
            "pair models of one family, and give both the same tile limits"
        )
