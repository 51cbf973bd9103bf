"""Launched by test_zero3.py: trains like the trainer, then writes what DeepSpeed really holds, a JSON file a rank."""

import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import parameter_efficient_fine_tuning as trainer_script
from bhpeft import base_model, training

out = Path(os.environ["INSPECT_OUT"])
seen = {}
load = base_model.load_base_model


def load_and_look(*args, **kwargs):
    model = load(*args, **kwargs)
    if base_model.count_4bit_layers(model) == 0:
        seen["whole_numel"] = sum(p.ds_numel for p in model.parameters())
        seen["held_numel"] = sum(p.ds_tensor.numel() for p in model.parameters())
        seen["visible_numel"] = sum(p.numel() for p in model.parameters())
    return model


def device_name(offload):
    return getattr(offload.device, "value", offload.device)


class LookingTrainer(training.AdapterTrainer):
    def train(self, *args, **kwargs):
        result = super().train(*args, **kwargs)
        engine = self.model_wrapped
        optimizer = engine.optimizer
        seen.update(
            engine=type(engine).__name__,
            stage=engine.zero_optimization_stage(),
            offload_param=device_name(engine.zero_offload_param()),
            offload_optimizer=device_name(engine.zero_offload_optimizer()),
            optimizer=type(optimizer.optimizer).__name__,
            clipping=engine.gradient_clipping(),
            dtype=str(engine.get_data_types()[0]),
            shard_devices=sorted({str(p.ds_tensor.device) for p in self.model.parameters()}),
            state_devices=sorted({str(t.device) for g in optimizer.fp32_partitioned_groups_flat for t in [g]}),
            visible_after=sum(p.numel() for p in self.model.parameters() if not p.ds_persist),
            layers_4bit=base_model.count_4bit_layers(self.model),
            whole_after=sum(p.ds_numel for p in self.model.parameters()),
            held_after=sum(p.ds_tensor.numel() for p in self.model.parameters()),
            world=torch.distributed.get_world_size(),
        )
        return result


trainer_script.load_base_model = load_and_look
trainer_script.AdapterTrainer = LookingTrainer
trainer_script.main()
(out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(seen))
