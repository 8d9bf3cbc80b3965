"""Runs an unmodified CUDA script, such as Megatron-LM's pretrain_gpt.py, with no GPU.

    torchrun --nproc-per-node 2 -m megalodon_mcore.cpu pretrain_gpt.py ARGUMENTS
    python -m megalodon_mcore.cpu pretrain_gpt.py ARGUMENTS

`install()` makes `torch.cuda` answer for the CPU until its `undo()`; where `torch.cuda` already
answers (a GPU is there, or a stand-in is) it changes nothing. What is replaced, and by what:

- torch.cuda's devices, streams, events, memory figures, nvtx: the table in `_StandIn.cuda_names`.
- Every other public callable of torch.cuda: a refusal that names it, in place of a crash.
- torch.cuda.default_generators, _initialized: the CPU's generator, with which torch.cuda's own RNG
  functions work, and Megatron's copies of them.
- `device=`, `.to(...)` and `pin_memory=` in torch calls: `_CudaMeansCpu`, in every thread and in
  backward passes.
- Tensor.cuda, .pin_memory, .record_stream: nothing, the tensor is already there.
- Tensor.cpu, .to("cpu"): a copy, as from a GPU; an asynchronous save relies on its snapshot.
- Tensor.type: torch.cuda's names, by which Megatron's optimizers sort parameters.
- torch.load, set_default_device, autocast: the same with the CPU for CUDA.
- torch.accelerator.is_available: False, or the DataLoader would pin memory.
- DataLoader.__iter__: spares the generator, since a GPU's is not moved by the loader's draw, and
  training that resumes makes its loaders after it restored the generator.
- init_process_group, new_group, barrier: gloo for nccl, and no device ids. A process's groups share
  one of gloo's devices, each of which has a thread that looks for work a hundred times a second.
- multiprocessing's spawned children, one of which writes checkpoints: they install it too.
- torch.compile: nothing, as Megatron's jit_fuser compiles. `kernels.plain` does so all the same,
  for which torch._inductor is kept from looking for a GPU that Triton drives.
- Transformer Engine's optimizers: an ImportError, on which Megatron takes torch's.
- CUDA_DEVICE_MAX_CONNECTIONS: 1 unless it is set, which Megatron demands for overlap on a GPU.
- glibc's allocator: keeps freed memory; `undo()` leaves that.
- Megatron's warning that the CPU's RNG state changed: silence, for the two states are one here.

CUDA graphs, memory pools, raw stream and library handles, profilers and device sensors are refused.
Tensor.is_cuda stays False and Tensor.device the CPU, so that kernels which ask their arguments, as
Transformer Engine's and Triton's do, refuse by themselves.
"""

import contextlib
import functools
import importlib.util
import logging
import multiprocessing.spawn
import os
import runpy
import sys
import threading
import time
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch._inductor.config
import torch.cuda.nvtx
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader

from megalodon_mcore.allocator import keep_freed_memory

_CPU = torch.device("cpu")

# What works over the names that are replaced, so it stays as it is.
_UNCHANGED = frozenset(
    """
    StreamContext device device_of init is_initialized stream
    get_rng_state get_rng_state_all set_rng_state set_rng_state_all
    initial_seed manual_seed manual_seed_all seed seed_all
    get_device_capability get_device_name is_bf16_supported is_tf32_supported
    memory_allocated memory_cached memory_reserved cudaStatus
    max_memory_allocated max_memory_cached max_memory_reserved
    """.split()
)
# Private, but Megatron's profiling options call them.
_REFUSED_MEMORY = ("_dump_snapshot", "_record_memory_history", "_snapshot")


def _on_cpu(device: object) -> object:
    """The CPU in place of a CUDA device (an object, a name or an index); anything else as it is."""
    if isinstance(device, torch.device):
        return _CPU if device.type == "cuda" else device
    if isinstance(device, str):
        return _CPU if device.partition(":")[0] == "cuda" else device
    return _CPU if isinstance(device, int) and not isinstance(device, bool) else device


