"""VisionZip: the original's choices and merged tokens, scores against whole attention matrices, models by hand."""

from __future__ import annotations

from math import isqrt
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from pgp_lightning.attention import attention_rows, project_keys, project_queries
from pgp_lightning.errors import ConfigError
from pgp_lightning.prefill import KeepAll, Run, pruned
from pgp_lightning.pruners import vision_attention
from pgp_lightning.pruners.contextual import Choice, merge, select, split_budget
from pgp_lightning.pruners.vision_attention import by_row, class_attention, column_means, mean_keys, pool_cells
from pgp_lightning.pruners.vision_zip import VisionZip
from pgp_lightning.selection import equal_shares, keep_count
from pgp_lightning.vlm.family import VLM
from pgp_lightning.vlm.inputs import prompt_inputs
from pgp_lightning.vlm.request import Request
from pgp_lightning.vlm.tiles import TileGrid
from tests.masked_reference import Masked, embed, masked_states
from tests.tiny import row_of
from tests.toy_decoder import read_golden
from tests.unit.prefill.made import CLOSE, FAMILIES, STEPS, ask, build, hooks, shared, slots_of, without_stop


def read(name: str) -> dict[str, Any]:
    """Read a case: arrays as tensors, scalars as numbers."""
    arrays = read_golden(f"visionzip_{name}.npz")
    return {key: torch.from_numpy(a) if a.ndim else a.item() for key, a in arrays.items()}


def check(choice: Choice, dominant: Tensor, targets: Tensor, assign: Tensor) -> None:
    """Compare with an original's indices: `assign` says which target each token takes that is neither of the two."""
    assert choice.dominant.tolist() == dominant.tolist()
    assert choice.targets.tolist() == targets.tolist()
    kept = torch.cat([dominant, targets])
    others = torch.ones(len(choice.owner), dtype=torch.bool).index_fill(0, kept, False)
    assert choice.owner[others].tolist() == targets[assign].tolist()
    assert choice.owner[kept].tolist() == kept.tolist()


@pytest.mark.parametrize("case", ["a", "c_nomerge", "llava192"])
def test_choice_and_merged_tokens_are_the_originals(case: str):
    """The original counts the class token, at index 0, as one of the dominant; ours does not choose it."""
    arrays = read(f"clip_{case}")
    for i in range(len(arrays["cls_attn"])):
        score = arrays["cls_attn"][i].sum(dim=0)
        torch.testing.assert_close(score, arrays["score"][i])
        choice = select(score, arrays["metric"][i, 1:], arrays["dominant_arg"] - 1, arrays["contextual_arg"])
        assert arrays["dominant_sorted"][i, 0] == 0
        check(choice, arrays["dominant_sorted"][i, 1:] - 1, arrays["contextual_target_abs"][i] - 1, arrays["assign"][i])
        merged = merge(arrays["hidden"][i, 1:], choice)
        torch.testing.assert_close(merged[choice.dominant], arrays["dominant_tokens"][i, 1:])
        torch.testing.assert_close(merged[choice.targets], arrays["contextual_tokens"][i], atol=2e-5, rtol=2e-5)


def test_keys_and_attention_are_those_of_clips_own_module():
    arrays = read("clip_keymetric")
    heads, width = arrays["num_heads"], arrays["x"].shape[-1]
    attention: Any = nn.Module()
    attention.head_dim = width // heads
    attention.scale = attention.head_dim**-0.5
    for name in ("q", "k"):
        linear = nn.Linear(width, width)
        linear.load_state_dict({part: arrays[f"w_{name}_proj__{part}"] for part in ("weight", "bias")})
        attention.add_module(f"{name}_proj", linear)
    with torch.no_grad():
        torch.testing.assert_close(mean_keys(attention, arrays["x"]), arrays["metric"][:, 1:])
        torch.testing.assert_close(class_attention(attention, arrays["x"]), arrays["attn"][:, :, 0, 1:].sum(dim=1))
        torch.testing.assert_close(column_means(attention, arrays["x"]), arrays["attn"].mean(dim=(1, 2))[:, 1:])


