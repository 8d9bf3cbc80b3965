"""Measures what a run will take from a rank: its share of the model, built and run without data.

`rank` makes this process one rank of a large world, `measure` counts what that rank holds, keeps
and sends, and `report` prints it. Only `layout` is imported without torch and Megatron.
"""
