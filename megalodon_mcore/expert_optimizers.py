"""Loads an optimizer's state that was saved with another expert parallelism.

Megatron-Core 0.19 has one optimizer for all parameters, or with --expert-model-parallel-size one
more for the experts. What it saves of parameters has the same names in both, but what it saves of
groups has as many parts as there were optimizers, and no other number of them loads it.
"""

from __future__ import annotations

import copy
import functools
from typing import Any, cast

from megatron.core.dist_checkpointing.dict_utils import merge
from megatron.core.optimizer.optimizer import ChainedOptimizer, param_group_identifier_keys

from megalodon_mcore.param_group_schedules import SCHEDULE


def load_other_numbers() -> None:
    """Has chained optimizers load what one has saved, and one what chained ones have."""
    load = ChainedOptimizer.load_state_dict

    @functools.wraps(load)
    def load_any(self: ChainedOptimizer, state_dict: Any) -> None:
        optimizers = self.chained_optimizers
        if isinstance(state_dict, dict):
            parts = {key: z for key, z in state_dict.items() if isinstance(key, int)}
            whole = {key: z for key, z in state_dict.items() if not isinstance(key, int)}
            if len(optimizers) == 1 and parts:
                state_dict = _as_now(optimizers[0], whole, list(parts.values()))
            elif len(optimizers) > 1 and whole and len(parts) == len(optimizers):
                state_dict = {
                    key: _as_now(optimizers[key], part, [whole]) for key, part in parts.items()
                }
        load(self, state_dict)

    ChainedOptimizer.load_state_dict = load_any


def _as_now(optimizer: Any, own: dict, saved: list[dict]) -> dict:
    """A state for an optimizer: its parameters' own, its groups from others by their values."""
    saved_groups = [group for part in saved for group in _holder(part)["param_groups"]]
    whole = copy.deepcopy(saved[0])
    _holder(whole).pop("param_groups")
    state = cast(dict, merge(whole, own))
    _holder(state)["param_groups"] = [
        _group_for(group, saved_groups) for group in _holder(optimizer.state_dict())["param_groups"]
    ]
    return state


def _holder(state: dict) -> dict:
    """Where an optimizer's state has its groups."""
    return state.get("optimizer", state)


def _group_for(group: dict, saved: list[dict]) -> dict:
    """The saved group of equal values, as this one's; this one where there is none."""
    for found in sorted(saved, key=lambda z: z.get(EXPERTS) != group.get(EXPERTS)):
        if all(found.get(name) == group.get(name) for name in IDENTITY):
            return found | {name: group[name] for name in (EXPERTS, "params") if name in group}
    return group


EXPERTS = "is_expert_parallel"
IDENTITY = tuple({*param_group_identifier_keys} - {EXPERTS, *SCHEDULE})