@pytest.mark.parametrize("case", ["b01", "b111", "b333"])
def test_internvl_as_in_effivlm_bench(case: str):
    """Its pooled scores (of logits, given here), choices and merged tokens; its budgets lose up to two tokens."""
    arrays = read(f"internvl_{case}")
    scores, keys = pool_cells(arrays["colmean_1024"], 256), pool_cells(arrays["metric_1024"], 256)
    torch.testing.assert_close(scores, arrays["score_256"])
    torch.testing.assert_close(keys, arrays["metric_256"])
    for i, embeds in enumerate(arrays["vit_embeds"]):
        choice = select(scores[i], keys[i], arrays["dominant_num"], arrays["contextual_num"])
        check(choice, arrays["dominant_sorted"][i], arrays["contextual_target_abs"][i], arrays["assign"][i])
        merged = merge(embeds, choice)
        torch.testing.assert_close(merged[choice.dominant], arrays["out"][i, : arrays["dominant_num"]])
        wanted = arrays["out"][i, arrays["dominant_num"] :]
        torch.testing.assert_close(merged[choice.targets], wanted, atol=2e-2, rtol=2e-2)
    kept = arrays["dominant_num"] + arrays["contextual_num"]
    assert sum(split_budget(keep_count(256, arrays["budget"]))) - kept in (-1, 0, 1, 2)


def test_the_port_to_qwen_from_scores_to_embeddings():
    """Column sums over cells of four patches are the case's own order, which no family here has; then all of it."""
    arrays = read("qwen_a")
    cells = arrays["attn_heads"].sum(dim=1).mean(dim=0).view(-1, 4).mean(dim=1)[arrays["reverse_indices"]]
    torch.testing.assert_close(cells, arrays["score"])
    choice = select(arrays["score"], arrays["key_metric"], arrays["dominant_num"], arrays["contextual_num"])
    assert choice.dominant.tolist() == arrays["dominant_sorted"].tolist()
    assert choice.targets.tolist() == arrays["contextual_target_abs"].tolist()
    kept = torch.cat([choice.dominant, choice.targets]).sort().values
    assert kept.tolist() == arrays["select_mask"].nonzero().flatten().tolist()
    first, last = arrays["n_prefix"], arrays["n_prefix"] + len(cells)
    embeds = arrays["inputs_embeds"][0]
    found = torch.cat([embeds[:first], merge(embeds[first:last], choice)[kept], embeds[last:]])
    torch.testing.assert_close(found, arrays["out_embeds"][0], atol=2e-2, rtol=2e-2)


def test_dominant_tokens_of_a_grid_of_tiles_have_the_originals_raster_order():
    """LLaVA-NeXT stitches tiles before it reads dominant patches row by row; our tiles say where a token lies."""
    arrays = read("next_restore")
    grid = TileGrid(arrays["width"], arrays["height"], 24, False)
    dominant = arrays["keep_idx_raw"].shape[1] - 1
    kept = np.full((grid.tiles, 24 * 24), -1)
    for tile, places in enumerate(arrays["keep_idx_raw"][:, 1:] - 1):
        # The original lists dominant tokens by place, whatever order their indices are in.
        for rank, place in enumerate(places.sort().values.tolist()):
            kept[tile, place] = tile * arrays["image_feature"].shape[1] + 1 + rank
    raster = grid.untile(kept.reshape(-1))[0].reshape(-1)
    order = raster[raster >= 0].tolist()
    found = arrays["image_feature"].flatten(0, 1)[order]
    torch.testing.assert_close(found, arrays["out"][: grid.tiles * dominant])


@pytest.mark.parametrize(
    ("count", "dominant", "contextual"),
    [(64, 54, 10), (128, 108, 20), (192, 162, 30), (13, 11, 2), (28, 24, 4), (51, 43, 8), (57, 48, 9), (85, 72, 13),
     (2, 1, 1), (1, 1, 0), (0, 0, 0)],
)  # fmt: skip
def test_published_splits(count: int, dominant: int, contextual: int):
    assert split_budget(count) == (dominant, contextual)
    assert split_budget(count, 0.0) == (count, 0)


