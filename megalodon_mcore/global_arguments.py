"""Megatron's arguments, where one of its programs runs."""

from __future__ import annotations

import sys
from argparse import Namespace


def megatron_arguments() -> Namespace | None:
    """What Megatron has made global; None where a caller uses megatron.core alone."""
    global_vars = sys.modules.get("megatron.training.global_vars")
    return getattr(global_vars, "_GLOBAL_ARGS", None)
