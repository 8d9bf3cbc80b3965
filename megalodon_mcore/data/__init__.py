"""From text to the datasets Megatron trains on: tokenizers, document sources, n-gram baselines."""
