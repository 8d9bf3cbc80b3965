"""Megalodon, the long-context architecture of arXiv 2404.08801, inside Megatron-Core."""

__version__ = "0.1.0"
