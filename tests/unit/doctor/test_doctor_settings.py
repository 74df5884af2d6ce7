"""The doctor says where a checkpoint's settings stand, and refuses what loading refuses, in the same words."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pgp_lightning.errors import ConfigError
from pgp_lightning.vlm.loading import load_vlm
from tests.unit.doctor.case import Case

OLD, NEW = "preprocessor_config.json", "processor_config.json"


def write(case: Case, name: str, **changes: Any) -> None:
    values = {"min_patches": 1, "max_patches": 6, "size": {"height": 32, "width": 32}} | changes
    (case.base / name).write_text(json.dumps(values if name == OLD else {"image_processor": values}))


def test_the_doctor_says_where_settings_stand(case: Case):
    (case.base / "vlm.json").unlink()
    write(case, NEW, max_patches=4)
    case.finds(
        "ok", "settings", f"max_patches 4 ({NEW})", "side 32 (config.json and processor_config.json)", "length 256"
    )
    write(case, OLD)
    case.finds("fail", "weights", f"max_patches is 6 in {OLD} and 4 in {NEW}")


QUANTISED = {
    "awq": (
        {"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True},
        r"is quantised \(awq\).*gptqmodel",
    ),
    "unknown": ({"quant_method": "novel"}, r"is quantised \(novel\) and cannot be loaded here: Unknown quant"),
    "nameless": ({"bits": 4}, r"is quantised \(unknown\) and cannot be loaded here"),
}


@pytest.mark.parametrize("how", QUANTISED)
def test_quantised_folders_say_what_is_missing_in_one_line_everywhere(how: str, case: Case):
    settings, message = QUANTISED[how]
    config = json.loads((case.base / "config.json").read_text())
    (case.base / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    with pytest.raises(ConfigError, match=message) as refused:
        load_vlm(str(case.base))
    assert "\n" not in str(refused.value)
    case.finds("fail", "weights", str(refused.value))
