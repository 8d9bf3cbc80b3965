"""Runs `megalodon-mcore pretrain` in forks of one process that has Megatron loaded.

Starting a rank costs ten seconds of imports, a fork none. The forks have the environment, arguments
and output of a process of their own; what only a real start can show is in test_command_line.py
and test_quickstart.py.
"""

import argparse
import ast
import atexit
import functools
import gc
import importlib
import inspect
import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
import traceback
import weakref
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

from training.reserved_port import reserved_port

TESTS = Path(__file__).parents[1]
READ_BY_IMPORTS = ("PYTHON", "TORCH", "TRITON", "CUDA_VISIBLE", "LD_", "NVTE")
"""Variables whose names begin so are looked at by what the server has imported already."""
SECONDS_AFTER_A_FAILURE = 5
IMPORTED_LATER = (
    "megatron.core.datasets.blended_megatron_dataset_builder",
    "megatron.core.datasets.gpt_dataset",
    "megatron.core.tokenizers.text",
    "megatron.training.training",
    "torch.utils.tensorboard",
)
"""By pretrain as it goes, which is half of a small run's time."""
OF_THE_SERVER = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    # Asks for a GPU in a way that leaves torch.cuda usable in forks.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}


class ProgramServer:
    """One server for this process, started when it is first needed."""

    _server: subprocess.Popen | None = None
    _lock = threading.Lock()

    @classmethod
    def run(
        cls, argv: list[str], processes: int, environment: dict[str, str], timeout: float
    ) -> tuple[int, str]:
        """Runs `megalodon_mcore ARGV` in every rank; the exit status (1 if one fails), the output.

        Raises:
            TimeoutError: it takes longer; its processes are gone then.
        """
        with TemporaryDirectory() as folder, reserved_port() as port:
            place, output = Path(folder), Path(folder) / "output"
            for rank in range(processes):
                cls._send(
                    argv=argv,
                    environment=environment | _world(rank, processes, port),
                    cwd=os.getcwd(),
                    output=str(output),
                    place=str(place / str(rank)),
                )
            try:
                code = _wait(place, processes, time.monotonic() + timeout)
            finally:
                _kill(place, processes)
            return code, output.read_text(errors="replace")

    @classmethod
    def _send(cls, **request: object) -> None:
        with cls._lock:
            if cls._server is None:
                path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
                cls._server = subprocess.Popen(
                    [sys.executable, "-c", "from training import program_server as s; s.serve()"],
                    stdin=subprocess.PIPE,
                    text=True,
                    env=os.environ | {"PYTHONPATH": path, **OF_THE_SERVER},
                )
                atexit.register(cls._server.kill)
            cls._server.stdin.write(json.dumps(request) + "\n")
            cls._server.stdin.flush()


def _world(rank: int, processes: int, port: int) -> dict[str, str]:
    if processes == 1:
        return {}
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _wait(place: Path, processes: int, deadline: float) -> int:
    codes: list[int] = []
    while time.monotonic() < deadline and len(codes) < processes:
        ended = [z for z in (place / f"{rank}.code" for rank in range(processes)) if z.exists()]
        if len(ended) > len(codes):
            codes = [int(file.read_text()) for file in ended]
            if any(codes):
                # Torchrun gives the others time to say what they think of it, too.
                deadline = min(deadline, time.monotonic() + SECONDS_AFTER_A_FAILURE)
        time.sleep(0.02)
    if not any(codes) and len(codes) < processes:
        raise TimeoutError(f"{processes} ranks are not done in time.")
    return int(any(codes))


def _kill(place: Path, processes: int) -> None:
    for rank in range(processes):
        code, pid = place / f"{rank}.code", place / f"{rank}.pid"
        if not code.exists() and pid.exists():
            os.kill(int(pid.read_text()), 9)
            while not code.exists():
                time.sleep(0.01)


def serve() -> None:
    """The server's life: forks for each request, and writes down how forks ended."""
    import torch

    from megalodon_mcore import cpu, missing_kernels

    torch.set_num_threads(1)
    missing_kernels.ignore_warnings()
    # Else what the stand-in of the test that starts this server has set would end with that test.
    os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
    before = dict(os.environ)
    cpu.install(devices=8)
    installed = {name: z for name, z in os.environ.items() if before.get(name) != z}

    import megalodon_mcore.__main__
    import megalodon_mcore.evaluation
    import megalodon_mcore.pretraining
    import megalodon_mcore.spec  # noqa: F401

    for module in IMPORTED_LATER:
        importlib.import_module(module)
    _remember_sources()
    _lighten()
    gc.freeze()
    running: dict[int, str] = {}
    # Without a buffer, in which select would not see a line.
    requests = open(0, "rb", buffering=0)
    while True:
        if select.select([requests], [], [], 0.02 if running else None)[0]:
            line = requests.readline()
            if not line:
                return
            request = json.loads(line)
            pid = os.fork()
            if pid == 0:
                request["environment"] = installed | request["environment"]
                _become(**request)
            running[pid] = request["place"]
            _write(request["place"] + ".pid", str(pid))
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            _write(running.pop(pid) + ".code", str(os.waitstatus_to_exitcode(status)))


def _remember_sources() -> None:
    """Megatron parses its own source for the help of its arguments, whenever it makes a parser."""
    from megatron.training import argument_utils
    from megatron.training.arguments import add_megatron_arguments

    inspect.getsource = functools.cache(inspect.getsource)
    argument_utils.ast = SimpleNamespace(**vars(ast) | {"parse": functools.cache(ast.parse)})
    add_megatron_arguments(argparse.ArgumentParser())


def _lighten() -> None:
    """Spares a run what takes as long as a step and says nothing of it."""
    from torch import library

    shorten_mock_data()
    # Torch takes its operators back one by one before a process ends.
    for finalizer in list(weakref.finalize._registry):
        if finalizer.peek()[1] is library._del_library:
            finalizer.atexit = False


def shorten_mock_data() -> None:
    """Megatron would shuffle millions of samples, of which runs take some dozen."""
    from megatron.core.datasets.gpt_dataset import MockGPTLowLevelDataset

    MockGPTLowLevelDataset.size = 100


def _write(path: str, text: str) -> None:
    Path(f"{path}.new").write_text(text)
    Path(f"{path}.new").rename(path)


def _become(argv: list[str], environment: dict, cwd: str, output: str, place: str) -> None:
    """Turns this fork into `python -m megalodon_mcore ARGV`; does not return."""
    code = 1
    try:
        os.setsid()
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(environment)
        from megatron.core.dist_checkpointing.strategies import filesystem_async

        from megalodon_mcore.__main__ import main

        if "--async-save" not in argv:
            # Else Megatron starts a process for it, which only a writer in another one needs.
            filesystem_async._results_queue = queue.Queue()
        sys.argv = ["megalodon-mcore", *argv]
        code = main(argv)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
