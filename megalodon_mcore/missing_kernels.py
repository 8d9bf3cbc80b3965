"""A note where apex and Transformer Engine are missing: one line, and only where it matters.

Megatron's fall-backs, torch's AdamW and gradient clipping, do the same, more slowly. Of the rest
that it warns about, GPT's norms and experts, a Megalodon has none.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings


def is_installed(module: str) -> bool:
    """Whether a module is there to import."""
    return importlib.util.find_spec(module) is not None


def ignore_warnings() -> None:
    """Silences the warning that each of many Megatron modules has when it is imported."""
    warnings.filterwarnings("ignore", "(Transformer Engine and )?Apex (is|are) not installed")
    warnings.filterwarnings("ignore", "Only transformer-engine>=1.7.0 supports MoE experts")


def say_on_a_gpu() -> None:
    """Says on the first rank, where it trains on a GPU, that training will be slower."""
    import torch

    found = is_installed("transformer_engine") or is_installed("apex")
    if torch.cuda.is_available() and not found and os.environ.get("RANK", "0") == "0":
        print(
            "Neither Transformer Engine nor apex is installed: the optimizer is torch's AdamW, "
            "without fused kernels.",
            file=sys.stderr,
        )
