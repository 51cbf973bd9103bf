"""Launchers: the shipped configuration, and ZeRO-3 with no parameter small enough to stay whole."""

from __future__ import annotations

import json

import pytest
import yaml
from conftest import ROOT

SHIPPED = ROOT / "ds_zero3_cpu.yaml"


def launcher(config, ranks: int) -> list:
    """`accelerate launch` with a free port, so that runs beside each other do not collide."""
    return ["accelerate", "launch", "--config_file", config, "--num_processes", ranks, "--main_process_port", 0]


@pytest.fixture
def sharded_launcher(tmp_path):
    """ZeRO-3 with CPU offload and persistence threshold 0: also the smallest parameter is sharded.

    `sharded_launcher(ranks)`; fp32, so that runs on different numbers of ranks can be compared closely.
    """
    zero = {
        "stage": 3,
        "offload_param": {"device": "cpu"},
        "offload_optimizer": {"device": "cpu"},
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    settings = {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    (tmp_path / "zero3.json").write_text(json.dumps(settings))
    shipped = yaml.safe_load(SHIPPED.read_text())
    shipped["deepspeed_config"] = {"deepspeed_config_file": str(tmp_path / "zero3.json"), "zero3_init_flag": True}
    del shipped["mixed_precision"]
    (tmp_path / "zero3.yaml").write_text(yaml.safe_dump(shipped))
    return lambda ranks: launcher(tmp_path / "zero3.yaml", ranks)
