"""What tests of the Hugging Face model have in common."""

import pytest

from megalodon_mcore.hf import block_megalodon


@pytest.fixture(params=["our operators", "alone"])
def operators(request, monkeypatch):
    """With this package's operators, and as the export runs where it is not installed."""
    if request.param == "alone":
        monkeypatch.setattr(block_megalodon, "kernels", None)
