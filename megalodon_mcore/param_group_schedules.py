"""Loads a checkpoint's optimizer under another schedule than it was saved with.

Megatron-Core 0.19 finds a parameter group in a checkpoint by values that include its learning
rates, for any model and with the plain and the distributed optimizer alike. So a new --lr finds no
group, before --override-opt_param-scheduler or --use-checkpoint-opt_param-scheduler is asked.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import Any

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer, param_group_identifier_keys
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megalodon_mcore.checkpoint_errors import CheckpointError
from megalodon_mcore.global_arguments import megatron_arguments

SCHEDULE = {"max_lr": "--lr", "min_lr": "--min-lr", "start_wd": "--start-weight-decay"}
SCHEDULE["end_wd"] = "--end-weight-decay"
"""The values that the schedule sets in a group, and the argument that each comes from."""


class ScheduleMismatchError(CheckpointError):
    """A checkpoint has another schedule, and nothing says which of the two to take."""


def load_new_schedules() -> None:
    """Corrects both of the methods that look groups up, and what the scheduler says of its own."""
    reorder, load = MegatronOptimizer._filter_and_reorder_param_groups, "load_state_dict"
    load_distributed = getattr(DistributedOptimizer, load)

    @functools.wraps(reorder)
    def reorder_agreeing(current: list[dict], saved: list[dict]) -> list[dict]:
        agree(current, saved)
        return reorder(current, saved)

    @functools.wraps(load_distributed)
    def load_agreeing(self: DistributedOptimizer, state_dict: dict) -> None:
        if not self.ddp_config.use_megatron_fsdp:
            agree(self.optimizer.param_groups, state_dict["optimizer"]["param_groups"])
        load_distributed(self, state_dict)

    check = OptimizerParamScheduler._check_and_set

    @functools.wraps(check)
    def check_in_one_sentence(self: OptimizerParamScheduler, *values: Any) -> Any:
        try:
            return check(self, *values)
        except AssertionError:
            given, saved, name = values
            raise ScheduleMismatchError(_sentence(f"The {name}", given, saved)) from None

    for owner, name, method in (
        (OptimizerParamScheduler, "_check_and_set", check_in_one_sentence),
        (MegatronOptimizer, "_filter_and_reorder_param_groups", staticmethod(reorder_agreeing)),
    ):
        setattr(owner, name, method)
    setattr(DistributedOptimizer, load, load_agreeing)


def agree(current: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    """Gives groups that are the same but for their schedule one schedule: that which is asked for.

    Where groups differ in their schedule alone they are paired in order, which is that of the
    arguments that made them.

    Raises:
        ScheduleMismatchError: schedules differ and neither is asked for.
    """
    if {_identity(group, ()) for group in current} <= {_identity(group, ()) for group in saved}:
        return
    saved_by_identity = defaultdict(list)
    for group in saved:
        saved_by_identity[_identity(group, SCHEDULE)].append(group)
    for group in current:
        others = saved_by_identity[_identity(group, SCHEDULE)]
        if others:
            _settle(group, others.pop(0))


def _settle(current: dict[str, Any], saved: dict[str, Any]) -> None:
    arguments = megatron_arguments()
    takes_saved = getattr(arguments, "use_checkpoint_opt_param_scheduler", False)
    takes_current = getattr(arguments, "override_opt_param_scheduler", False)
    for name, argument in SCHEDULE.items():
        if current.get(name) == saved.get(name):
            continue
        if takes_current:
            saved[name] = current.get(name)
        elif takes_saved:
            current[name] = saved.get(name)
        else:
            raise ScheduleMismatchError(_sentence(argument, current.get(name), saved.get(name)))


def _sentence(what: str, given: Any, saved: Any) -> str:
    return (
        f"{what} is {given} and was {saved} in the checkpoint; take the new schedule with "
        "--override-opt_param-scheduler or the old one with --use-checkpoint-opt_param-scheduler."
    )


def _identity(group: dict[str, Any], without: Any) -> tuple:
    """As Megatron has it, NeMo's names included."""
    names = [name for name in param_group_identifier_keys if name not in without]
    return tuple(group.get(name, group.get(f"pre_{name}")) for name in names)
