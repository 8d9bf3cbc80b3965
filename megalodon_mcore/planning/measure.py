"""Counts what a rank holds, keeps for backward and sends while its share of the model runs."""

from __future__ import annotations

import dataclasses
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

    `kept` has them by the innermost module that saved them, without the layer's number; `peak` is
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
            self._watch(re.sub(r"^decoder\.layers\.\d+", "layer", name), module)

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
        self._names = _names_of_groups()

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
            kind, sent = "all-to-all", row * (sum(args[4]) - args[4][group.rank()])
        elif "gather" in name:
            kind, sent = "all-gather", (ranks - 1) * _bytes(read)
        elif "reduce_scatter" in name:
            kind, sent = "reduce-scatter", (ranks - 1) * _bytes(written)
        else:
            raise AssertionError(f"{name} is not counted")
        if ranks > 1:
            members = frozenset(torch.distributed.get_process_group_ranks(group))
            key = kind, self._names.get(members, f"{ranks} ranks of a head")
            self.sent[key] += sent
            self.calls[key] += 1


def _names_of_groups() -> dict[frozenset[int], str]:
    groups = {
        "DP x CP": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "TP x CP": parallel_state.get_tensor_and_context_parallel_group(),
        "CP": parallel_state.get_context_parallel_group(),
        "TP": parallel_state.get_tensor_model_parallel_group(),
    }
    members = torch.distributed.get_process_group_ranks
    return {frozenset(members(group)): name for name, group in groups.items()}


def _bytes(tensors: Tensor | list[Tensor]) -> int:
    return sum(z.nbytes for z in (tensors if isinstance(tensors, list) else [tensors]))


@dataclass
class Measured:
    """The sizes of what a rank holds, and of one micro-batch keeps and sends."""

    numbers: Counter = field(default_factory=Counter)
    """Parameters by dtype."""
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
    """A layer, every pipeline stage that differs from others, and the rank that they are of."""

    layer: Measured
    stages: dict[int, Measured]
    cp_rank: int


def measure_plan(config: MegalodonConfig, layout: ParallelLayout) -> Plan:
    """Runs stages of one layer, and one of two, which tells what each further layer takes.

    Args:
        config: the model; its vocabulary with padding.
        layout: how ranks share it.

    Raises:
        ValueError: they cannot; one sentence names the argument and what would work.
    """
    check(config, layout)
    cp_rank = rank_with_most(layout, config.chunk_size)
    # Replicas change nothing within a micro-batch.
    world = dataclasses.replace(layout, dp=1)

    def measure(stage: int, layers: int = 1) -> Measured:
        return measure_stage(config, world, stage, layers, cp_rank)

    first = measure(0)
    layer = measure(0, layers=2).plus(first, -1)
    stages, known = {}, {0: first}
    for stage in stages_that_differ(layout):
        one = known.get(stage) or measure(stage)
        stages[stage] = one.plus(layer, layout.stage_layers(config.num_layers, stage) - 1)
    return Plan(layer, stages, cp_rank)


def stages_that_differ(layout: ParallelLayout) -> list[int]:
    """All, where their layers do; else first, second and last, the second like those after it."""
    if layout.layers_by_stage:
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
    layers: int,
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
        measured.once = _summed_once(model, layout)
    return measured


def numbers_of(model: torch.nn.Module) -> Counter:
    """A model's parameters by dtype."""
    numbers = Counter()
    for parameter in model.parameters():
        numbers[parameter.dtype] += parameter.numel()
    return numbers


def _summed_once(model: torch.nn.Module, layout: ParallelLayout) -> Counter:
    once = Counter()
    for name, parameter in model.named_parameters():
        gradient = BYTES_FLOAT32 * parameter.numel()
        if getattr(parameter, "sequence_parallel", False):
            once["norms over TP"] += all_reduced(gradient, layout.tp)
        is_vocabulary = name.startswith(("embedding", "output_layer"))
        if is_vocabulary and model.share_embeddings_and_output_weights and layout.pp > 1:
            once["tied embedding over PP"] += all_reduced(gradient, 2)
    return once


def all_reduced(size: int, ranks: int) -> int:
    """Bytes that a ring sends from each rank to sum a tensor."""
    return 2 * (ranks - 1) * size // ranks


def model_bytes(numbers: Counter, layout: ParallelLayout) -> dict[str, int]:
    """Bytes of weights, gradients and Adam's state of so many parameters of each dtype.

    Megatron adds gradients up in float32 and keeps two float32 moments, and a float32 main copy of
    every bf16 number. Its padding of buffers, some hundreds of numbers in each, is not counted.
    """
    total = numbers.total()
    shards = layout.gradient_ranks if layout.distributed_optimizer else 1
    main = total - numbers[torch.float32]
    return {
        "weights": sum(dtype.itemsize * count for dtype, count in numbers.items()),
        "gradients": BYTES_FLOAT32 * total,
        "optimizer": math.ceil(BYTES_FLOAT32 * (2 * total + main) / shards),
    }


def memory(measured: Measured, layout: ParallelLayout, stage: int) -> dict[str, int]:
    """Bytes of a rank of this stage at its fullest; 1F1B keeps pp - stage micro-batches."""
    return model_bytes(measured.numbers, layout) | {
        "activations": (layout.pp - stage) * measured.kept.total(),
        "recomputed meanwhile": measured.again.total(),
    }


def step_traffic(measured: Measured, layout: ParallelLayout) -> dict[str, int]:
    """Bytes that a rank of a stage sends once a step, however many micro-batches it has."""
    ranks, held = layout.gradient_ranks, model_bytes(measured.numbers, layout)
    if layout.distributed_optimizer:
        share = {name: held[name] * (ranks - 1) // ranks for name in ("gradients", "weights")}
    else:
        share = {"gradients": all_reduced(held["gradients"], ranks)}
    return share | measured.once
