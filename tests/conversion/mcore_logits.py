"""Run as a program: a Megatron checkpoint's logits of tokens, from Megatron's own model.

python mcore_logits.py CHECKPOINT TOKENS.pt LOGITS.pt
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from megatron_model import load_model

if __name__ == "__main__":
    checkpoint, tokens, logits = map(Path, sys.argv[1:])
    model = load_model(checkpoint).model
    given = torch.load(tokens)
    with torch.no_grad():
        whole = model(given, None, None)
    torch.save({"whole": whole}, logits)
