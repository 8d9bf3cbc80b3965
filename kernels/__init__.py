"""Operators of Megalodon on plain tensors; this folder installs as megalodon_mcore.kernels."""