def test_edges_of_the_choice():
    score, keys = torch.arange(5.0), torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    tokens = torch.randn(5, 2, generator=torch.Generator().manual_seed(1))
    for dominant, contextual in ((5, 0), (3, 2), (3, 9)):
        choice = select(score, keys, dominant, contextual)
        assert torch.cat([choice.dominant, choice.targets]).sort().values.tolist() == [0, 1, 2, 3, 4]
        assert torch.equal(merge(tokens, choice), tokens)
    nothing = select(score, keys, 0, 0)
    assert (len(nothing.dominant), len(nothing.targets)) == (0, 0)
    assert torch.equal(merge(tokens, nothing), tokens)
    # All into one: its token and the mean of the other four.
    one = select(score, keys, 0, 1)
    torch.testing.assert_close(merge(tokens, one)[0], tokens[0] + tokens[1:].mean(dim=0))
    # All keys alike: the first target takes all, but not another target.
    alike = select(score, torch.ones(5, 3), 0, 2)
    assert alike.owner.tolist() == [0, 0, 2, 0, 0]
    wanted = torch.stack([tokens[0] + tokens[[1, 3, 4]].mean(dim=0), *tokens[1:]])
    torch.testing.assert_close(merge(tokens, alike), wanted)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("at_once", [1, 2**24])
def test_scores_are_those_of_the_whole_matrix(family: str, at_once: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vision_attention, "_AT_ONCE", at_once)
    attention: Any = shared(family).vision_attention(-2)
    hidden = torch.randn(3, 17, 32, generator=torch.Generator().manual_seed(0))
    whole = attention_rows(attention, project_queries(attention, hidden), project_keys(attention, hidden))
    torch.testing.assert_close(column_means(attention, hidden), whole.mean(dim=(1, 2))[:, 1:])
    torch.testing.assert_close(class_attention(attention, hidden), whole[:, :, 0, 1:].sum(dim=1))


def test_keys_of_half_precision_are_averaged_in_float32(monkeypatch: pytest.MonkeyPatch):
    keys = torch.randn(2, 16, 5, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    monkeypatch.setattr(vision_attention, "project_keys", lambda *given: keys)
    monkeypatch.setattr(Tensor, "float", lambda self: pytest.fail("a copy of all keys in float32"))
    found = mean_keys(nn.Identity(), torch.zeros(2, 6, 1))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, keys.to(torch.float32).mean(dim=1))


def test_cells_are_those_of_pixel_shuffle():
    vlm = shared("internvl")
    seen: list[Tensor] = []
    hook = vlm.projector.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        pixels = vlm.normalise(ask(vlm).tiles)
        vlm.encode(pixels)
        features = vlm.vision_tower(pixels).last_hidden_state[:, 1:]
    hook.remove()
    shuffled = seen[0].unflatten(-1, (4, -1)).mean(dim=2)
    torch.testing.assert_close(pool_cells(features, shuffled.shape[1]), shuffled)
    torch.testing.assert_close(pool_cells(features[..., 0], shuffled.shape[1]), shuffled[..., 0])
    for patches, tokens in ((16, 8), (15, 4), (16, 9)):
        with pytest.raises(ConfigError, match="no square"):
            pool_cells(torch.zeros(1, patches), tokens)


def test_tiles_are_laid_out_by_prompt():
    values = torch.arange(12.0).view(3, 4)
    assert by_row(values, [8, 4], -1.0).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, -1, -1, -1, -1]]


SETTINGS = {
    "released": {},
    "merged_at_input": {"merge_at": "input", "contextual_share": 0.4},
    "merged_at_output": {"merge_at": "output", "contextual_share": 0.4},
    "by_class": {"score": "class"},
    "by_column": {"score": "column", "layer": 0},
    "dominant_only": {"contextual_share": 0.0},
    "renumbered": {"renumber": True},
}