@functools.cache
def _gloo_device(process: int) -> object:
    """The one that all groups of this process share."""
    return dist.ProcessGroupGloo.create_default_device()


class _CudaMeansCpu(TorchFunctionMode):
    """Puts the CPU wherever a torch call names a CUDA device."""

    def __torch_function__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if not kwargs and (func is not torch.Tensor.to or len(args) < 2):
            return func(*args)
        kwargs = dict(kwargs or {})
        if func is torch.device:
            return func(*args, **kwargs)
        if func is torch.Tensor.to:
            target = args[1] if len(args) > 1 else kwargs.get("device")
            if isinstance(target, str) and target == "cpu":
                kwargs["copy"] = True
            elif len(args) > 1:
                args = (args[0], _on_cpu(target), *args[2:])
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return func(*args, **kwargs)


def _refusal(name: str, original: Callable) -> Callable:
    """A stand-in that raises when called, and is a class where the original is one."""

    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(f"{name} needs a real GPU: the CPU stand-in has nothing for it.")

    if isinstance(original, type):
        # No more than that: Megatron asks CUDAGraph for a method before it relies on graphs.
        return type(original.__name__, (), {"__new__": refuse})
    # torch._dynamo looks for __wrapped__ on some of them while it is imported.
    return functools.wraps(original)(refuse)


def _nothing(*args: object, **kwargs: object) -> None:
    """Stands for a call that only matters to a device that works apart from the host."""


