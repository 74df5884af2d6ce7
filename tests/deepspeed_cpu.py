"""DeepSpeed on CPU processes: Lightning's strategy, without its insistence on CUDA."""

from __future__ import annotations

import os
from typing import Any

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy

__all__ = ["CPUDeepSpeed"]


class CPUDeepSpeed(DeepSpeedStrategy):
    """ZeRO over gloo; everything but the choice of the device is the real thing."""

    def __init__(self, **options: Any) -> None:
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
        import deepspeed

        for name in list(deepspeed.ops.__compatible_ops__):
            if "shm_comm" in name:  # else an operator of its own is compiled, for a minute
                deepspeed.ops.__compatible_ops__[name] = False
        super().__init__(process_group_backend="gloo", **options)

    def setup_environment(self) -> None:
        self.accelerator.setup_device(self.root_device)
        self.setup_distributed()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)  # DeepSpeed needs an index

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()