@torch.no_grad()
def by_hand(vlm: VLM, request: Request, pruner: VisionZip) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Do it one image and one tile at a time on whole attention matrices: kept, importance and visual tokens by row."""
    eager: Any = build(vlm.family, attention="eager")
    options = SimpleNamespace(**vars(pruner))
    keep, importance, visual = [], [], []
    for row in range(len(request)):
        tiles = row_of(request, row).tiles if vlm.family == "internvl" else request.tiles[row : row + 1]
        inputs: list[Tensor] = []
        hook = vlm.projector.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
        projected = vlm.visual_tokens(tiles)
        hook.remove()
        tower = eager.vision_tower(eager.normalise(tiles), output_attentions=True, output_hidden_states=True)
        matrix, layer = tower.attentions[options.layer], eager.vision_layers[options.layer]
        normed = (layer.layer_norm1 if vlm.family == "llava" else layer.layernorm_before)(
            tower.hidden_states[range(len(eager.vision_layers))[options.layer]]
        )
        keys = eager.vision_attention(options.layer).k_proj(normed).unflatten(-1, (2, -1)).mean(dim=2)[:, 1:]
        by_class = options.score == "class" or (options.score is None and vlm.family == "llava")
        scores = matrix[:, :, 0, 1:].sum(dim=1) if by_class else matrix.mean(dim=(1, 2))[:, 1:]
        n = projected.shape[1]
        if vlm.family == "internvl":
            side, cells = isqrt(n), []
            for i in range(side):
                for j in range(side):
                    corner = 2 * i * 2 * side + 2 * j
                    cells.append([corner, corner + 1, corner + 2 * side, corner + 2 * side + 1])
            scores, keys = scores[:, cells].mean(dim=2), keys[:, cells].mean(dim=2)
        at_input = options.merge_at == "input" or (options.merge_at is None and vlm.family == "llava")
        kept = []
        for tile, k in enumerate(equal_shares(keep_count(len(tiles) * n, options.keep_ratio), len(tiles))):
            dominant, contextual = split_budget(k, options.contextual_share)
            top = sorted(range(n), key=lambda i: -scores[tile, i].item())[:dominant]
            rest = [i for i in range(n) if i not in top]
            targets = [rest[t * (len(rest) // contextual)] for t in range(contextual)]
            tokens = (inputs[0] if at_input else projected)[tile].clone()
            owned: dict[int, list[Tensor]] = {target: [] for target in targets}
            for i in rest if targets else []:
                if i not in targets:
                    nearest = max(
                        targets, key=lambda t: float(normalize(keys[tile, i], dim=0) @ normalize(keys[tile, t], dim=0))
                    )
                    owned[nearest].append(tokens[i])
            for target, merged in owned.items():
                if merged:
                    tokens[target] += torch.stack(merged).mean(dim=0)
            projected[tile] = vlm.projector(tokens[None])[0] if at_input else tokens
            kept += [i in top or i in targets for i in range(n)]
        keep.append(torch.tensor(kept))
        importance.append(scores.flatten())
        visual.append(projected.flatten(0, 1))
    return keep, importance, visual


def answer(vlm: VLM, pruner: Any, request: Request, **options: Any) -> tuple[Tensor, Tensor, Run]:
    """Return tokens (B, STEPS), their logits (B, STEPS, V) and the run."""
    inputs = prompt_inputs(vlm, request)
    with pruned(vlm, pruner, inputs, request) as run:
        found = without_stop(vlm, inputs, **options)
    return found.sequences[:, -STEPS:], torch.stack(found.logits, dim=1), run


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_generation_equals_the_model_by_hand(family: str, setting: str):
    """Rows of different lengths; what is kept, what it is ranked by, what is merged, and every step's logits."""
    vlm = shared(family)
    request = ask(vlm)
    pruner = VisionZip(0.6, **SETTINGS[setting])  # type: ignore[arg-type]
    tokens, logits, run = answer(vlm, pruner, request)
    keep, importance, visual = by_hand(vlm, request, pruner)
    assert pruner.importance is not None
    for row, count in enumerate(request.counts):
        assert run.kept[0][row, :count].tolist() == keep[row].tolist()
        assert int(run.kept[0][row].sum()) == keep_count(count, 0.6)
        torch.testing.assert_close(pruner.importance[row, :count], importance[row], atol=1e-6, rtol=1e-4)
        assert bool((pruner.importance[row, count:] == -torch.inf).all())
    inputs = prompt_inputs(vlm, request)
    hidden, valid = embed(vlm, inputs).detach(), inputs["attention_mask"].bool()
    hidden[inputs["input_ids"] == vlm.model.config.image_token_id] = torch.cat(visual)
    seen = slots_of(vlm, inputs, run.kept[0])
    masked = Masked([seen] * len(run.kept), renumber=0 if pruner.renumber else None)
    for step in range(STEPS):
        with torch.no_grad():
            wanted = masked_states(vlm, hidden, valid, masked)[0][:, -1]
        torch.testing.assert_close(logits[:, step], wanted, atol=CLOSE, rtol=CLOSE)
        assert torch.equal(tokens[:, step], wanted.argmax(dim=-1))
        hidden = torch.cat([hidden, vlm.model.get_input_embeddings()(tokens[:, step])[:, None]], dim=1).detach()


