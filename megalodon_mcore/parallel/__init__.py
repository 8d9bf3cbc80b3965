"""How ranks share a model: what each holds of a sequence and of a layer, and what they exchange."""
