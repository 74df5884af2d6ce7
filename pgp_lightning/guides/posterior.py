"""Posterior-guided pruning: a small VLM scores visual tokens by KL(posterior || prior) given the question.

Paper: "Posterior-Guided Visual Token Pruning" (PGP; also published as IF-Prune), Sections 3.2-3.3, Equations 1-5,
Figure 2. Where it leaves room (prompt order of the reconstruction pass, depth of the heads, LoRA targets) the choice
is an argument; README.md lists them.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from pgp_lightning.bottleneck import GaussianBottleneck, Posterior, check_biases
from pgp_lightning.errors import ConfigError
from pgp_lightning.guides.base import Guide, evaluating
from pgp_lightning.vlm.decoder_call import decode_states, recompute_layers
from pgp_lightning.vlm.family import VLM, Attention
from pgp_lightning.vlm.loading import load_vlm, packaged
from pgp_lightning.vlm.processor import PromptOrder
from pgp_lightning.vlm.request import Request
from pgp_lightning.vlm.slots import Slots, lay_out

__all__ = ["BottleneckPass", "PosteriorGuide", "Reconstruction", "Subset", "check_numbers"]

METHOD_VERSION = 1


class Subset(NamedTuple):
    """A share of each row's visual tokens, at their original positions."""

    kept: Tensor
    """int64 (B, m), ascending."""
    mask: Tensor
    """bool (B, m), False on padding."""


class BottleneckPass(NamedTuple):
    """What the first pass finds out; m visual tokens a row, padded."""

    posterior: Posterior
    divergence: Tensor
    """D, float32 (B, m)."""
    mask: Tensor
    """bool (B, m), True on visual tokens."""
    states: Tensor
    """V', (B, m, d): the last hidden states at the visual slots."""


class Reconstruction(NamedTuple):
    """What the second pass predicts at the S supervised tokens of the batch."""

    logits: Tensor
    """float32 (S, V)."""
    targets: Tensor
    """int64 (S,)."""
    rows: Tensor
    """int64 (S,), the row of each."""

    def right(self, batch: int) -> Tensor:
        """Return of which of a number of rows every supervised token is the argmax: bool (batch,)."""
        wrong = self.logits.argmax(dim=-1) != self.targets
        return torch.bincount(self.rows[wrong], minlength=batch) == 0