def test_a_row_does_not_depend_on_its_batch_and_images_may_be_shared():
    vlm = shared("internvl")
    request = ask(vlm, images=(2, 0, 2))
    _, logits, run = answer(vlm, VisionZip(0.6), request)
    for row, count in enumerate(request.counts):
        _, alone, run_alone = answer(vlm, VisionZip(0.6), row_of(request, row))
        assert torch.equal(run.kept[0][row, :count], run_alone.kept[0][0])
        torch.testing.assert_close(logits[row], alone[0], atol=CLOSE, rtol=CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_returned_sequences_keep_what_one_keeps(family: str):
    vlm = shared(family)
    request = ask(vlm)
    _, one, run = answer(vlm, VisionZip(0.6), request)
    _, several, run_several = answer(vlm, VisionZip(0.6), request, num_beams=2, num_return_sequences=2)
    assert torch.equal(run_several.kept[0], run.kept[0].repeat_interleave(2, dim=0))
    torch.testing.assert_close(several[::2, 0], one[:, 0], atol=CLOSE, rtol=CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("merge_at", ["input", "output"])
def test_keeping_all_changes_no_bit(family: str, merge_at: Any):
    vlm = shared(family)
    request = ask(vlm)
    _, logits, _ = answer(vlm, VisionZip(1.0, merge_at=merge_at), request)
    assert torch.equal(logits, answer(vlm, KeepAll(), request)[1])


def test_a_budget_below_one_token_a_tile_leaves_tiles_empty():
    vlm = shared("internvl")
    request = ask(vlm)
    _, _, run = answer(vlm, VisionZip(0.1), request)
    # 12, 4 and 20 tokens in 3, 1 and 5 tiles of 4.
    kept = [[int(row[first : first + 4].sum()) for first in range(0, 20, 4)] for row in run.kept[0]]
    assert kept == [[1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_stays_on_the_model_nor_of_it(family: str):
    vlm = shared(family)
    request, pruner = ask(vlm), VisionZip(0.6)
    before, inputs = hooks(vlm.model), prompt_inputs(vlm, request)
    with pruned(vlm, pruner, inputs, request):
        vlm.model.generate(**inputs, max_new_tokens=1)
        assert hooks(vlm.model) != before
    assert hooks(vlm.model) == before
    assert list(pruner.modules()) == [pruner]
    with pytest.raises(RuntimeError, match="stop"), pruned(vlm, pruner, inputs, request):
        vlm.model(**inputs)
        raise RuntimeError("stop")
    assert hooks(vlm.model) == before
    assert pruner._choices == []


def test_gradients_pass_through_merged_tokens():
    vlm = build("llava")
    request, pruner = ask(vlm), VisionZip(0.6)
    inputs = prompt_inputs(vlm, request)
    with pruned(vlm, pruner, inputs, request):
        vlm.model(**inputs).logits.sum().backward()
    gradient = vlm.projector.get_parameter("linear_1.weight").grad
    assert gradient is not None
    assert bool(gradient.abs().sum() > 0)


def test_what_cannot_be_is_refused():
    for options in ({"keep_ratio": 0.0}, {"contextual_share": 1.0}, {"score": "cls"}, {"merge_at": "nowhere"}):
        with pytest.raises(ConfigError):
            VisionZip(**options)  # type: ignore[arg-type]
    vlm = shared("internvl")
    request = ask(vlm)
    inputs = prompt_inputs(vlm, request)
    without = prompt_inputs(vlm, request, features=vlm.visual_tokens(request.tiles))
    with pytest.raises(ConfigError, match="needs pixel_values"), pruned(vlm, VisionZip(), without, request):
        pass
    no_layer = VisionZip(layer=2)
    with pytest.raises(ConfigError, match="layer 2: the tower has 2"), pruned(vlm, no_layer, inputs, request):
        pass
    with (
        pytest.raises(ConfigError, match="called with features of pictures"),
        pruned(vlm, VisionZip(), inputs, request),
    ):
        vlm.model.generate(**without, max_new_tokens=1)
    few = {**inputs, "pixel_values": inputs["pixel_values"][1:]}
    with pytest.raises(ConfigError, match=r"8 tiles came for \[12, 4, 20\]"), pruned(vlm, VisionZip(), few, request):
        vlm.visual_tokens(request.tiles[1:])
