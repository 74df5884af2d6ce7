"""DeepSpeed on CPU processes: Lightning's strategy, without its insistence on CUDA; and a look at how it starts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy

from pgp_lightning.training.sharded import whole_weights

__all__ = ["CPUDeepSpeed", "Start"]


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


class Start(Callback):
    """Writes into `start.json`, as training starts, how large the adapter is and the dtype of rotary frequencies."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        names = [name for name, weight in pl_module.named_parameters() if weight.requires_grad]
        weights = whole_weights(pl_module, names)
        sizes = {
            part: sum(float(w.abs().sum()) for n, w in weights.items() if part in n) for part in ("lora_A", "lora_B")
        }
        rotary = {str(value.dtype) for name, value in pl_module.named_buffers() if name.endswith("inv_freq")}
        if trainer.is_global_zero:
            (Path(trainer.default_root_dir) / "start.json").write_text(json.dumps({**sizes, "rotary": sorted(rotary)}))
