"""Counts what a rank holds, keeps for backward and sends while its share of the model runs."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megalodon_mcore.config import MegalodonConfig
from megalodon_mcore.planning.layout import ParallelLayout
from megalodon_mcore.planning.rank import META, build_stage, check, fake_rank, meta_as_cuda

BYTES_FLOAT32 = 4


class KeptBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes of the storages that autograd keeps, a model's parameters aside.

    `kept` has them by the innermost module that saved them, without the layer's number and an
    expert's; `peak` is
    the most that there was of all.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(self._pack, lambda saved: saved.tensor)
        self.kept: Counter[str] = Counter()
        self.peak = 0
        self._parameters = {p.untyped_storage()._cdata for p in model.parameters()}
        # By storage: who saved it, and how often it is saved now.
        self._savers: dict[int, str] = {}
        self._times: Counter[int] = Counter()
        self._running = [""]
        for name, module in model.named_modules():
            name = re.sub(r"^decoder\.layers\.\d+", "layer", name)
            self._watch(re.sub(r"\.local_experts\.\d+", "", name), module)

    def _watch(self, name: str, module: torch.nn.Module) -> None:
        def leave(*_: object) -> None:
            self._running.pop()

        module.register_forward_pre_hook(lambda *_: self._running.append(name))
        module.register_forward_hook(leave)

    def _pack(self, tensor: Tensor) -> _Saved:
        address = tensor.untyped_storage()._cdata
        if address not in self._parameters:
            self._times[address] += 1
            if self._times[address] == 1:
                saver = self._savers[address] = self._running[-1]
                self.kept[saver] += tensor.untyped_storage().nbytes()
                self.peak = max(self.peak, self.kept.total())
        return _Saved(tensor, self)

    def _drop(self, tensor: Tensor) -> None:
        address = tensor.untyped_storage()._cdata
        if address not in self._parameters:
            self._times[address] -= 1
            if not self._times[address]:
                self.kept[self._savers[address]] -= tensor.untyped_storage().nbytes()


class _Saved:
    """A token that autograd holds in a tensor's place until it is done with it."""

    def __init__(self, tensor: Tensor, count: KeptBytes) -> None:
        self.tensor, self.count = tensor, count

    def __del__(self) -> None:
        self.count._drop(self.tensor)


class SentBytes(TorchDispatchMode):
    """Counts what this rank sends in collectives, were every one a ring's.

    `sent` and `calls` are by (kind, group). A ring all-gather or reduce-scatter over n ranks sends
    (n-1)/n of the whole tensor from each of them, an all-reduce twice that.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[tuple[str, str]] = Counter()
        self.calls: Counter[tuple[str, str]] = Counter()
        self._names = _GroupNames()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func.namespace == "c10d":
            self._count(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple) -> None:
        group = next(
            torch.distributed.ProcessGroup.unbox(value)
            for value in args
            if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type())
        )
        ranks, (written, read) = group.size(), args[:2]
        if name.startswith("allreduce"):
            kind, sent = "all-reduce", 2 * (ranks - 1) * _bytes(written) // ranks
        elif name == "alltoall_base_":
            row = _bytes(read) // max(len(read), 1)
            to_itself = args[4][group.rank()] if args[4] else len(read) // ranks
            kind, sent = "all-to-all", row * (len(read) - to_itself)
        elif "gather" in name:
            kind, sent = "all-gather", (ranks - 1) * _bytes(read)
        elif "reduce_scatter" in name:
            kind, sent = "reduce-scatter", (ranks - 1) * _bytes(written)
        else:
            raise AssertionError(f"{name} is not counted")
        if ranks > 1:
            key = kind, self._names.name(group)
            self.sent[key] += sent
            self.calls[key] += 1


class _GroupNames:
    """Names by a group's ranks; those of experts by the group itself, for others have its ranks."""

    def __init__(self) -> None:
        state = parallel_state
        self._of_experts = {
            group.group_name: name
            for name, group in (
                ("EP", state.get_expert_model_parallel_group()),
                ("TP x EP", state.get_expert_tensor_and_model_parallel_group()),
            )
            if state.get_expert_model_parallel_world_size() > 1
        }
        groups = {
            "DP x CP": state.get_data_parallel_group(with_context_parallel=True),
            "TP x CP": state.get_tensor_and_context_parallel_group(),
            "CP": state.get_context_parallel_group(),
            "TP": state.get_tensor_model_parallel_group(),
        }
        self._by_ranks = {_ranks_of(group): name for name, group in groups.items()}

    def name(self, group: torch.distributed.ProcessGroup) -> str:
        """What the report calls it."""
        if group.group_name in self._of_experts:
            return self._of_experts[group.group_name]
        return self._by_ranks.get(_ranks_of(group), f"{group.size()} ranks of a head")