class _Event:
    """An event: the CPU has done all that was asked before it, so only the clock is kept."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self._time: float | None = None

    def record(self, stream: object = None) -> None:
        self._time = time.perf_counter()

    def elapsed_time(self, end: "_Event") -> float:
        if self._time is None or end._time is None:
            raise RuntimeError("Both events must be recorded before their times are compared.")
        return 1000 * (end._time - self._time)

    def query(self) -> bool:
        return True

    wait = synchronize = _nothing


class _Stream:
    """A stream: the CPU runs everything in order, so streams only have an identity."""

    def __init__(self, device: object = None, priority: int = 0, **kwargs: object) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.priority = priority

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return True

    def __enter__(self) -> "_Stream":
        self._context = torch.cuda.stream(self)
        self._context.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._context.__exit__(*error)

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0

    @property
    def cuda_stream(self) -> int:
        raise NotImplementedError("A stream's pointer needs a real GPU: the CPU stand-in has none.")

    synchronize = wait_event = wait_stream = _nothing


class _InstallOnUnpickling:
    """Travels to a new Python process in what multiprocessing tells it before anything else."""

    def __init__(self, devices: int) -> None:
        self.devices = devices

    def __reduce__(self) -> tuple:
        return install, (self.devices,)


class _StandIn:
    """The replacements in place; `undo()`, or leaving its `with` block, restores every one exactly.

    The thread that installed it undoes it, with no torch function mode entered since left open.
    """

    def __init__(self, devices: int = 0) -> None:
        self.devices = devices
        self._device = 0
        self._undo = contextlib.ExitStack()

    def undo(self) -> None:
        """Restores what was replaced; a second call does nothing."""
        self._undo.close()

    def __enter__(self) -> "_StandIn":
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def cuda_names(self) -> dict[str, Any]:
        """`torch.cuda`'s names and what stands for them."""
        local = threading.local()
        default = _Stream.__new__(_Stream)
        default.device, default.priority = torch.device("cuda", 0), 0
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        # Capability 8.0 has bfloat16 but none of the later kernels that Megatron would choose.
        properties = types.SimpleNamespace(
            name="CPU", major=8, minor=0, total_memory=memory, multi_processor_count=os.cpu_count()
        )

        def set_stream(stream: _Stream | None) -> None:
            local.stream = stream or current_stream()

        def current_stream(device: object = None) -> _Stream:
            return getattr(local, "stream", default)

        return {
            "is_available": lambda: True,
            "_initialized": True,
            "device_count": lambda: self.devices,
            "current_device": lambda: self._device,
            "set_device": self._set_device,
            "_exchange_device": self._exchange_device,
            # A function of its own: the compiler has a table of them.
            "_maybe_exchange_device": lambda index: self._exchange_device(index),
            "get_device_properties": lambda device=None: properties,
            "synchronize": _nothing,
            "ipc_collect": _nothing,
            "default_generators": (torch.default_generator,) * self.devices,
            "Stream": _Stream,
            "Event": _Event,
            "current_stream": current_stream,
            "default_stream": lambda device=None: default,
            "set_stream": set_stream,
            "is_current_stream_capturing": lambda: False,
            # No memory but the host's is in use, so every figure of the allocator is zero.
            "memory_stats": lambda device=None: defaultdict(int),
            "mem_get_info": lambda device=None: (
                os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"),
                memory,
            ),
            "device_memory_used": lambda device=None: 0,
            "empty_cache": _nothing,
            "reset_accumulated_memory_stats": _nothing,
            "reset_max_memory_allocated": _nothing,
            "reset_max_memory_cached": _nothing,
            "reset_peak_memory_stats": _nothing,
            # The typed constructors, such as torch.cuda.FloatTensor.
            **{n: getattr(torch, n) for n in torch.cuda.__all__ if n.endswith("Tensor")},
        }

    def _set_device(self, device: object) -> None:
        index = torch.cuda._get_device_index(device, optional=True)
        if index >= self.devices:
            raise RuntimeError(
                f"There is no device {index}: the CPU stands in for only {self.devices}."
            )
        self._device = index if index >= 0 else self._device

    def _exchange_device(self, index: int) -> int:
        previous = self._device
        self._set_device(index)
        return previous

    def _replace(self, owner: object, name: str, value: object) -> None:
        """Sets an attribute until undo, which deletes it again where it was only inherited."""
        if name in vars(owner):
            self._undo.callback(setattr, owner, name, vars(owner)[name])
        else:
            self._undo.callback(delattr, owner, name)
        setattr(owner, name, value)

    def _replace_cuda(self) -> None:
        """Stands in for the table's names and refuses every other public callable."""
        names = self.cuda_names()
        for name in set(torch.cuda.__all__) - names.keys() - _UNCHANGED:
            value = getattr(torch.cuda, name)
            exception = isinstance(value, type) and issubclass(value, Exception)
            if callable(value) and not exception and not name.endswith("Storage"):
                names[name] = _refusal(f"torch.cuda.{name}", value)
        submodules = (torch.cuda.graphs, torch.cuda.memory, torch.cuda.random, torch.cuda.streams)
        for name, value in names.items():
            original = vars(torch.cuda)[name]
            self._replace(torch.cuda, name, value)
            for submodule in submodules:
                # torch.cuda's own functions look in the submodule that they live in.
                if vars(submodule).get(name) is original:
                    self._replace(submodule, name, value)
        for name in _REFUSED_MEMORY:
            value = _refusal(f"torch.cuda.memory.{name}", getattr(torch.cuda.memory, name))
            self._replace(torch.cuda.memory, name, value)
        for name in ("mark", "range_end", "range_pop", "range_push", "range_start"):
            self._replace(torch.cuda.nvtx, name, _nothing)

    def _replace_tensor_methods(self) -> None:
        type_of = torch.Tensor.type

        def same(tensor: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
            return tensor

        def cpu(
            tensor: torch.Tensor, memory_format: torch.memory_format = torch.preserve_format
        ) -> torch.Tensor:
            return tensor.to(_CPU, copy=True, memory_format=memory_format)

        def type_(
            tensor: torch.Tensor, dtype: object = None, *args: object, **kwargs: object
        ) -> str | torch.Tensor:
            if dtype is None:
                name = type_of(tensor)
                cuda = name.startswith("torch.cuda.") or tensor.device.type != "cpu"
                return name if cuda else name.replace("torch.", "torch.cuda.", 1)
            if isinstance(dtype, str):
                dtype = dtype.replace("torch.cuda.", "torch.")
            # pyrefly: ignore[no-matching-overload]
            return type_of(tensor, dtype, *args, **kwargs)

        for name, value in (
            ("cuda", same),
            ("pin_memory", same),
            ("record_stream", _nothing),
            ("cpu", cpu),
            ("type", type_),
        ):
            self._replace(torch.Tensor, name, value)

    def _replace_torch_functions(self) -> None:
        load, default, autocast = torch.load, torch.set_default_device, torch.autocast.__init__
        loader = DataLoader.__iter__

        @functools.wraps(load)
        def load_here(
            f: object, map_location: object = None, *args: object, **kw: object
        ) -> object:
            # A file saved from a GPU, loaded with no location, would go back to one.
            location = "cpu" if map_location is None else _on_cpu(map_location)
            return load(f, location, *args, **kw)

        @functools.wraps(autocast)
        def autocast_here(context: object, device_type: str, *args: object, **kw: object) -> None:
            autocast(context, "cpu" if device_type == "cuda" else device_type, *args, **kw)

        @functools.wraps(loader)
        def iterate(data: DataLoader) -> Iterator:
            state = torch.get_rng_state()
            try:
                return loader(data)
            finally:
                torch.set_rng_state(state)

        for owner in (torch, torch.serialization):
            self._replace(owner, "load", load_here)
        self._replace(torch, "set_default_device", lambda device: default(_on_cpu(device)))
        self._replace(torch.autocast, "__init__", autocast_here)
        self._replace(torch.accelerator, "is_available", lambda: False)
        self._replace(DataLoader, "__iter__", iterate)

    def _replace_distributed(self) -> None:
        def over_gloo(function: Callable) -> Callable:
            @functools.wraps(function)
            def call(*args: object, **kwargs: object) -> object:
                for name in ("device_id", "device_ids", "pg_options"):
                    kwargs.pop(name, None)
                args = tuple("gloo" if isinstance(a, str) and "nccl" in a else a for a in args)
                if "nccl" in str(kwargs.get("backend")):
                    kwargs["backend"] = "gloo"
                if function.__name__ == "init_process_group" and not args:
                    kwargs["backend"] = kwargs.get("backend") or "gloo"
                return function(*args, **kwargs)

            return call

        make_group: Callable = dist.ProcessGroupGloo.__init__

        @functools.wraps(make_group)
        def make_group_here(group: object, *args: object, **kwargs: object) -> None:
            # The store, the rank and the size; then names, if it is not gloo's own options.
            if len(args) > 3 or "options" in kwargs:
                make_group(group, *args, **kwargs)
                return
            options = dist.ProcessGroupGloo._Options()
            options._devices = [_gloo_device(os.getpid())]
            for name in {"timeout", "enable_reconfigure"} & kwargs.keys():
                setattr(options, {"timeout": "_timeout"}.get(name, name), kwargs.pop(name))
            make_group(group, *args, **kwargs, options=options)

        self._replace(dist.ProcessGroupGloo, "__init__", make_group_here)
        for name in ("barrier", "init_process_group", "new_group"):
            value = over_gloo(getattr(dist, name))
            for owner in (dist, dist.distributed_c10d):
                self._replace(owner, name, value)

    def _enter_threads_and_processes(self) -> None:
        run_thread, prepare = threading.Thread.run, multiprocessing.spawn.get_preparation_data
        engine = torch.autograd.graph._engine_run_backward

        def run(thread: threading.Thread) -> None:
            # A mode holds only in the thread that entered it.
            with _CudaMeansCpu():
                run_thread(thread)

        def preparation(name: str) -> dict:
            return {**prepare(name), "cuda_stand_in": _InstallOnUnpickling(self.devices)}

        @functools.wraps(engine)
        def backward(*args: object, **kwargs: object) -> object:
            # Tensor.backward is a torch function, so the mode is off while it runs.
            with _CudaMeansCpu():
                return engine(*args, **kwargs)

        for owner in (torch.autograd, torch.autograd.graph):
            self._replace(owner, "_engine_run_backward", backward)
        self._replace(threading.Thread, "run", run)
        self._replace(multiprocessing.spawn, "get_preparation_data", preparation)
        self._undo.enter_context(_CudaMeansCpu())

    def _set_process_state(self) -> None:
        if "CUDA_DEVICE_MAX_CONNECTIONS" not in os.environ:
            os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
            self._undo.callback(os.environ.pop, "CUDA_DEVICE_MAX_CONNECTIONS", None)
        self._undo.enter_context(torch.compiler.set_stance("force_eager"))
        no_look = torch._inductor.config.patch(triton_disable_device_detection=True)
        self._undo.enter_context(no_look)

        def about_something_else(record: logging.LogRecord) -> bool:
            return "CPU RNG state changed" not in record.getMessage()

        logger = logging.getLogger("megatron.core.tensor_parallel.random")
        logger.addFilter(about_something_else)
        self._undo.callback(logger.removeFilter, about_something_else)

    def _hide_fused_optimizers(self) -> None:
        name = "transformer_engine.pytorch.optimizers"
        if importlib.util.find_spec("transformer_engine") is None:
            return
        with contextlib.suppress(ImportError):
            # It imports them itself, so it comes first.
            importlib.import_module("transformer_engine.pytorch")
            self._undo.callback(sys.modules.__setitem__, name, sys.modules[name])
            sys.modules[name] = None

    def put_in_place(self) -> None:
        """Replaces everything, or nothing where a replacement fails."""
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self.undo)
            self._set_process_state()
            self._replace_cuda()
            self._replace_tensor_methods()
            self._replace_torch_functions()
            self._replace_distributed()
            self._hide_fused_optimizers()
            self._enter_threads_and_processes()
            on_failure.pop_all()


