"""Corrections of Megatron-Core that Megalodon needs and no spec or option can make.

Most are about optimizer checkpoints. Megatron's own models never mixed bf16 and float32
parameters, and its developers always have apex or Transformer Engine. The last ones concern any
model: one would lose data, one refuses a new learning rate, two are about packed conversations.

Whether a correction is needed is asked of the installed code: several versions are in use, and
what one lacks another has. Where Megatron has it, ours stays out.
"""

from __future__ import annotations

import functools
import inspect
import io
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import utils
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.transformer import multi_token_prediction
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
from torch import Tensor

from megalodon_mcore import expert_optimizers, param_group_schedules
from megalodon_mcore.config import ARGUMENT_PREFIX, layers_of, layers_of_a_depth
from megalodon_mcore.global_arguments import megatron_arguments
from megalodon_mcore.parallel.documents import partitioned_indices
from megalodon_mcore.whole_file import write_text


def apply() -> None:
    """Makes the corrections, once per process."""
    if getattr(apply, "done", False):
        return
    apply.done = True
    if _orders_by_buffer():
        _order_float32_parameters_first()
    _make_leaves_of_float32_parameters()
    if not _uses(DistributedOptimizer._set_main_param_and_optimizer_states, "no_grad"):
        _load_into_float32_parameters()
    if _uses(DistributedOptimizer.state_dict, "HAVE_APEX_OR_TE"):
        _keep_adam_step()
    _include_float32_parameters()
    if not _uses(DistributedOptimizer.sharded_param_state_fully_reshardable, "buckets"):
        _leave_padding_out_of_saved_offsets()
    param_group_schedules.load_new_schedules()
    expert_optimizers.load_other_numbers()
    _cut_documents_on_a_cpu()
    _count_layers_with_experts()
    _predict_without_transformer_engine()
    if "megatron.training.datasets.sft_dataset" in sys.modules:
        count_conversations()
    if "megatron.training.checkpointing" in sys.modules:
        write_trackers_whole()


def _uses(method: Callable, name: str) -> bool:
    """Whether the code of a method, decorators aside, names this global or attribute."""
    return name in inspect.unwrap(method).__code__.co_names or name in method.__code__.co_names


def _replace(owner: type, name: str, correction: Any) -> None:
    """Puts a correction where what it corrects was, which it keeps for tests that go without."""
    correction.corrects = vars(owner)[name]
    setattr(owner, name, correction)


def _orders_by_buffer() -> bool:
    """Whether a bf16 parameter is given the place before a float32 one of the same group."""
    params = [torch.nn.Parameter(torch.zeros(1, dtype=t)) for t in (torch.bfloat16, torch.float32)]
    buffers = [{param.dtype: [{"param_map": {param: None}}]} for param in params]
    places, _ = DistributedOptimizer._build_optimizer_group_ranges([{"params": params}], buffers)
    return places[params[0]] < places[params[1]]


def _order_float32_parameters_first() -> None:
    """Lets the distributed optimizer checkpoint bf16 and float32 parameters of one group.

    It hands each group to Adam as float32 parameters followed by the main copies of bf16 ones, but
    remembers where each parameter is by the order of its buffers, which starts with the bf16 one
    where the embedding is. Here the remembered order becomes the one that Adam has.
    """
    build = DistributedOptimizer._build_optimizer_group_ranges.__func__

    @functools.wraps(build)
    def build_in_order(
        cls: type, param_groups: list[dict], gbuf_ranges: list[dict]
    ) -> tuple[dict[torch.nn.Parameter, tuple[int, int]], list[dict[str, Any]]]:
        positions, group_ranges = build(cls, param_groups, gbuf_ranges)
        for group_index, group_range in enumerate(group_ranges):
            group_range["params"].sort(key=lambda param: param.dtype != torch.float32)
            for order, param in enumerate(group_range["params"]):
                positions[param] = (group_index, order)
        return positions, group_ranges

    _replace(DistributedOptimizer, "_build_optimizer_group_ranges", classmethod(build_in_order))


def _make_leaves_of_float32_parameters() -> None:
    """Lets the distributed optimizer offload float32 parameters to the CPU.

    Its parts of them are views that require gradients, which a new optimizer
    (HybridDeviceOptimizer, of --optimizer-cpu-offload) does not take: "can't optimize a non-leaf
    Tensor". Its parts of bf16 parameters require none, and so do these where none are recorded.
    """
    name = "_build_model_and_main_param_groups"
    build = getattr(DistributedOptimizer, name).__func__

    @torch.no_grad()
    def build_leaves(cls: type, *args: Any, **kwargs: Any) -> Any:
        return build(cls, *args, **kwargs)

    _replace(DistributedOptimizer, name, classmethod(build_leaves))


