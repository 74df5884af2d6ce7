"""The records of an optimiser step stay the same for any number of processes, or are refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pgp_lightning.errors import ConfigError
from pgp_lightning.training.global_batch import GlobalBatch


def settle(ranks: int, batch_size: int, records: int = 176, accumulate: int = 1) -> int:
    data = SimpleNamespace(batch_size=batch_size)
    trainer: Any = SimpleNamespace(world_size=ranks, accumulate_grad_batches=accumulate, datamodule=data)
    GlobalBatch(records).setup(trainer, None, "fit")  # type: ignore[arg-type]
    return int(trainer.accumulate_grad_batches)


def test_every_number_of_processes_takes_the_same_records_or_is_refused() -> None:
    for ranks in range(1, 40):
        for batch_size in range(1, 20):
            if 176 % (ranks * batch_size) == 0:
                assert ranks * batch_size * settle(ranks, batch_size) == 176
            else:
                with pytest.raises(ConfigError, match="176 records per optimiser step"):
                    settle(ranks, batch_size)


def test_refusals_say_what_would_work() -> None:
    with pytest.raises(ConfigError, match=r"to 3 processes: use one of 1, 2, 4, 8, 11, 16, 22, 44, 88, 176 processes"):
        settle(3, 1)
    with pytest.raises(ConfigError, match=r"22 for each of 8 .*batch_size 16 does not .* to one of 1, 2, 11, 22"):
        settle(8, 16)
    with pytest.raises(ConfigError, match=r"accumulate_grad_batches is 4, .* it has to be 11: leave it out"):
        settle(8, 2, accumulate=4)
    assert settle(8, 2, accumulate=11) == 11
    with pytest.raises(ConfigError, match="at least 1"):
        GlobalBatch(0)


def test_only_training_is_settled() -> None:
    trainer: Any = SimpleNamespace(world_size=3, accumulate_grad_batches=1)
    GlobalBatch(176).setup(trainer, None, "validate")  # type: ignore[arg-type]
    assert trainer.accumulate_grad_batches == 1
