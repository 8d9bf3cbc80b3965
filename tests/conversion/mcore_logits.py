"""Run as a program: a Megatron checkpoint's logits of tokens, from Megatron's own model.

python mcore_logits.py CHECKPOINT TOKENS.pt LOGITS.pt
"""

import sys
from pathlib import Path

import torch

from megalodon_mcore.inference_model import load_model
from megalodon_mcore.streaming import StreamingModel

if __name__ == "__main__":
    checkpoint, tokens, logits = map(Path, sys.argv[1:])
    model = load_model(checkpoint).model
    given = torch.load(tokens)
    with torch.no_grad():
        whole = model(given, None, None)
    streamed, _ = StreamingModel(model, 7)(given, all_logits=True)
    torch.save({"whole": whole, "streamed": streamed}, logits)
