"""The CPU stand-in for CUDA: what it answers and refuses, that it leaves no trace, and scripts."""

import math
import multiprocessing.spawn
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from megalodon_mcore import cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU needs no stand-in")


@pytest.fixture
def cuda() -> Iterator[None]:
    with cpu.install(devices=2):
        yield


def launch(*arguments: str, torchrun: int = 0, **env: str):
    """Runs `-m megalodon_mcore.cpu` with the arguments, under torchrun where it says how many."""
    command = [sys.executable, "-m"]
    if torchrun:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={torchrun}", "-m"]
    return subprocess.run(
        [*command, "megalodon_mcore.cpu", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )


def attributes() -> dict[tuple[str, str], int]:
    """Every attribute that could have been replaced, and which object it is."""
    owners = {
        "torch": torch,
        "Tensor": torch.Tensor,
        "autocast": torch.autocast,
        "accelerator": torch.accelerator,
        "serialization": torch.serialization,
        "autograd": torch.autograd,
        "autograd.graph": torch.autograd.graph,
        "dist": dist,
        "c10d": dist.distributed_c10d,
        "DataLoader": DataLoader,
        "Thread": threading.Thread,
        "spawn": multiprocessing.spawn,
        **{f"cuda.{n}": m for n, m in vars(torch.cuda).items() if isinstance(m, type(torch))},
        "cuda": torch.cuda,
    }
    return {(owner, n): id(v) for owner, module in owners.items() for n, v in vars(module).items()}


@pytest.mark.parametrize("device", ["cuda", "cuda:1", 0, torch.device("cuda", 0)])
def test_factories_and_moves_stay_on_the_cpu(cuda, device):
    moved = torch.ones(2).to(device), torch.ones(2).to(device=device, dtype=torch.bfloat16)
    made = torch.zeros(2, device=device), torch.tensor([1, 2], device=device, pin_memory=True)
    module = torch.nn.Linear(2, 2, device=device).to(device).cuda()
    for tensor in (*moved, *made, *module.parameters(), torch.ones(2).cuda(), made[0].new_zeros(1)):
        assert tensor.device.type == "cpu"
    assert moved[1].dtype == torch.bfloat16
    assert torch.as_tensor([1.0], device=torch.device("cuda")).device.type == "cpu"
    with torch.device("cuda"):
        assert torch.ones(1).device.type == "cpu"
    torch.set_default_device("cuda")
    assert torch.ones(1).device.type == "cpu"
    torch.set_default_device(None)


def test_typed_constructors_and_types_are_cudas(cuda):
    assert torch.cuda.FloatTensor([1.0]).device.type == "cpu"
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.ones(1).type("torch.cuda.HalfTensor").dtype == torch.float16
    assert torch.ones(1).type(torch.float64).dtype == torch.float64


def test_going_to_the_host_copies_as_from_a_gpu(cuda):
    tensor = torch.ones(2)
    for host in (tensor.cpu(), tensor.to("cpu"), tensor.to(device="cpu", non_blocking=True)):
        assert host.data_ptr() != tensor.data_ptr()
    assert tensor.to(tensor.device) is tensor
    assert tensor.cuda() is tensor and tensor.pin_memory() is tensor


def test_devices(cuda):
    assert torch.cuda.is_available() and torch.cuda.is_initialized()
    assert torch.cuda.device_count() == 2
    torch.cuda.set_device("cuda:1")
    with torch.cuda.device(0):
        assert torch.cuda.current_device() == 0
    assert torch.cuda.current_device() == 1
    with pytest.raises(RuntimeError, match="no device 2"):
        torch.cuda.set_device(2)
    assert torch.cuda.is_bf16_supported() and torch.cuda.get_device_capability() == (8, 0)
    assert torch.cuda.get_device_properties(0).total_memory >= torch.cuda.mem_get_info()[0] > 0
    assert torch.cuda.max_memory_allocated() == 0
    assert torch.cuda.memory_stats()["allocation.all.current"] == 0
    assert not torch.accelerator.is_available()


def test_streams_and_events_do_nothing(cuda):
    stream, start, end = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True), None
    start.record()
    with torch.cuda.stream(stream):
        assert torch.cuda.current_stream() is stream
        stream.wait_stream(torch.cuda.default_stream())
        end = stream.record_event(torch.cuda.Event(enable_timing=True))
        torch.ones(1).record_stream(stream)
    assert torch.cuda.current_stream() is torch.cuda.default_stream()
    torch.cuda.synchronize()
    assert end.query() and start.elapsed_time(end) >= 0
    with torch.cuda.nvtx.range("name"), torch.autocast("cuda", dtype=torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_rng_state_goes_round(cuda):
    torch.cuda.manual_seed(5)
    state, expected = torch.cuda.get_rng_state(), torch.nn.functional.dropout(torch.ones(99))
    torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.nn.functional.dropout(torch.ones(99)), expected)
    torch.manual_seed(5)
    assert torch.equal(torch.cuda.get_rng_state_all()[1], state)
    with torch.random.fork_rng(range(2)):
        torch.rand(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_data_loader_spares_the_generator(cuda):
    state = torch.get_rng_state()
    assert [int(x) for x in DataLoader([1, 2], batch_size=1, pin_memory=True)] == [1, 2]
    assert torch.equal(torch.get_rng_state(), state)


def test_megatrons_rng_tracker_forks(cuda, caplog):
    random = pytest.importorskip("megatron.core.tensor_parallel.random")
    tracker = random.CudaRNGStatesTracker()
    tracker.add("name", 7)
    outside, forked = torch.get_rng_state(), []
    saved = tracker.get_states()
    for _ in range(2):
        with tracker.fork("name"):
            forked.append(torch.rand(4))
        assert torch.equal(torch.get_rng_state(), outside)
    assert not torch.equal(*forked)
    tracker.set_states(saved)
    with tracker.fork("name"):
        assert torch.equal(torch.rand(4), forked[0])
    assert "CPU RNG state changed" not in caplog.text


def test_threads_and_backward_passes_know_it(cuda):
    devices = []

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            devices.append(torch.zeros(1, device="cuda").device.type)
            return grad

    def work():
        Identity.apply(torch.ones(1, requires_grad=True)).backward()

    work()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert devices == ["cpu", "cpu"]


def test_loads_what_names_a_gpu(cuda, tmp_path):
    torch.save(torch.ones(1), tmp_path / "x")
    for where in ("cuda", torch.device("cuda:0"), None):
        assert torch.load(tmp_path / "x", map_location=where).device.type == "cpu"


@pytest.mark.parametrize(
    "name", ["CUDAGraph", "graph", "graph_pool_handle", "MemPool", "current_blas_handle", "cudart"]
)
def test_refuses_what_it_cannot_do(cuda, name):
    with pytest.raises(NotImplementedError, match=rf"torch\.cuda\.{name} needs a real GPU"):
        getattr(torch.cuda, name)()
    with pytest.raises(NotImplementedError, match="pointer needs a real GPU"):
        torch.cuda.current_stream().cuda_stream  # noqa: B018


def test_undo_restores_everything():
    before, environment = attributes(), dict(os.environ)
    stand_in = cpu.install()
    assert attributes() != before
    inner = cpu.install()
    inner.undo()
    assert torch.cuda.is_available()
    stand_in.undo()
    stand_in.undo()
    assert attributes() == before and dict(os.environ) == environment
    assert not torch.cuda.is_available()
    assert torch.overrides._get_current_function_mode() is None


def test_a_real_gpu_is_left_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = attributes()
    with cpu.install():
        assert attributes() == before


SCRIPT = """
import multiprocessing, os, sys, torch, neighbour

def child():
    assert torch.ones(1, device="cuda").device.type == "cpu"

if __name__ == "__main__":
    assert sys.path[0] == os.path.dirname(os.path.abspath(__file__))
    process = multiprocessing.get_context("spawn").Process(target=child)
    process.start()
    process.join()
    print(sys.argv[1:], torch.cuda.device_count(), process.exitcode)
    if sys.argv[1:] == ["fail"]:
        raise KeyError("from the script")
    sys.exit(7)
"""


def test_runs_a_script_as_python_would(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "neighbour.py").touch()
    done = launch(str(tmp_path / "script.py"), "--flag", "2")
    assert (done.stdout, done.returncode) == ("['--flag', '2'] 1 0\n", 7), done.stderr
    failed = launch(str(tmp_path / "script.py"), "fail")
    assert failed.returncode == 1 and "KeyError: 'from the script'" in failed.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"), [([], "name the script"), (["absent.py"], "no script absent.py")]
)
def test_says_what_is_missing(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        cpu.main(arguments)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line


GROUP = """
import os, torch, torch.distributed as dist
rank = int(os.environ["LOCAL_RANK"])
torch.cuda.set_device(rank)
dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
group = dist.new_group([0, 1], backend="nccl")
x = torch.full((3,), rank + 1.0).bfloat16().cuda()
dist.all_reduce(x, group=group)
gathered = [None, None]
dist.all_gather_object(gathered, rank)
dist.barrier(device_ids=[rank])
if rank == 0:
    print(dist.get_backend(), x.tolist(), gathered, torch.cuda.device_count())
    groups = (dist.group.WORLD, group)
    backends = [z._get_backend(torch.device("cpu")) for z in groups]
    print(len({z for backend in backends for z in backend.options._devices}))
dist.destroy_process_group()
"""


def test_two_processes_reduce_over_gloo(tmp_path):
    (tmp_path / "group.py").write_text(GROUP)
    done = launch(str(tmp_path / "group.py"), torchrun=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "gloo [3.0, 3.0, 3.0] [0, 1] 2\n1\n"


TINY_GPT = """
--mock-data --tokenizer-type NullTokenizer --vocab-size 255 --num-layers 2 --hidden-size 64
--num-attention-heads 4 --seq-length 64 --max-position-embeddings 64 --micro-batch-size 2
--global-batch-size 4 --train-iters 3 --lr 1e-3 --transformer-impl local --log-interval 1
--no-gradient-accumulation-fusion --no-persist-layer-norm --no-masked-softmax-fusion
--eval-iters 1 --eval-interval 100 --num-workers 0 --tensor-model-parallel-size 2
""".split()


@pytest.mark.megatron_lm
@pytest.mark.skipif(
    "MEGATRON_LM_PATH" not in os.environ, reason="MEGATRON_LM_PATH names no checkout"
)
def test_trains_with_the_unmodified_script():
    checkout = os.environ["MEGATRON_LM_PATH"]
    done = launch(
        str(Path(checkout) / "pretrain_gpt.py"),
        *TINY_GPT,
        torchrun=2,
        PYTHONPATH=checkout,
        CUDA_DEVICE_MAX_CONNECTIONS="1",
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    )
    assert done.returncode == 0, done.stderr
    losses = [float(x) for x in re.findall(r"lm loss: (\S+)", done.stdout)]
    assert len(losses) == 3 and all(map(math.isfinite, losses))
