"""The configuration of the stand-alone Megalodon model."""

from __future__ import annotations

from transformers import PreTrainedConfig


class MegalodonConfig(PreTrainedConfig):
    """A Megalodon's shape (arXiv 2404.08801); None stands for a value derived from hidden_size."""

    model_type = "megalodon"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 32_000
    hidden_size: int = 1024
    num_hidden_layers: int = 12
    num_attention_heads: int = 1

    intermediate_size: int = 2560
    """Width of the feed-forward network (F)."""

    z_dim: int | None = None
    """Width of the shared representation that queries and keys come from; hidden_size / 4."""

    value_dim: int | None = None
    """Width of the attention values and their gate; 2 * hidden_size."""

    cema_ndim: int = 16
    """EMA dimensions per channel (N)."""

    norm_num_groups: int | None = None
    """Groups of TimestepNorm; hidden_size / 32, at most 64."""

    chunk_size: int = 2048
    """Positions an attention chunk spans; nothing attends across chunks."""

    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""

    norm_eps: float = 1e-5

    swiglu: bool = False
    """Gate the feed-forward network with a second projection."""

    rescale_nffn: bool = False
    """Multiply the FFN's output by a learned vector that starts at 0.1 * 0.5^layer."""

    scale_embedding: bool = False
    """Multiply the embedding by sqrt(hidden_size)."""

    tie_word_embeddings: bool = False

    dropout: float = 0.0
    """Dropout on the embedding and on both residual updates of a block."""

    hidden_dropout: float = 0.0
    """Dropout on the mixer's and the FFN's hidden activations."""

    attention_dropout: float = 0.0
    """Dropout on the softmax weights."""

    megalodon_init_mode: str = "he"
    """How fresh projections start: he, bert, xavier or gaussian."""

    use_cache: bool = True

    piece_length: int = 2048
    """Steps computed at once when a cache is filled without gradients; a longer input is cut.
    With a multiple of chunk_size the pieces start at chunk bounds, where attention costs least."""

    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: object) -> None:
        """Derives what was left out and checks every value.

        Raises:
            ValueError: a value does not fit; one sentence names it and what would work.
        """
        if not isinstance(self.hidden_size, int):
            raise ValueError(f"hidden_size is {self.hidden_size!r}; it takes a positive integer.")
        derived = {
            "z_dim": self.hidden_size // 4,
            "value_dim": 2 * self.hidden_size,
            "norm_num_groups": min(64, max(1, self.hidden_size // 32)),
        }
        for name, value in derived.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "z_dim",
            "value_dim",
            "cema_ndim",
            "norm_num_groups",
            "chunk_size",
            "piece_length",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value}; it takes a positive integer.")
            if value >= 2**31:
                raise ValueError(f"{name} is {value}; it takes less than 2**31.")
        for name in ("bos_token_id", "pad_token_id"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, int):
                raise ValueError(f"{name} is {value!r}; it takes an integer or None.")
        heads = self.num_attention_heads
        for name, factor, why in (("z_dim", 2 * heads, " pairs of"), ("value_dim", heads, "")):
            if getattr(self, name) % factor:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it takes a multiple of {factor}, because "
                    f"{heads} heads share its{why} columns."
                )
        if self.hidden_size % self.norm_num_groups:
            raise ValueError(
                f"norm_num_groups is {self.norm_num_groups}; it takes a divisor of hidden_size, "
                f"which is {self.hidden_size}."
            )
        for name in ("rope_theta", "norm_eps"):
            if not _is_number(getattr(self, name)) or not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it takes a positive number.")
        if self.megalodon_init_mode not in ("he", "bert", "xavier", "gaussian"):
            raise ValueError(
                f"megalodon_init_mode is {self.megalodon_init_mode!r}; it takes he, bert, xavier "
                "or gaussian."
            )
        for name in ("dropout", "hidden_dropout", "attention_dropout"):
            if not _is_number(getattr(self, name)) or not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it takes a number from 0 up to below 1."
                )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


__all__ = ["MegalodonConfig"]
