"""The command line on a card: prepare-data, pretrain, resume and generate, against the CPU.

The CPU makes a checkpoint; from it both go on, in float32, over packed documents, and have to log
the same losses. The card stops halfway and resumes. In bfloat16 the loss of blocks, and of layers
of every kind, has to fall. From a checkpoint of Megatron's linear layers Transformer Engine's go on
as they do.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from stage import ROOT, Stage

LOSS = re.compile(r"iteration +(\d+)/.*lm loss: ([\dE.+-]+)")
CPU = {"CUDA_VISIBLE_DEVICES": ""}
# float32 sums in another order, over a few optimizer steps.
TOLERANCE = 2e-4
# Of bfloat16 and of FP8, whose products have 8 and 3 or 4 binary digits.
HALF_TOLERANCE, FP8_TOLERANCE = 1e-2, 3e-2
BLOCKS = "--num-layers 4"
PATTERN = "--hybrid-layer-pattern M*-ME --position-embedding-type rope --num-experts 4"
PATTERN += " --moe-router-topk 2 --moe-router-load-balancing-type none"
ENGINE = "--transformer-impl transformer_engine"
RECIPES = ("tensorwise", "blockwise", "delayed")
MODEL = "--hidden-size 256 --num-attention-heads 2 --ffn-hidden-size 384 --swiglu"
MODEL += " --untie-embeddings-and-output-weights --make-vocab-size-divisible-by 8"
MODEL += " --megalodon-chunk-size 128 --dataloader-inter-document-masking"
BATCH = "--micro-batch-size 1 --global-batch-size 2 --seq-length 1024"
BATCH += " --max-position-embeddings 1024 --num-workers 0 --log-interval 1 --eval-iters 0"
BATCH += " --lr-decay-style constant --clip-grad 1.0"


def command(*arguments, **variables):
    """The output of megalodon-mcore with these arguments."""
    print(time.strftime("%X"), arguments[0], arguments[-4:], variables, flush=True)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "megalodon_mcore", *map(str, arguments)],
        env=os.environ | variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}: {(done.stdout + done.stderr)[-350:]}")
    return done.stdout


def pretrain(data, *arguments, layers=BLOCKS, **variables):
    """The loss of each iteration that a run logs."""
    given = [*data, *layers.split(), *MODEL.split(), *BATCH.split(), *arguments]
    output = command("pretrain", *given, **variables)
    return {int(step): float(loss) for step, loss in LOSS.findall(output)}


def saving(folder):
    return "--save", folder, "--save-interval", "1000"


def same_losses(data, folder):
    """The card's float32 losses, stopped and resumed, beside the CPU's from one checkpoint.

    What Megatron logs after a run's first iteration is the mean of its first two.
    """
    steps = ["--train-iters", "8", "--lr", "1e-3"]
    start, card = folder / "start", folder / "card"
    pretrain(data, *steps, "--exit-interval", "2", *saving(start), **CPU)

    def on_cpu():
        return pretrain(data, *steps, "--load", start, **CPU)

    def on_card():
        first = pretrain(data, *steps, "--load", start, "--exit-interval", "5", *saving(card))
        return first | pretrain(data, *steps, "--load", card)

    with ThreadPoolExecutor(2) as pool:
        wanted, found = [run.result() for run in [pool.submit(on_cpu), pool.submit(on_card)]]
    worst = max(abs(found[step] - wanted[step]) / wanted[step] for step in (3, 5, 6, 8))
    verdict = "pass" if worst <= TOLERANCE else "fail"
    return verdict, {"error": worst, "bound": TOLERANCE, "losses": list(found.values())}


def falling_loss(data, folder, steps, layers):
    """First and last loss of a run in bfloat16, and what its model says on the card."""
    half = ["--bf16", "--train-iters", steps, "--lr", "3e-3", *saving(folder)]
    losses = pretrain(data, *half, layers=layers)
    text = command("generate", "--checkpoint", folder, "--prompt", "def ", "--tokens", 64)
    falls = losses[steps] < losses[1] - (1 if steps > 20 else 0)
    found = {"first": losses[1], "last": losses[steps], "sample": text[:80]}
    return "pass" if falls else "fail", found


def engine_rows(stage, data, folder):
    """A row of each of Transformer Engine's precisions, beside Megatron's layers in bfloat16."""
    if not find_spec("transformer_engine"):
        stage.add("Transformer Engine", "missing", problem="it is not installed")
        return
    steps = ["--bf16", "--train-iters", "12", "--lr", "1e-3"]
    pretrain(data, *steps, "--exit-interval", "2", *saving(folder), **CPU)
    load = ("--load", folder, "--no-load-rng", "--no-load-optim")
    wanted = pretrain(data, *steps, *load)
    ways = {"bfloat16": ((), HALF_TOLERANCE)}
    for recipe in RECIPES:
        ways[f"FP8 {recipe}"] = (
            ("--fp8-format", "hybrid", "--fp8-recipe", recipe),
            FP8_TOLERANCE,
        )

    def same(options, tolerance):
        found = pretrain(data, *steps, *load, *ENGINE.split(), *options)
        worst = max(abs(found[step] - wanted[step]) / wanted[step] for step in wanted)
        verdict = "pass" if worst <= tolerance and found.keys() == wanted.keys() else "fail"
        return verdict, {"error": worst, "bound": tolerance, "losses": list(found.values())}

    with ThreadPoolExecutor(len(ways)) as pool:
        for way, given in ways.items():
            pool.submit(stage.attempt, f"Transformer Engine, {way}", partial(same, *given), 5)


def main(stage):
    if not find_spec("megatron"):
        stage.add("training", "missing", problem="no megatron-core; --wheels names a folder")
        return
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        prefix = folder / "text"
        source = ROOT / "megalodon_mcore"
        command("prepare-data", source, "--output-prefix", prefix, "--split", "0.9,0.05,0.05")
        from megalodon_mcore.data.metadata import PreparedData

        data = PreparedData.load(prefix).megatron_arguments()
        steps = 3 if stage.rehearse else 100
        cases = {
            f"bfloat16 loss of {name} falls; generate": partial(
                falling_loss, data, folder / name, steps, layers
            )
            for name, layers in (("blocks", BLOCKS), ("all layers", PATTERN))
        }
        if not stage.rehearse:
            # Without a card it would be a CPU beside itself, which takes minutes.
            cases["float32 losses of a card and a CPU"] = partial(same_losses, data, folder)
        with ThreadPoolExecutor(1 if stage.rehearse else 4) as pool:
            running = [pool.submit(stage.attempt, case, run, 5) for case, run in cases.items()]
            running.append(pool.submit(engine_rows, stage, data, folder / "engine"))
            for each in running:
                each.result()


if __name__ == "__main__":
    main(Stage.from_arguments())