def _load_into_float32_parameters() -> None:
    """Lets the distributed optimizer copy a checkpoint into its views of float32 parameters.

    They are views of leaves that require gradients, unlike its main copies of bf16 ones. Adam's
    step is left out: load_state_dict has set it, and what comes here is the one before loading.
    """
    name = "_set_main_param_and_optimizer_states"
    set_states = getattr(DistributedOptimizer, name)

    @functools.wraps(set_states)
    @torch.no_grad()
    def set_states_but_step(
        self: DistributedOptimizer, model_param: torch.nn.Parameter, tensors: dict
    ) -> None:
        set_states(self, model_param, {**tensors, "step": None})

    _replace(DistributedOptimizer, name, set_states_but_step)


def _keep_adam_step() -> None:
    """Lets the distributed optimizer load Adam's step where neither apex nor TE is installed.

    It reads the step from some parameter's state, which does not exist before the first step, and
    after loading all states share one tensor, which every parameter's update would advance.
    """
    state_dict, load = DistributedOptimizer.state_dict, DistributedOptimizer.load_state_dict

    def has_torch_adam(optimizer: DistributedOptimizer) -> bool:
        return not distrib_optimizer.HAVE_APEX_OR_TE and isinstance(
            optimizer.optimizer, torch.optim.Adam | torch.optim.AdamW
        )

    @functools.wraps(state_dict)
    def state_dict_with_step(self: DistributedOptimizer) -> dict:
        if has_torch_adam(self):
            adam = self.optimizer
            for param in (param for group in adam.param_groups for param in group["params"]):
                if not adam.state[param]:
                    adam.state[param] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(param),
                        "exp_avg_sq": torch.zeros_like(param),
                    }
        return state_dict(self)

    @functools.wraps(load)
    def load_separate_steps(self: DistributedOptimizer, loaded: dict) -> None:
        load(self, loaded)
        if has_torch_adam(self):
            for state in self.optimizer.state.values():
                state["step"] = state["step"].clone()

    _replace(DistributedOptimizer, "state_dict", state_dict_with_step)
    _replace(DistributedOptimizer, "load_state_dict", load_separate_steps)


def _include_float32_parameters() -> None:
    """Lets the plain mixed-precision optimizer checkpoint float32 parameters beside bf16 ones.

    Both of its methods take the bf16 parameters for all that the optimizer has; while they run,
    they are shown every parameter, a float32 one as its own main copy. Megatron-LM's main takes
    float32 ones too since https://github.com/NVIDIA/Megatron-LM/pull/5929, but saves no main copy
    of them; shown the same, it writes and reads the keys that 0.19 does, so that checkpoints go
    between the two.
    """

    @contextmanager
    def every_parameter_shown(optimizer: Float16OptimizerWithFloat16Params) -> Iterator[None]:
        models, mains = optimizer.float16_groups, optimizer.fp32_from_float16_groups
        model_of_main = {
            id(main): model
            for model_group, main_group in zip(models, mains, strict=True)
            for model, main in zip(model_group, main_group, strict=True)
        }
        every_main = [group["params"] for group in optimizer.optimizer.param_groups]
        every_model = [[model_of_main.get(id(p), p) for p in group] for group in every_main]
        optimizer.float16_groups, optimizer.fp32_from_float16_groups = every_model, every_main
        try:
            yield
        finally:
            optimizer.float16_groups, optimizer.fp32_from_float16_groups = models, mains

    def showing_every_parameter(method: Callable) -> Callable:
        @functools.wraps(method)
        def wrapper(self: Float16OptimizerWithFloat16Params, *args: Any, **kwargs: Any) -> Any:
            with every_parameter_shown(self):
                return method(self, *args, **kwargs)

        return wrapper

    for name in ("sharded_state_dict", "load_state_dict"):
        method = getattr(Float16OptimizerWithFloat16Params, name)
        _replace(Float16OptimizerWithFloat16Params, name, showing_every_parameter(method))


def _leave_padding_out_of_saved_offsets() -> None:
    """Keeps the distributed optimizer from saving its fully reshardable state shifted.

    It gathers each buffer without the padding at its buckets' ends, but then cuts the parameters
    out by offsets that count the padding. That shifts all after the first bucket, and Megatron
    only warns. Several buckets come with overlapped reduction, and with tied embeddings over a
    pipeline. Megatron-LM's main looks into the buckets for their padding and subtracts it itself
    (https://github.com/NVIDIA/Megatron-LM/pull/5077); to do so twice would shift again.
    """
    name = "sharded_param_state_fully_reshardable"
    save = getattr(DistributedOptimizer, name)

    @functools.wraps(save)
    def save_by_unpadded_offsets(self: DistributedOptimizer, *args: Any, **kwargs: Any) -> Any:
        padded = [buffer.param_index_map for buffer in self.buffers]
        for buffer in self.buffers:
            paddings, unpadded = [], 0
            for bucket in buffer.buckets:
                paddings.append(bucket.offset - unpadded)
                unpadded += bucket.numel_unpadded
            buffer.param_index_map = {
                param: (start - paddings[bucket], stop - paddings[bucket], bucket)
                for param, (start, stop, bucket) in buffer.param_index_map.items()
            }
        try:
            return save(self, *args, **kwargs)
        finally:
            for buffer, offsets in zip(self.buffers, padded, strict=True):
                buffer.param_index_map = offsets

    _replace(DistributedOptimizer, name, save_by_unpadded_offsets)


