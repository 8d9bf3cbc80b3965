"""Run as a program on every rank: Bridge loads an export; the weights are those of a checkpoint.

python -m megalodon_mcore.cpu import_and_export.py EXPORT CHECKPOINT RESULT TP PP IMPLEMENTATION

EXPORT is a Hugging Face folder, CHECKPOINT what `megalodon-mcore convert` made of it for Megatron,
RESULT where Bridge writes the model back, IMPLEMENTATION whose linear layers it is built of.
"""

import sys
from pathlib import Path

import torch
from megatron.bridge import AutoBridge
from megatron.core import dist_checkpointing
from megatron.core.utils import unwrap_model

import megalodon_mcore.bridge  # noqa: F401
from megalodon_mcore.pretraining import stand_alone_environment

sys.path.insert(0, str(Path(__file__).parents[1]))
from distributed import checkpoints


def main(export, checkpoint, result, tp, pp, implementation):
    stand_alone_environment()
    bridge = AutoBridge.from_hf_pretrained(export, trust_remote_code=True)
    provider = bridge.to_megatron_provider()
    provider.transformer_impl = implementation
    provider.tensor_model_parallel_size = int(tp)
    provider.sequence_parallel = int(tp) > 1
    provider.pipeline_model_parallel_size = int(pp)
    provider.pipeline_dtype = provider.params_dtype
    provider.finalize()
    provider.initialize_model_parallel(seed=0)
    chunks = provider.provide_distributed_model(
        wrap_with_ddp=False, bf16=provider.bf16, fp16=provider.fp16
    )
    model = unwrap_model(chunks)[0]
    imported = {name: value.clone() for name, value in tensors(model).items()}
    assert imported, "this rank has no weights"

    bridge.save_hf_pretrained(chunks, result, show_progress=False)

    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    state = checkpoints.sharded_state(chunks, None, is_loading=True)
    model.load_state_dict(dist_checkpointing.load(state, checkpoint)["model"])
    for name, expected in tensors(model).items():
        assert imported[name].dtype == expected.dtype, name
        assert torch.equal(imported[name], expected), name


def tensors(model):
    return {name: z.detach() for name, z in model.named_parameters()}


if __name__ == "__main__":
    main(*sys.argv[1:])