def _ranks_of(group: torch.distributed.ProcessGroup) -> frozenset[int]:
    return frozenset(torch.distributed.get_process_group_ranks(group))


def _bytes(tensors: Tensor | list[Tensor]) -> int:
    return sum(z.nbytes for z in (tensors if isinstance(tensors, list) else [tensors]))


@dataclass
class Measured:
    """The sizes of what a rank holds, and of one micro-batch keeps and sends."""

    numbers: Counter = field(default_factory=Counter)
    """Parameters by dtype."""
    experts: Counter = field(default_factory=Counter)
    """Those of them that expert-parallel ranks do not share."""
    once: Counter = field(default_factory=Counter)
    """Bytes of gradients that a step sums over other groups than dp * cp, by which they are."""
    kept: Counter = field(default_factory=Counter)
    """Bytes kept after the forward pass, by module."""
    again: Counter = field(default_factory=Counter)
    """Bytes kept on top of these while the backward pass runs forward again."""
    forward: Counter = field(default_factory=Counter)
    """Bytes sent, by (kind, group)."""
    backward: Counter = field(default_factory=Counter)
    forward_calls: Counter = field(default_factory=Counter)
    backward_calls: Counter = field(default_factory=Counter)

    def plus(self, layer: Measured, times: int) -> Measured:
        """With so many layers more."""
        sums = {}
        for name, more in vars(layer).items():
            held = Counter(getattr(self, name))
            for key, value in more.items():
                held[key] += times * value
            sums[name] = Counter({key: value for key, value in held.items() if value})
        return Measured(**sums)


@dataclass(frozen=True)
class Plan:
    """Layers by symbol, every pipeline stage that differs, and the rank that they are of."""

    layers: dict[str, Measured]
    stages: dict[int, Measured]
    cp_rank: int


