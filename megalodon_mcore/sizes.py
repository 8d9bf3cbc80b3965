"""The named sizes: those of the released ModelStore, and the 7B of the paper's experiments."""

from __future__ import annotations

from megalodon_mcore.config import MegalodonConfig


def _size(
    num_layers: int,
    hidden_size: int,
    heads: int,
    ffn: int,
    groups: int,
    *,
    swiglu: bool = False,
    chunk_size: int = 2048,
    rotary_base: float = 10_000.0,
    tied_and_scaled: bool = False,
) -> MegalodonConfig:
    return MegalodonConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=heads,
        ffn_hidden_size=ffn,
        chunk_size=chunk_size,
        norm_num_groups=groups,
        rotary_base=rotary_base,
        swiglu=swiglu,
        tied=tied_and_scaled,
        scale_embedding=tied_and_scaled,
    )


SIZES: dict[str, MegalodonConfig] = {
    "200m": _size(12, 1024, 1, 2560, 32),
    "1.3b": _size(24, 2048, 2, 4864, 64),
    "1.3b-pg19": _size(24, 2048, 2, 3584, 64, swiglu=True, tied_and_scaled=True),
    "7.1b": _size(32, 4096, 4, 11264, 64),
    "7.3b": _size(32, 4096, 4, 8192, 64, swiglu=True),
    "7b-paper": _size(32, 4096, 4, 8192, 64, swiglu=True, chunk_size=4096, rotary_base=100_000.0),
}


def megatron_arguments(size: MegalodonConfig) -> dict[str, object]:
    """The defaults that a named size gives Megatron's own arguments."""
    return {
        "num_layers": size.num_layers,
        "hidden_size": size.hidden_size,
        "num_attention_heads": size.num_heads,
        "ffn_hidden_size": size.ffn_hidden_size,
        "swiglu": size.swiglu,
        "rotary_base": int(size.rotary_base),
        "untie_embeddings_and_output_weights": not size.tied,
    }
