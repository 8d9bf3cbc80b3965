"""Greedy tokens of a checkpoint, each by a whole forward pass: python FILE CHECKPOINT COUNT IDS."""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from megatron_model import load_model

loaded = load_model(Path(sys.argv[1]))
tokens = [int(token) for token in sys.argv[3:]]
with torch.no_grad():
    for _ in range(int(sys.argv[2])):
        logits = loaded.model(torch.tensor([tokens]), None, None)
        tokens.append(int(logits[0, -1, : loaded.tokenizer.vocab_size].argmax()))
print("TOKENS", json.dumps(tokens))
