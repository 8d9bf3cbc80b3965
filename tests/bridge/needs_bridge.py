"""What tests that need Megatron-Bridge share."""

import importlib.util

import pytest


def is_installed():
    try:
        return importlib.util.find_spec("megatron.bridge") is not None
    except ModuleNotFoundError:
        return False


needs_bridge = pytest.mark.skipif(
    not is_installed(),
    reason="Megatron-Bridge is not installed; bash tests/nvidia.sh installs and tests it",
)
