"""Megalodon's modules, in Megatron's [length, batch, hidden] layout."""
