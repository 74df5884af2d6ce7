"""The weighted losses of the original training code, on its own logits and on its packed rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pgp_lightning.objective import Average, reconstruction_loss
from tests.tiny import GOLDEN, golden


@pytest.mark.parametrize("average", ["token", "sample", "square"])
@pytest.mark.parametrize("name", ["internvl_qwen2", "internvl_internlm2"])
def test_losses_equal_the_original(name: str, average: Average):
    values = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / name / "golden.npz").items()}
    rows, slots = (values["labels"][:, 1:] != -100).nonzero(as_tuple=True)
    logits, targets = values["logits"][rows, slots], values["labels"][:, 1:][rows, slots]
    loss = reconstruction_loss(logits.float(), targets.long(), rows, average)
    assert float(loss) == pytest.approx(float(values[f"loss_{average}"]), abs=2e-6)


@pytest.mark.parametrize("case", golden("internvl_prompts/packing.json"), ids=lambda case: case["loss_reduction"])
def test_weights_of_packed_rows_equal_the_original(case: dict[str, Any]):
    labels, weights = torch.tensor(case["labels"][0]), torch.tensor(case["loss_weight"][0])
    ends = torch.tensor(case["cu_seqlens"][0])
    rows = torch.bucketize(torch.arange(len(labels)), ends[1:], right=True)
    supervised = labels != -100
    # The weight of a token is the loss's derivative by its own cross-entropy, up to the common sum of weights.
    logits = torch.zeros(int(supervised.sum()), 256, requires_grad=True)
    reconstruction_loss(logits, labels[supervised], rows[supervised], case["loss_reduction"]).backward()
    found = -logits.grad[torch.arange(len(logits)), labels[supervised]] / (1 - 1 / 256)  # type: ignore[index]
    torch.testing.assert_close(found, weights[supervised] / weights.sum())