def _cut_documents_on_a_cpu() -> None:
    """Lets Megatron cut packed conversations over ranks where Transformer Engine can't do it.

    It asks Transformer Engine for each rank's positions, which is not installed everywhere, and
    whose function takes tensors on a GPU alone.
    """
    engine = getattr(utils, "tex", None)

    def indices(cu_seqlens: Tensor, total_tokens: int, size: int, rank: int) -> Tensor:
        if engine is not None and cu_seqlens.device.type == "cuda":
            return engine.thd_get_partitioned_indices(cu_seqlens, total_tokens, size, rank)
        return partitioned_indices(cu_seqlens, total_tokens, size, rank)

    vars(utils)["tex"] = SimpleNamespace(thd_get_partitioned_indices=indices)


def _count_layers_with_experts() -> None:
    """Lets Megatron average experts' losses over a Megalodon's layers that have experts.

    It counts a pattern's E, or what --moe-layer-freq makes of all layers, and all that predict
    further tokens. By that count it also makes the tensors of pipeline stages without experts,
    which have to be as long as those of the others: else they wait for each other for good.
    """
    report = MoEMetricsTracker.report

    @functools.wraps(report)
    def report_of_layers(self: MoEMetricsTracker, *args: Any, **kwargs: Any) -> str:
        arguments = megatron_arguments()
        if getattr(arguments, f"{ARGUMENT_PREFIX}chunk_size", None) is None:
            return report(self, *args, **kwargs)
        found = number_of_layers_with_experts(arguments)
        if "num_moe_layers" in kwargs:
            kwargs["num_moe_layers"] = found
        else:
            # To which it adds the layers that predict further tokens.
            kwargs["num_layers"] = arguments.num_layers
            kwargs["moe_layer_freq"] = [found - (arguments.mtp_num_layers or 0)]
        return report(self, *args, **kwargs)

    _replace(MoEMetricsTracker, "report", report_of_layers)


def number_of_layers_with_experts(arguments: Namespace) -> int:
    """Of a Megalodon, by Megatron's arguments; those that predict further tokens included."""
    pattern = arguments.hybrid_layer_pattern
    layers = layers_of(
        pattern, arguments.num_layers, arguments.num_experts, arguments.moe_layer_freq
    )
    found = sum(symbol in "EX" for symbol in layers)
    depths = arguments.mtp_num_layers or 0
    if depths and arguments.mtp_use_repeated_layer:
        depths = 1
    return found + depths * sum(symbol in "EX" for symbol in layers_of_a_depth(pattern, layers))


def _predict_without_transformer_engine() -> None:
    """Lets Megatron-LM's main build layers that predict further tokens where there is no engine.

    It asks whether their linear layer is of a class that it then has no more than a stand-in for.
    """
    name = "is_inference_column_parallel_linear"
    try:
        getattr(multi_token_prediction, name, bool)(None)
    except TypeError:
        setattr(multi_token_prediction, name, lambda module: False)


def count_conversations() -> None:
    """Lets Megatron evaluate every pack of conversations, with --sft and --full-validation.

    It then asks for no number of samples, and its dataset of conversations answers with that.
    What imports that dataset later than the spec calls this by itself.
    """
    from megatron.training.datasets.sft_dataset import SFTDataset

    length = SFTDataset.__len__
    if hasattr(length, "corrects"):
        return

    @functools.wraps(length)
    def number_of_samples(self: Any) -> int:
        return len(self.indices) if self.num_samples is None else length(self)

    _replace(SFTDataset, "__len__", number_of_samples)


def write_trackers_whole() -> None:
    """Lets a run go on that was killed while it noted which of its checkpoints is the newest.

    Megatron empties the file before it writes the number. What imports Megatron's checkpointing
    later than the spec calls this by itself.
    """
    from megatron.core.msc_utils import MultiStorageClientFeature
    from megatron.training import checkpointing

    storage = checkpointing.maybe_msc
    if hasattr(storage, "corrects"):
        return

    class Storage:
        """Megatron's files, of which those that are written here are written whole."""

        corrects = storage

        def __getattr__(self, name: str) -> Any:
            return getattr(storage, name)

        def open(self, path: str, mode: str = "r") -> Any:
            """As Megatron's; what `w` makes is there once it is closed."""
            if mode != "w" or MultiStorageClientFeature.is_enabled():
                return storage.open(path, mode)
            return _written_whole(Path(path))

    vars(checkpointing)["maybe_msc"] = Storage()


@contextmanager
def _written_whole(path: Path) -> Iterator[io.StringIO]:
    text = io.StringIO()
    yield text
    write_text(path, text.getvalue())
