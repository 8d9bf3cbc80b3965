"""Run as a program on every rank: what Bridge exports of a model with adapters is that model.

python -m megalodon_mcore.cpu merge_adapters.py EXPORT RESULT TP
"""

import sys

import torch
from megatron.bridge import AutoBridge
from megatron.core import tensor_parallel
from transformers import AutoModelForCausalLM

import megalodon_mcore.bridge  # noqa: F401
from megalodon_mcore.bridge.recipes.finetuning import adapters_of
from megalodon_mcore.pretraining import stand_alone_environment


def main(export, result, tp):
    stand_alone_environment()
    bridge = AutoBridge.from_hf_pretrained(export, trust_remote_code=True)
    provider = bridge.to_megatron_provider()
    provider.tensor_model_parallel_size = int(tp)
    provider.sequence_parallel = int(tp) > 1
    provider.finalize()
    provider.initialize_model_parallel(seed=0)
    chunks = provider.provide_distributed_model(wrap_with_ddp=False)
    adapters = adapters_of(provider.config(), 4)
    adapters.alpha = 8
    chunks = adapters(chunks, training=True)
    (model,) = chunks
    count = 0
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".adapter." in name), name
        if ".linear_out." in name:
            count += 1
            # They begin at zero.
            torch.nn.init.normal_(parameter, std=0.1)
    assert count, "no layer has an adapter"
    tokens = torch.arange(48).view(2, 24) % 50
    places = torch.arange(24).expand(2, -1)
    with torch.no_grad():
        logits = model.eval()(tokens, places, None)
    logits = tensor_parallel.gather_from_tensor_model_parallel_region(logits)
    bridge.save_hf_pretrained(chunks, result, show_progress=False)
    torch.distributed.barrier()
    merged = AutoModelForCausalLM.from_pretrained(result, trust_remote_code=True)
    base = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True)
    with torch.no_grad():
        expected = merged(tokens, use_cache=False).logits
        without = base(tokens, use_cache=False).logits
    actual = logits[..., : expected.shape[-1]]
    if actual.shape[0] != 2:
        actual = actual.transpose(0, 1)
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    change = ((without - expected).abs().max() / expected.abs().max()).item()
    assert error < 1e-5 and change > 1e-2, (error, change)


if __name__ == "__main__":
    main(*sys.argv[1:])
