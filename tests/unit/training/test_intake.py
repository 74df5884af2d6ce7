from types import SimpleNamespace

import pytest
import torch

from pgp_lightning.data.collate import Batch
from pgp_lightning.training.intake import DataIntake
from pgp_lightning.vlm.request import Request
from pgp_lightning.vlm.tiles import TileGrid


class Logger:
    def __init__(self):
        self.logged = {}

    def log_metrics(self, figures, step):
        self.logged[step] = figures


def batch(rejected, epoch=0):
    request = Request(["q"], torch.zeros(1, 3, 8, 8, dtype=torch.uint8), [TileGrid(1, 1, 2, False)])
    return Batch(request, ["a"], ["world"], ["k"], [""], [0], [0], epoch=epoch, rejected=rejected)


def run(intake, batches, first_step=0):
    logger = Logger()
    trainer = SimpleNamespace(global_step=first_step, log_every_n_steps=2, loggers=[logger], is_global_zero=True)
    intake.on_train_start(trainer, None)
    for index, one in enumerate(batches):
        trainer.global_step += 1
        intake.on_train_batch_end(trainer, None, None, one, index)
    intake.on_train_end(trainer, None)
    return logger.logged


def test_counts_by_source_and_reason_are_logged_at_the_interval_and_summed_at_the_end(capsys):
    with pytest.warns(UserWarning, match="world/bad-image cannot be used"):
        logged = run(DataIntake(), [batch({}), batch({"world/bad-image": 1}), batch({"world/bad-image": 2}, 1)] * 2)
    assert logged[1] == {"data/epoch": 0.0, "data/rejected/world/bad-image": 1.0}
    assert logged[5] == {"data/epoch": 1.0, "data/rejected/world/bad-image": 6.0}
    assert "6 records could not be used and were replaced: world/bad-image 6" in capsys.readouterr().out


def test_a_resumed_run_goes_on_counting_and_does_not_warn_again(recwarn, capsys):
    before = DataIntake()
    before.rejected.update({"world/no-image": 3})
    after = DataIntake()
    after.load_state_dict(before.state_dict())
    run(after, [batch({"world/no-image": 1})])
    assert not recwarn.list
    assert "world/no-image 4" in capsys.readouterr().out


def test_nothing_is_said_when_nothing_was_left_out(recwarn, capsys):
    assert run(DataIntake(), [batch({}), batch({})]) == {1: {"data/epoch": 0.0}}
    assert not recwarn.list
    assert not capsys.readouterr().out


def test_validation_warns_and_does_not_count():
    intake = DataIntake()
    with pytest.warns(UserWarning, match=r"validation leaves out 2 record\(s\) of world/bad-image"):
        intake.on_validation_batch_end(None, None, None, batch({"world/bad-image": 2}), 0)
    assert not intake.rejected