class PosteriorGuide(Guide):
    """A small VLM with LoRA on its language model and a Gaussian bottleneck on its visual states.

    Args:
        base: the small VLM: `embedded:guide`, a local folder, or a repository on the hub (docs/models.md says what
            loads); from Python also a model in memory, which `dtype` and `attention` then leave as it is.
        lora_rank: rank of the adapter; 0 trains the bottleneck alone.
        lora_alpha: scale of the adapter (the update is multiplied by alpha / rank).
        lora_dropout: dropout in front of the adapter, in training.
        gate: activation of the gate network (Eq. 3): sigmoid, or exp (the paper's ablation).
        learned_prior: whether the prior's mean and variance are trained.
        head_layers: depth of the gate and variance networks.
        gate_bias: where the gate network's output starts; between -16.6 and 16.6, or 8 with exp.
        log_variance_bias: where the log-variance network's output starts; between -12 and 6.
        bottleneck_order: prompt order of the first pass; `image_first` cannot see the question and is for controls.
        reconstruction_order: prompt order of the second pass.
        dtype: of the frozen weights and the passes; bottleneck and losses are float32 always.
        attention: attention implementation of transformers; `auto` is flash-attn where it can run, else sdpa.
        gradient_checkpointing: recompute decoder layers in the backward pass to save memory.

    Raises:
        ConfigError: if the base cannot be loaded or has no layer that the adapter matches, or a number is one with
            which nothing would be learned.
    """

    def __init__(
        self,
        base: str | VLM = "embedded:guide",
        lora_rank: int = 32,
        lora_alpha: int = 64,
        lora_dropout: float = 0.05,
        gate: Literal["sigmoid", "exp"] = "sigmoid",
        learned_prior: bool = True,
        head_layers: Literal[1, 2] = 2,
        gate_bias: float = 0.0,
        log_variance_bias: float = -2.0,
        bottleneck_order: PromptOrder = "question_first",
        reconstruction_order: PromptOrder = "question_first",
        dtype: Literal["float32", "bfloat16"] = "float32",
        attention: Attention = "auto",
        gradient_checkpointing: bool = False,
    ) -> None:
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        check_numbers(arguments)
        self.arguments: dict[str, Any] = {**arguments, "base": base if isinstance(base, str) else base.base}
        self.bottleneck_order, self.reconstruction_order = bottleneck_order, reconstruction_order
        self.vlm = load_vlm(base, getattr(torch, dtype), attention) if isinstance(base, str) else base
        self.base_fingerprint = _fingerprint(self.vlm.model)
        self.vlm.model.requires_grad_(False)
        if gradient_checkpointing:
            recompute_layers(self.vlm.decoder)
        self.model: nn.Module = self.vlm.model
        if lora_rank:
            config = LoraConfig(
                r=lora_rank, lora_alpha=lora_alpha, lora_dropout=lora_dropout, target_modules=self.vlm.adapter_targets
            )
            try:
                self.model = get_peft_model(self.vlm.model, config)
            except ValueError as error:
                raise ConfigError(f"the adapter matches no layer of {self.vlm.base!r}: {error}") from error
            self.model.peft_config["default"].base_model_name_or_path = self.vlm.base  # not where this machine has it
        self.bottleneck = GaussianBottleneck(
            self.vlm.width,
            gate=gate,
            learned_prior=learned_prior,
            head_layers=head_layers,
            gate_bias=gate_bias,
            log_variance_bias=log_variance_bias,
        )
        # transformers loads in evaluation mode, in which gradient checkpointing does nothing; Lightning leaves it so.
        self.train()

    def forward(self, request: Request) -> Tensor:
        """Return D of every visual token (Sec. 3.3): float32 (B, M), -inf on padding; one pass, without dropout."""
        with torch.no_grad(), evaluating(self):
            found = self.bottleneck_pass(request, self.visual_tokens(request))
        return found.divergence.masked_fill(~found.mask, -torch.inf)

    @torch.no_grad()
    def visual_tokens(self, request: Request) -> Tensor:
        """Encode every image once and return V of each question's image: (B, M, d), zero on padding."""
        encoded = self.vlm.visual_tokens(request.tiles)
        if encoded.shape[1] != request.grids[0].tokens_per_side ** 2:
            raise ConfigError(
                f"the guide makes {encoded.shape[1]} visual tokens of a tile, the request counts "
                f"{request.grids[0].tokens_per_side ** 2}: tile images by the guide's own rule"
            )
        images = [part.flatten(0, 1) for part in encoded.split([grid.tiles for grid in request.grids])]
        return pad_sequence([images[i] for i in request.images], batch_first=True)

    def bottleneck_pass(self, request: Request, visual: Tensor, subset: Subset | None = None) -> BottleneckPass:
        """Run the first pass: X then V, cut at the last visual slot, and the bottleneck on V' (Eqs. 1-3).

        Args:
            request: the questions.
            visual: V (B, M, d).
            subset: which visual tokens take part; all by default.
        """
        processor = self.vlm.processor
        asked = zip(request.questions, request.systems, strict=True)
        prompts = [processor.prompt(question, None, self.bottleneck_order, system) for question, system in asked]
        slots = self._lay_out(prompts, request, subset, cut=True)
        states = slots.gather(self._decode(slots, _take(visual, subset)))
        posterior = self.bottleneck(states)
        return BottleneckPass(posterior, self.bottleneck.divergence(posterior), slots.visual_mask, states)

    def reconstruction_pass(
        self,
        request: Request,
        answers: list[str],
        latents: Tensor,
        subset: Subset | None = None,
        blind: bool = False,
    ) -> Reconstruction:
        """Run the second pass: the same model predicts Y with Z (Eq. 4) in the visual slots.

        Args:
            request: the questions.
            answers: B answers.
            latents: Z (B, m, d).
            subset: the visual tokens that Z stands for, as in the first pass.
            blind: leave the question out, so that Y must be read from Z alone (ours, not the paper's).
        """
        processor, order = self.vlm.processor, self.reconstruction_order
        turns = zip(request.questions, answers, request.systems, strict=True)
        prompts = [
            processor.prompt(None if blind else question, answer, order, system) for question, answer, system in turns
        ]
        slots = self._lay_out(prompts, request, subset)
        hidden = self._decode(slots, latents)
        # The head is the widest product of a step: it runs on supervised slots only.
        logits = self.vlm.head(hidden[slots.rows, slots.sources])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return Reconstruction(logits, slots.targets, slots.rows)

    def train(self, mode: bool = True) -> PosteriorGuide:
        """Set training mode; the frozen vision tower stays in evaluation mode."""
        super().train(mode)
        self.vlm.vision_tower.eval()
        return self

    def trainable(self) -> dict[str, Tensor]:
        """Return what is trained or read in place of training: adapter, heads and prior, by name."""
        kept = {name: value for name, value in self.state_dict().items() if "lora_" in name or "bottleneck." in name}
        return kept

    def save_pretrained(self, folder: Path | str, summary: dict[str, Any] | None = None) -> None:
        """Write the guide artefact: adapter, bottleneck, processor and `guide.json`.

        Args:
            folder: made if missing.
            summary: what to keep of the training.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.model, PeftModel):
            with warnings.catch_warnings():
                # peft looks for the base's config on a hub to see whether embeddings changed; they did not.
                warnings.filterwarnings("ignore", message="Could not find a config file")
                self.model.save_pretrained(str(folder), save_embedding_layers=False)
            (folder / "README.md").unlink(missing_ok=True)  # peft's model card, an empty form
        save_file(
            {k: v.detach().contiguous().cpu() for k, v in self.bottleneck.state_dict().items()},
            folder / "bottleneck.safetensors",
        )
        self.vlm.processor.save(folder)
        rule = self.vlm.processor.rule
        facts = {
            "method": "posterior",
            "method_version": METHOD_VERSION,
            "family": self.vlm.family,
            "base_fingerprint": self.base_fingerprint,
            "tokens_per_tile": rule.tokens_per_side**2,
            "tile_size": rule.tile_size,
            "arguments": self.arguments,
            "training": summary or {},
        }
        (folder / "guide.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path, **overrides: Any) -> PosteriorGuide:  # noqa: ANN401
        """Load a guide artefact, in evaluation mode.

        Args:
            folder: what `save_pretrained` wrote, or `embedded:NAME` for one that comes with the package.
            overrides: constructor arguments to change, e.g. where the base now lies.

        Raises:
            ConfigError: if the folder is no such artefact or the base is not the one the guide was trained on.
        """
        folder = packaged(str(folder), "guides") if str(folder).startswith("embedded:") else Path(folder)
        facts = _read_facts(folder)
        guide = cls(**{**facts["arguments"], **overrides})
        if guide.base_fingerprint != facts["base_fingerprint"]:
            raise ConfigError(
                f"{folder} was trained on another base: {guide.arguments['base']!r} has fingerprint "
                f"{guide.base_fingerprint}, the guide expects {facts['base_fingerprint']}; pass base= its own"
            )
        try:
            if isinstance(guide.model, PeftModel):
                guide.model.load_adapter(str(folder), "default", is_trainable=True)
            guide.bottleneck.load_state_dict(load_file(folder / "bottleneck.safetensors"))
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(f"{folder} is damaged: {reason}; export the guide again") from error
        return guide.eval()

    def _lay_out(self, prompts: list[Any], request: Request, subset: Subset | None, cut: bool = False) -> Slots:
        kept, mask = subset or (None, None)
        longest = max(
            len(prompt.before) + count + (0 if cut else len(prompt.after) + len(prompt.answer))
            for prompt, count in zip(prompts, request.counts, strict=True)
        )
        self.vlm.processor.check_length(longest, "a row of the guide")
        return lay_out(prompts, request.counts, request.tiles.device, kept=kept, kept_mask=mask, cut=cut)

    def _decode(self, slots: Slots, visual: Tensor) -> Tensor:
        """Run the decoder without its head: hidden states (B, N, d) after the final norm."""
        embeddings = slots.place(self.vlm.model.get_input_embeddings()(slots.ids), visual)
        return decode_states(self.vlm.decoder, embeddings, slots.mask, slots.positions)


def check_numbers(arguments: Mapping[str, Any]) -> None:
    """Refuse a guide's arguments if nothing would be learned with them, before any weights are loaded.

    Raises:
        ConfigError: says which number may be what.
    """
    rank, alpha, dropout = (arguments[f"lora_{name}"] for name in ("rank", "alpha", "dropout"))
    if rank < 0:
        raise ConfigError(f"lora_rank must be at least 0, got {rank}")
    if alpha < 1:
        raise ConfigError(f"lora_alpha must be at least 1, got {alpha}: lora_rank 0 leaves the adapter out")
    if not 0 <= dropout < 1:
        raise ConfigError(f"lora_dropout must be in [0, 1), got {dropout}")
    check_biases(arguments["gate"], arguments["gate_bias"], arguments["log_variance_bias"])


def _read_facts(folder: Path) -> dict[str, Any]:
    """Read an artefact's `guide.json`.

    Raises:
        ConfigError: if there is none, or it is of another method or version.
    """
    path = folder / "guide.json"
    if not path.is_file():
        raise ConfigError(f"{folder} holds no guide: expected guide.json, as written by `pgp export`")
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        method, version = facts.get("method"), facts.get("method_version")
        _ = facts["base_fingerprint"], inspect.signature(PosteriorGuide).bind(**facts["arguments"])
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error}): export the guide again") from error
    if method != "posterior" or version != METHOD_VERSION:
        raise ConfigError(
            f"{path} is of method {method!r}, version {version}; "
            f"this package reads 'posterior', version {METHOD_VERSION}"
        )
    return facts


def _take(visual: Tensor, subset: Subset | None) -> Tensor:
    if subset is None:
        return visual
    return visual.gather(1, subset.kept[..., None].expand(-1, -1, visual.shape[-1]))


def _fingerprint(model: nn.Module) -> str:
    """Tell models apart cheaply: a hash of every weight's name, shape and first values, rounded to bfloat16.

    Rounded, because a model is the same one whether it was loaded in float32 or in bfloat16.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.flatten()[:8].bfloat16().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
