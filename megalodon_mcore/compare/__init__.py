"""Trains Megalodon beside Megatron's own GPT under equal conditions, and says what came out."""
