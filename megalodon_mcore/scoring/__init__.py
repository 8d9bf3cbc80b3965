"""How well a checkpoint predicts text and finds what it has read; needs no Megatron."""
