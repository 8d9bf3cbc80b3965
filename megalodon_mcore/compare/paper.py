"""The paper's own comparison, at 7B and 32K tokens: commands for those who have the machines."""

from __future__ import annotations

import dataclasses
import shlex

from megalodon_mcore.compare.equal_size import equal_shapes
from megalodon_mcore.compare.presets import GPT, MEGALODON, preset
from megalodon_mcore.compare.runs import model_arguments

VOCABULARY = 32_000
LAYOUT = (
    "--tensor-model-parallel-size 2 --sequence-parallel --context-parallel-size 4 "
    "--megalodon-sequence-order zigzag "
    "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
)
SCHEDULE = (
    "--seq-length 32768 --max-position-embeddings 32768 --micro-batch-size 1 "
    "--global-batch-size 128 --train-iters 476838 --optimizer adam --adam-beta1 0.9 "
    "--adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0 --lr 3.5e-4 --min-lr 3.5e-5 "
    "--lr-decay-style cosine --lr-warmup-iters 2000"
)


def commands() -> str:
    """The commands of the 7B models, and what their layout is."""
    settings = dataclasses.replace(
        preset("gpu"),
        peers=(MEGALODON, GPT),
        **{"layers": 32, "hidden_size": 4096, "ffn_hidden_size": 8192, "heads": 4},
        **{"chunk_size": 4096, "head_dim": 128, "implementation": "transformer_engine"},
    )
    lines = [
        "# 64 GPUs of 80 GiB: TP 2 with sequence parallelism, CP 4, DP 8 and the distributed",
        "# optimizer; batches of 128 x 32,768 = 4M tokens, 2T tokens in all. On each of 8 nodes:",
        'DATA="--tokenizer-type HuggingFaceTokenizer --tokenizer-model TOKENIZER'
        ' --data-path data/text_document --split 99,1,0"',
    ]
    for peer, shape in equal_shapes(settings, VOCABULARY).items():
        model = [*model_arguments(settings, peer, shape), "--rotary-base", "100000"]
        lines += [
            f"# {peer}: {shape.parameters:,} parameters",
            "torchrun --nnodes 8 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 "
            f"-m megalodon_mcore pretrain {shlex.join(model)} {LAYOUT} {SCHEDULE} $DATA "
            f"--save runs/{peer} --load runs/{peer} --save-interval 2000",
        ]
    lines += [
        "# A rank's memory and traffic: megalodon-mcore describe --preset 7b-paper --tp 2 --cp 4",
        "# --dp 8 --seq-length 32768",
    ]
    return "\n".join(lines)
