"""What a planned run takes from every rank: parameters, memory and traffic, from formulas alone.

Nothing here imports torch or Megatron. Symbols, as in the layers: D hidden size, H heads, Z z_dim,
E value_dim, F FFN size, N cema_ndim, G norm groups, C chunk size, V vocabulary, L sequence length,
B micro-batch size.
"""
