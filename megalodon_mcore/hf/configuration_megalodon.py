"""The configuration of the stand-alone Megalodon model."""

from __future__ import annotations

from transformers import PreTrainedConfig

SYMBOLS = {
    "M": "a block",
    "X": "a block with experts",
    "*": "attention over the document",
    "-": "an MLP",
    "E": "experts",
}
SAYS_NOTHING = {
    "*-E": ("normalization",),
    "*-": ("linear_bias",),
    "*": (
        "attention_heads",
        "num_key_value_heads",
        "head_dim",
        "attention_positions",
        "partial_rotary_factor",
        "qkv_bias",
    ),
    "EX": (
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "shared_expert_gate",
        "router_score",
        "router_pre_softmax",
        "router_scaling",
        "router_bias",
    ),
}
"""The values that say nothing of a model without one of these layers, and have their defaults."""
CHOICES = {
    "megalodon_init_mode": ("he", "bert", "xavier", "gaussian"),
    "normalization": ("LayerNorm", "RMSNorm"),
    "attention_positions": ("none", "rope"),
    "router_score": ("softmax", "sigmoid"),
}
SWITCHES = ("linear_bias", "qkv_bias", "shared_expert_gate", "router_pre_softmax", "router_bias")


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

    layer_symbols: str | None = None
    """What each layer is, a symbol of SYMBOLS for each; all are blocks where it is None."""

    normalization: str = "LayerNorm"
    """The norm before layers that are no block: LayerNorm or RMSNorm."""

    linear_bias: bool = False
    """Whether linear layers of `*` and `-` have biases."""

    attention_heads: int | None = None
    """Query heads of `*`; num_attention_heads, which blocks have."""

    num_key_value_heads: int | None = None
    """Heads of keys and values that those of `*` share; attention_heads."""

    head_dim: int | None = None
    """Width of a head of `*`; hidden_size / attention_heads."""

    attention_positions: str = "none"
    """Whether `*` rotates queries and keys by their positions in the document: none or rope."""

    partial_rotary_factor: float = 1.0
    """The share of a head's width that `*` rotates."""

    qkv_bias: bool = False
    """Whether queries, keys and values of `*` have a bias; with linear_bias they do."""

    num_experts: int | None = None
    """Experts in a layer `E` or `X`."""

    num_experts_per_tok: int = 2
    """How many of them a token goes to."""

    moe_intermediate_size: int | None = None
    """Width of an expert's hidden layer; intermediate_size."""

    shared_expert_intermediate_size: int | None = None
    """That of the expert that every token goes to; None for none."""

    shared_expert_gate: bool = False
    """Weight the shared expert by a sigmoid of its own."""

    router_score: str = "softmax"
    """What makes a router's scores: softmax or sigmoid."""

    router_pre_softmax: bool = False
    """Take the softmax over all experts and not over a token's own."""

    router_scaling: float = 1.0
    """Factor of the experts' weights."""

    router_bias: bool = False
    """Add a bias to sigmoid scores where experts are chosen."""

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
        if not isinstance(self.layer_symbols, str | None):
            raise ValueError(
                f"layer_symbols is {self.layer_symbols!r}; it takes a symbol for each layer, as in "
                "MM*M."
            )
        if self.layer_symbols is not None and not self.layer_symbols.strip("M"):
            self._check_number_of_layers()
            self.layer_symbols = None
        self._derive_beside()
        super().__post_init__(**kwargs)
        self._check()

    @property
    def symbols(self) -> str:
        """What each layer is."""
        return self.layer_symbols or "M" * self.num_hidden_layers

    def has(self, symbols: str) -> bool:
        """Whether a layer is one of these."""
        return any(z in symbols for z in self.layer_symbols or "M")

    def to_diff_dict(self) -> dict[str, object]:
        """What config.json says: nothing of layers that the model has none of."""
        values = super().to_diff_dict()
        for symbols, names in SAYS_NOTHING.items():
            if not self.has(symbols):
                values = {name: value for name, value in values.items() if name not in names}
        if self.layer_symbols is None:
            values.pop("layer_symbols", None)
        return values

    def _derive_beside(self) -> None:
        """What follows for layers beside blocks, of values that are checked later."""
        derived = {}
        if self.has("*"):
            derived["attention_heads"] = self.attention_heads or self.num_attention_heads
            derived["num_key_value_heads"] = derived["attention_heads"]
            heads = derived["attention_heads"]
            if isinstance(heads, int) and heads > 0:
                derived["head_dim"] = self.hidden_size // heads
            self.qkv_bias = self.qkv_bias or self.linear_bias
        if self.has("EX"):
            derived["moe_intermediate_size"] = self.intermediate_size
        for name, value in derived.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def _check_number_of_layers(self) -> None:
        if len(self.layer_symbols) != self.num_hidden_layers:
            raise ValueError(
                f"layer_symbols has {len(self.layer_symbols)} symbols and num_hidden_layers is "
                f"{self.num_hidden_layers}; give each layer one."
            )

    def _check_layers(self) -> None:
        """Checks layers beside blocks and their values."""
        if self.layer_symbols is not None:
            for symbol in self.layer_symbols:
                if symbol not in SYMBOLS:
                    listed = ", ".join(f"{z} ({what})" for z, what in SYMBOLS.items())
                    raise ValueError(f"layer_symbols has {symbol!r}; it takes {listed}.")
            self._check_number_of_layers()
        for symbols, names in SAYS_NOTHING.items():
            for name in names:
                default = getattr(type(self), name)
                if not self.has(symbols) and getattr(self, name) != default:
                    raise ValueError(
                        f"{name} is {getattr(self, name)!r}, but layer_symbols has none of "
                        f"{', '.join(symbols)}, of which it says something; leave it out."
                    )
        for name in SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it takes true or false.")
        for name in ("partial_rotary_factor", "router_scaling"):
            if not _is_number(getattr(self, name)) or not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it takes a positive number.")
        if self.has("-EX") and self.swiglu is not True:
            raise ValueError(
                f"swiglu is {self.swiglu!r}; layers -, E and X are gated, so it takes true."
            )
        if self.has("*"):
            self._check_attention()
        if self.has("EX"):
            self._check_experts()

    def _check_attention(self) -> None:
        for name in ("attention_heads", "num_key_value_heads", "head_dim"):
            _check_size(name, getattr(self, name))
        if self.attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads is {self.num_key_value_heads}; it takes a divisor of "
                f"attention_heads, which is {self.attention_heads}."
            )
        if self.partial_rotary_factor > 1:
            raise ValueError(
                f"partial_rotary_factor is {self.partial_rotary_factor}; it takes 1 or less."
            )
        if (
            self.attention_positions == "rope"
            and self.partial_rotary_factor == 1
            and self.head_dim % 2
        ):
            raise ValueError(
                f"head_dim is {self.head_dim}; rope rotates pairs, so it takes an even number."
            )

    def _check_experts(self) -> None:
        for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
            _check_size(name, getattr(self, name))
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}; num_experts is "
                f"{self.num_experts}, and it takes no more."
            )
        if self.shared_expert_intermediate_size is not None:
            name = "shared_expert_intermediate_size"
            _check_size(name, self.shared_expert_intermediate_size)
        elif self.shared_expert_gate:
            raise ValueError(
                "shared_expert_gate is True, but there is no shared expert; give "
                "shared_expert_intermediate_size too."
            )
        if self.router_bias and self.router_score != "sigmoid":
            raise ValueError(
                f"router_bias is True, which goes with router_score sigmoid; it is "
                f"{self.router_score}."
            )

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
            _check_size(name, getattr(self, name))
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
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                listed = f"{', '.join(choices[:-1])} or {choices[-1]}"
                raise ValueError(f"{name} is {getattr(self, name)!r}; it takes {listed}.")
        for name in ("dropout", "hidden_dropout", "attention_dropout"):
            if not _is_number(getattr(self, name)) or not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it takes a number from 0 up to below 1."
                )
        self._check_layers()


def _check_size(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value}; it takes a positive integer.")
    if value >= 2**31:
        raise ValueError(f"{name} is {value}; it takes less than 2**31.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


__all__ = ["MegalodonConfig"]
