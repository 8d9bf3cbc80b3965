"""The recipes: what their docstrings promise, and that the tiny one trains and fine-tunes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from needs_bridge import needs_bridge
from torch.distributed.checkpoint import FileSystemReader

from conversion.conversion_samples import convert, hf_folder
from megalodon_mcore.config import MegalodonConfig
from megalodon_mcore.describe import growing_bytes
from megalodon_mcore.parameters import number_of_values
from megalodon_mcore.planning.layout import ParallelLayout
from megalodon_mcore.planning.measure import measure_plan, memory
from training.runs import launch, scalars

pytestmark = [pytest.mark.bridge, needs_bridge]

COMMAND = ("-m", "megalodon_mcore")
GIBIBYTE = 2**30


@pytest.fixture(scope="module")
def recipes():
    """Facts of every recipe by its name, from a process of its own."""
    program = Path(__file__).parent / "recipe_facts.py"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(program)], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_each_layout_takes_the_memory_that_its_recipe_says(recipes):
    assert len(recipes) == 11
    for name, recipe in recipes.items():
        if name == "tiny":
            continue
        text = " ".join(recipe["doc"].split())
        promised, ranks = re.search(r"([\d.]+) GiB of 80 on (\d+) GPUs", text).groups()
        tp, cp = recipe["tp"], recipe["cp"]
        # Megatron pads the vocabulary to a multiple of 128 on every rank.
        vocab_size = -(-32_000 // (128 * tp)) * 128 * tp
        model = MegalodonConfig(**recipe["config"] | {"vocab_size": vocab_size})
        layout = ParallelLayout(
            seq_length=recipe["seq_length"],
            tp=tp,
            cp=cp,
            dp=int(ranks) // (tp * cp),
            ep=recipe["ep"],
            micro_batch_size=recipe["micro_batch_size"],
            order="zigzag",
            recompute="selective" if recipe["recompute"] else "none",
        )
        first = measure_plan(model, layout).stages[0]
        assert f"{sum(memory(first, layout, 0).values()) / GIBIBYTE:.1f}" == promised, name
        assert float(promised) < 64, f"{name} leaves less than a fifth of a GPU free"
        batch = recipe["micro_batch_size"] * layout.dp
        assert recipe["global_batch_size"] % batch == 0, f"{name}: {ranks} GPUs don't share a batch"


def test_parameters_are_as_many_as_a_name_says(recipes):
    moe = MegalodonConfig(**recipes["7b-a1b-4k"]["config"])
    total = number_of_values(moe)
    idle = 60 * 16 * 3 * 2048 * 1024
    assert (f"{total / 1e9:.1f}", f"{(total - idle) / 1e9:.1f}") == ("7.1", "1.0")
    hybrid = MegalodonConfig(**recipes["1.3b-hybrid-32k"]["config"])
    assert hybrid.symbols == 3 * "MMMMMMM*"
    assert growing_bytes(hybrid, True) == 6 * 1024


def test_all_are_trained_as_in_the_paper(recipes):
    for name, recipe in recipes.items():
        if name == "tiny":
            continue
        assert recipe["global_batch_size"] * recipe["seq_length"] == 2**22
        assert 2e12 <= recipe["train_iters"] * 2**22 < 2e12 + 2**22
        assert recipe["adam"] == [0.9, 0.95]
        assert recipe["weight_decays"] == [0.1, 0.1, 0.1]
        assert (recipe["lr"], recipe["clip"], recipe["decay"]) == (3.5e-4, 1.0, "cosine")
        assert recipe["dropouts"] == [0.0, 0.0, 0.0]
        assert recipe["precision"] == "bf16_mixed"
        assert recipe["transformer_impl"] == "transformer_engine"


def train(folder, *arguments, processes=1):
    run = launch(
        *(*COMMAND, *arguments, f"logger.tensorboard_dir={folder / 'tensorboard'}"),
        *(f"checkpoint.{z}={folder / 'checkpoints'}" for z in ("save", "load")),
        processes=processes,
    )
    assert run.returncode == 0, run.stdout[-6000:]
    return scalars(folder / "tensorboard", "lm loss")


def test_the_tiny_recipe_trains_and_goes_on_over_two_ranks(tmp_path):
    losses = train(tmp_path, "pretrain-recipe", "tiny")
    assert sorted(losses) == list(range(1, 21))
    assert losses[20] < 0.2 * losses[1]

    layout = ("model.tensor_model_parallel_size=2", "model.sequence_parallel=true")
    losses = train(
        tmp_path, "pretrain-recipe", "tiny", *layout, "train.train_iters=24", processes=2
    )
    assert max(losses) == 24
    assert losses[21] < 1.5 * losses[20]

    checkpoints = tmp_path / "checkpoints"
    data = next(checkpoints.glob("iter_0000024/*.distcp"))
    data.write_bytes(data.read_bytes()[:1000])
    run = launch(*COMMAND, "pretrain-recipe", "tiny", f"checkpoint.load={checkpoints}")
    assert run.returncode == 2
    sentence = run.stdout.splitlines()[-1]
    assert sentence.startswith(f"megalodon-mcore pretrain-recipe: {data} is truncated: ")


def export_and_data(tmp_path, examples):
    """An exported model, and a folder of examples to fine-tune it on."""
    model = dict(hidden_size=64, num_hidden_layers=2, intermediate_size=96, num_attention_heads=2)
    saved = hf_folder(
        tmp_path / "saved", "one-head", tokenizer=True, swiglu=True, chunk_size=16, **model
    )
    export = tmp_path / "export"
    assert convert("hf", "hf", saved, export) == 0
    data = tmp_path / "data"
    data.mkdir()
    for split in ("training", "validation"):
        # From 8 on, for lengths that differ.
        numbers = range(8, 8 + examples)
        lines = [json.dumps({"input": f"{n} and", "output": f"{n + 1}"}) for n in numbers]
        (data / f"{split}.jsonl").write_text("\n".join(lines))
    return export, data


def test_the_tiny_recipe_fine_tunes_an_export(tmp_path):
    export, data = export_and_data(tmp_path, 40)
    losses = train(
        tmp_path,
        *("finetune-recipe", "tiny", "--pretrained", str(export), "--data", str(data)),
        *("train.train_iters=8", "optimizer.lr=3e-3"),
    )
    assert sorted(losses) == list(range(1, 9))
    assert losses[8] < 0.8 * losses[1]


def test_adapters_alone_are_trained_and_saved(tmp_path):
    export, data = export_and_data(tmp_path, 40)
    arguments = ("finetune-recipe", "tiny", "--pretrained", str(export), "--data", str(data))
    arguments += ("--lora", "4", "optimizer.lr=1e-2")
    losses = train(tmp_path, *arguments, "train.train_iters=8")
    assert losses[8] < 0.8 * losses[1]
    saved = FileSystemReader(tmp_path / "checkpoints" / "iter_0000008").read_metadata()
    weights = [z for z in saved.state_dict_metadata if "weight" in z and "optimizer" not in z]
    assert weights and all(".adapter." in name for name in weights)
    losses = train(tmp_path, *arguments, "train.train_iters=10")
    assert sorted(losses)[-1] == 10 and losses[9] < 1.3 * losses[8]
    run = launch(*COMMAND, *arguments[:-3], "--lora", "0")
    assert run.returncode == 2 and "argument --lora: is 0; it takes a positive" in run.stdout
    run = launch(*COMMAND, *arguments, "model.tensor_model_parallel_size=4")
    assert run.returncode == 2
    assert "--lora is given with model.tensor_model_parallel_size=4, but the model has 2 heads" in (
        run.stdout
    )


def test_bridges_three_forms_of_bounds_say_the_same():
    program = Path(__file__).parent / "packed_bounds.py"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(program)], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found == dict.fromkeys(("plain", "padded", "old", "old without argmin"), [0, 4, 12, 16])


def test_packed_examples_train_as_they_do_alone(tmp_path):
    """Batches of all examples: alone in four sequences, or in one, which two ranks may share."""
    export, data = export_and_data(tmp_path, 4)
    common = ("finetune-recipe", "tiny", "--pretrained", str(export), "--data", str(data))
    common += ("train.train_iters=4", "optimizer.lr=3e-3")
    alone = train(tmp_path / "alone", *common, "train.global_batch_size=4")
    one = (*common, "--packed", "train.global_batch_size=1")
    context = ("model.context_parallel_size=2",)
    for name, layout, processes in (("packed", (), 1), ("context", context, 2)):
        packed = train(tmp_path / name, *one, *layout, processes=processes)
        assert packed == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "model.megalodon_z_dim=17",
            "z_dim is 17, which the 2 heads (--num-attention-heads) do not",
        ),
        ("optimizer.optimizer=soap", "--optimizer is soap, which takes CEMA's vectors"),
    ],
)
def test_a_wrong_value_is_named_before_training(override, sentence):
    run = launch(*COMMAND, "pretrain-recipe", "tiny", "--dry-run", override)
    assert run.returncode == 2
    assert sentence in run.stdout


def test_bridges_own_loop_refuses_an_optimizer_that_mistakes_parameters_for_matrices():
    run = launch(str(Path(__file__).parent / "unfit_optimizer.py"))
    assert run.returncode == 0, run.stdout[-6000:]
    assert run.stdout.splitlines()[-1].startswith(
        "--optimizer is adaptive_muon, which takes CEMA's"
    )
