"""What the command line does to a configuration's callbacks."""

from __future__ import annotations

from lightning.pytorch.callbacks import EarlyStopping

from pgp_lightning.training.callbacks import BetaAnnealing, LogLine
from pgp_lightning.training.command_line import _latest
from pgp_lightning.training.preemption import Preemption
from pgp_lightning.training.step_checkpoint import StepCheckpoint


def test_the_last_callback_of_a_class_of_ours_takes_the_place_of_the_first():
    first, last, line = BetaAnnealing(end=0.5), BetaAnnealing(end=1.0), LogLine()
    assert _latest([first, line, last]) == [last, line]


def test_several_checkpoints_and_foreign_callbacks_stay():
    both = [StepCheckpoint(), EarlyStopping("val/loss"), StepCheckpoint(), EarlyStopping("val/kl")]
    assert _latest(list(both)) == both


def test_an_overlays_way_to_requeue_replaces_the_first() -> None:
    (kept,) = _latest([Preemption(), Preemption(requeue=[])])
    assert isinstance(kept, Preemption) and kept.requeue == ()
