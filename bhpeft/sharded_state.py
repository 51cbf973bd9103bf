"""What ZeRO-3 spreads over the ranks of an optimizer, gathered for a checkpoint and spread again.

DeepSpeed's own checkpoints are a file a rank, hold pickled objects, and are bound to the number of ranks. Only an
adapter is trained here, so its fp32 weights and Adam's moments fit one rank: they are gathered through DeepSpeed's
public accessors (deepspeed.utils.safe_get_full_fp32_param and its kin), and written by rank 0 into one file that
`torch.load(weights_only=True)` reads. Any number of ranks goes on from it, and machines need no folder in common.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bhpeft.checkpoints import writing

OPTIMIZER = "optimizer.pt"
PLAIN = (int, float, bool)


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_sharded(engine: Any, folder: str | Path, write: bool) -> None:
    """Gather fp32 weights, the optimizer's state and the loss scaler's, and write them. Every rank must call it.

    Args:
        engine: DeepSpeed's, stage 3.
        write: this is the rank that does.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    zero = engine.optimizer
    flat = zero.fp32_partitioned_groups_flat[0]
    one = zero.optimizer.state[flat]  # of one of the flat groups; they all have the same keys and counts of steps
    spread = [key for key, value in one.items() if torch.is_tensor(value) and value.shape == flat.shape]
    state: dict[str, Any] = {
        "groups": [{key: of[key] for key in of if key != "params"} for of in zero.optimizer.param_groups],
        "counts": {key: value for key, value in one.items() if key not in spread},
        "scaler": {key: value for key, value in vars(zero.loss_scaler).items() if isinstance(value, PLAIN)},
        "weights": {},
        "moments": {key: {} for key in spread},
    }
    for name, parameter in trained(engine.module).items():
        whole = safe_get_full_fp32_param(parameter)
        moments = {key: safe_get_full_optimizer_state(parameter, key) for key in spread}
        if write:
            state["weights"][name] = whole.cpu().clone()
            for key, value in moments.items():
                state["moments"][key][name] = value.cpu().clone()
    if write:
        with writing(Path(folder)):
            torch.save(state, Path(folder) / OPTIMIZER)


def load_sharded(engine: Any, folder: str | Path) -> None:
    """Give an engine the state that `save_sharded` wrote, on this number of ranks. Every rank must call it.

    Raises:
        KeyError: a weight that is trained is not in the file.
    """
    import deepspeed
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    state = torch.load(Path(folder) / OPTIMIZER, map_location="cpu", weights_only=True)
    zero, parameters = engine.optimizer, trained(engine.module)
    with deepspeed.zero.GatheredParameters(list(parameters.values()), modifier_rank=0):
        for name, parameter in parameters.items():
            parameter.data.copy_(state["weights"][name])
    for group, was in zip(zero.optimizer.param_groups, state["groups"], strict=True):
        group.update(was)  # the learning rate of the next step among them
    for flat in zero.fp32_partitioned_groups_flat:  # an optimizer makes its state at its first step
        zero.optimizer.state[flat] = {
            **{key: torch.zeros_like(flat) for key in state["moments"]},
            **{key: value.clone() if torch.is_tensor(value) else value for key, value in state["counts"].items()},
        }
    for name, parameter in parameters.items():
        safe_set_local_fp32_param(parameter, own_part(state["weights"][name], parameter))
        for key, values in state["moments"].items():
            safe_set_local_optimizer_state(parameter, own_part(values[name], parameter), key)
    vars(zero.loss_scaler).update(state["scaler"])


def own_part(whole: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
    """What this rank holds of a tensor that is spread as a parameter is: (N / ranks, rounded up), zeros at the end."""
    size = parameter.ds_tensor.numel()
    start = torch.distributed.get_rank(parameter.ds_process_group) * size
    part = whole.flatten()[start : start + size]
    return torch.nn.functional.pad(part, (0, size - part.numel()))