def install(devices: int | None = None) -> _StandIn:
    """Makes `torch.cuda` answer for the CPU until the returned object's `undo()`.

    Where `torch.cuda` already answers, for a GPU or for a stand-in installed before, nothing is
    changed and `undo()` does nothing, so that whoever installed the stand-in first removes it.

    Args:
        devices: how many devices `torch.cuda` counts; by default LOCAL_WORLD_SIZE, or 1.
    """
    stand_in = _StandIn(devices or int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if not torch.cuda.is_available():
        keep_freed_memory()
        stand_in.put_in_place()
    return stand_in


def main(arguments: list[str] | None = None) -> None:
    """Runs the script named first with the rest of the arguments, as python itself would."""
    arguments = sys.argv[1:] if arguments is None else arguments
    problem = ""
    if not arguments:
        problem = "name the script to run: python -m megalodon_mcore.cpu SCRIPT [ARGUMENTS]"
    elif not Path(arguments[0]).is_file():
        problem = f"there is no script {arguments[0]}"
    if problem:
        print(f"megalodon_mcore.cpu: {problem}.", file=sys.stderr)
        sys.exit(2)
    install()
    if "WORLD_SIZE" not in os.environ:
        # Without torchrun the script is its own rendezvous, on any free port.
        os.environ.setdefault("MASTER_ADDR", "localhost")
        os.environ.setdefault("MASTER_PORT", "0")
    sys.argv = list(arguments)
    if not sys.flags.safe_path:
        sys.path[0] = str(Path(arguments[0]).resolve().parent)
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    # What travels to other processes must be found by this module's name, not as __main__.
    from megalodon_mcore.cpu import main as run_main

    run_main()