def measure_plan(config: MegalodonConfig, layout: ParallelLayout) -> Plan:
    """Runs stages of few layers, which tell what each further layer of a symbol takes.

    Args:
        config: the model; its vocabulary with padding.
        layout: how ranks share it.

    Raises:
        ValueError: they cannot; one sentence names the argument and what would work.
    """
    check(config, layout)
    cp_rank = rank_with_most(layout, config.chunk_size)
    # Replicas change nothing within a micro-batch, beyond those that share out experts.
    world = dataclasses.replace(layout, dp=layout.ep // math.gcd(layout.ep, layout.cp))

    @functools.cache
    def measure(stage: int, layers: str) -> Measured:
        return measure_stage(config, world, stage, layers, cp_rank)

    # No model is without a block.
    block = "M" if "M" in config.symbols else "X"
    layers = {}
    for symbol in dict.fromkeys(config.symbols):
        fewer = symbol if symbol == block else block + symbol
        layers[symbol] = measure(0, fewer + symbol).plus(measure(0, fewer), -1)
    stages = {}
    for stage in stages_that_differ(layout, config.symbols):
        missing = Counter(layout.stage_symbols(config.symbols, stage))
        # The last ones are run again when most is kept.
        one_each = sorted(missing, key=layout.stage_symbols(config.symbols, stage).rindex)
        one_each = one_each if block in missing else [block, *one_each]
        stages[stage] = measure(stage, "".join(one_each))
        missing.subtract(one_each)
        for symbol, times in missing.items():
            stages[stage] = stages[stage].plus(layers[symbol], times)
    return Plan(layers, stages, cp_rank)


def stages_that_differ(layout: ParallelLayout, symbols: str) -> list[int]:
    """All, where their layers do; else first, second and last, the second like those after it."""
    held = {layout.stage_symbols(symbols, stage) for stage in range(layout.pp)}
    if layout.layers_by_stage or len(held) > 1:
        return list(range(layout.pp))
    return sorted({0, min(1, layout.pp - 1), layout.pp - 1})


def rank_with_most(layout: ParallelLayout, chunk_size: int) -> int:
    """The context-parallel rank to measure: the last of those whose chunks lack most positions."""
    lacking = [
        sum(span.start % chunk_size for span in held) for held in layout.context_layout().spans
    ]
    return max(range(layout.cp), key=lambda rank: (lacking[rank], rank))


def measure_stage(
    config: MegalodonConfig,
    layout: ParallelLayout,
    stage: int,
    layers: str,
    cp_rank: int = 0,
) -> Measured:
    """Builds a stage as one rank has it and runs a micro-batch; the arguments are build_stage's."""
    is_first, is_last = stage == 0, stage == layout.pp - 1
    with fake_rank(layout, stage, cp_rank=cp_rank), meta_as_cuda():
        model = build_stage(config, layout, stage, layers).train()
        batch = layout.micro_batch_size
        length = layout.seq_length // layout.cp
        tokens = torch.zeros(batch, length, dtype=torch.int64, device=META)
        received = torch.zeros(
            (layout.residual_length, batch, config.hidden_size),
            dtype=model.config.params_dtype,
            device=META,
            requires_grad=True,
        )
        if not is_first:
            model.set_input_tensor(received)
        count, forward, backward = KeptBytes(model), SentBytes(), SentBytes()
        with ExitStack() as counting:
            counting.enter_context(count)
            with forward:
                result = model(tokens, tokens, None, labels=tokens if is_last else None)
            kept = Counter(count.kept)
            with backward:
                torch.autograd.backward(result, torch.zeros_like(result))
        measured = Measured(kept=kept, forward=forward.sent, backward=backward.sent)
        measured.again[""] = count.peak - kept.total()
        measured.forward_calls, measured.backward_calls = forward.calls, backward.calls
        if not is_last:
            measured.forward["send", "PP"] = result.nbytes
        if not is_first:
            measured.backward["send", "PP"] = received.nbytes
        measured.numbers = numbers_of(model)
        measured.experts = numbers_of(model, experts_alone=True)
        measured.once = _summed_once(model, layout)
    return measured


def numbers_of(model: torch.nn.Module, experts_alone: bool = False) -> Counter:
    """A model's parameters by dtype, or those alone that expert-parallel ranks do not share."""
    numbers = Counter()
    for parameter in model.parameters():
        # Megatron's mark.
        if not (experts_alone and getattr(parameter, "allreduce", True)):
            numbers[parameter.dtype] += parameter.numel()
    return numbers


def _summed_once(model: torch.nn.Module, layout: ParallelLayout) -> Counter:
    once = Counter()
    for name, parameter in model.named_parameters():
        gradient = BYTES_FLOAT32 * parameter.numel()
        if getattr(parameter, "sequence_parallel", False):
            routes = "router." in name or name.endswith("gate_weight")
            once["router over TP" if routes else "norms over TP"] += all_reduced(
                gradient, layout.tp
            )
        is_vocabulary = name.startswith(("embedding", "output_layer"))
        if is_vocabulary and model.share_embeddings_and_output_weights and layout.pp > 1:
            once["tied embedding over PP"] += all_reduced(gradient, 2)
    return once


def all_reduced(size: int, ranks: int) -> int:
    """Bytes that a ring sends from each rank to sum a tensor."""
    return 2 * (ranks - 1) * size // ranks


def model_bytes(
    numbers: Counter, layout: ParallelLayout, experts: Counter | None = None
) -> dict[str, int]:
    """Bytes of weights, gradients and Adam's state of so many parameters of each dtype.

    Megatron adds gradients up in float32 and keeps two float32 moments, and a float32 main copy of
    every bf16 number. Its padding of buffers, some hundreds of numbers in each, is not counted.

    Args:
        numbers: parameters by dtype.
        layout: whose ranks have shards of the state.
        experts: those of them that fewer ranks share.
    """
    experts = experts or Counter()
    optimizer = 0
    for part, ranks in (
        (numbers - experts, layout.gradient_ranks),
        (experts, layout.expert_gradient_ranks),
    ):
        state = BYTES_FLOAT32 * (3 * part.total() - part[torch.float32])
        optimizer += math.ceil(state / ranks) if layout.distributed_optimizer else state
    return {
        "weights": sum(dtype.itemsize * count for dtype, count in numbers.items()),
        "gradients": BYTES_FLOAT32 * numbers.total(),
        "optimizer": optimizer,
    }


def memory(measured: Measured, layout: ParallelLayout, stage: int) -> dict[str, int]:
    """Bytes of a rank of this stage at its fullest; 1F1B keeps pp - stage micro-batches."""
    return model_bytes(measured.numbers, layout, measured.experts) | {
        "activations": (layout.pp - stage) * measured.kept.total(),
        "recomputed meanwhile": measured.again.total(),
    }


def step_traffic(measured: Measured, layout: ParallelLayout) -> dict[str, int]:
    """Bytes that a rank of a stage sends once a step, however many micro-batches it has."""
    sent = Counter()
    for part, ranks in (
        (measured.numbers - measured.experts, layout.gradient_ranks),
        (measured.experts, layout.expert_gradient_ranks),
    ):
        held = model_bytes(part, layout)
        if layout.distributed_optimizer:
            for name in ("gradients", "weights"):
                sent[name] += held[name] * (ranks - 1) // ranks
        else:
            sent["gradients"] += all_reduced(held["gradients"], ranks)
    return dict(sent) | measured.once
