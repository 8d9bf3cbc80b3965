"""The one description of a Megalodon's shape, with every value's name in every format.

What else has such values (Megatron's arguments and configurations, config.json of the Hugging Face
model, the released ModelConf, command lines) is read from and written to this by the names here.
"""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ARGUMENT_PREFIX = "megalodon_"
"""Values that Megatron has no argument for live in its arguments, and so in its checkpoints, behind
this."""

INIT_MODES = ("he", "bert", "xavier", "gaussian")
MAX_LAYERS = 10_000
"""More are a damaged number, of which no list can be made."""
BLOCKS = "MX"
"""The symbols of Megalodon's blocks; an X has a mixture of experts for its feed-forward network."""
SYMBOLS = {
    "M": "a Megalodon block",
    "X": "a Megalodon block with experts",
    "*": "attention",
    "-": "an MLP",
    "E": "experts",
}
"""What a layer may be. X is ours alone: in Megatron's patterns it is an M under --num-experts."""


def _value(
    default: Any = dataclasses.MISSING,
    *,
    megatron: str | None = None,
    core: str | None = None,
    hf: str | None = None,
    released: str | None = None,
    said: bool = False,
    choices: tuple[str, ...] | None = None,
    symbols: str = "",
    help: str = "",
) -> Any:
    """A field, with its names where they are not the field's own.

    Args:
        default: its value where nobody gives one.
        megatron: Megatron's argument, "" where there is none; by default one of our own,
            ARGUMENT_PREFIX before the name.
        core: the field of TransformerConfig and of Bridge's provider; `megatron` by default.
        hf: in config.json.
        released: in the released ModelConf.
        said: whether a checkpoint that does not say it is damaged.
        choices: the values that it takes.
        symbols: of the layers that it says something of, if not of all models.
        help: of the command line, for arguments of our own.
    """
    names = {"megatron": megatron, "core": core or megatron, "hf": hf, "released": released}
    return dataclasses.field(
        default=default,
        metadata=names | {"said": said, "choices": choices, "symbols": symbols, "help": help},
    )


def _beside(default: Any, megatron: str, hf: str, symbols: str, **rest: Any) -> Any:
    """A field of layers that the released code has none of; it has its default in other models."""
    return _value(default, megatron=megatron, hf=hf, released="", symbols=symbols, **rest)


@dataclass(frozen=True)
class MegalodonConfig:
    """A model's shape and the numbers that its forward pass depends on.

    Widths that are None follow from others and are numbers once it is made. No layer depends on
    vocab_size, without padding, and tied. `layers` has a symbol of SYMBOLS for each layer, or is
    None where all are M.

    Raises:
        ValueError: a value does not fit; one sentence names it and what would work.
    """

    num_layers: int = _value(megatron="num_layers", hf="num_hidden_layers", said=True)
    hidden_size: int = _value(megatron="hidden_size", released="model_dim", said=True)
    num_heads: int = _value(
        hf="num_attention_heads",
        said=True,
        help="Attention heads (--num-attention-heads, which Megatron wants to be a multiple of "
        "--tensor-model-parallel-size, while ranks can share a Megalodon head).",
    )
    ffn_hidden_size: int = _value(
        megatron="ffn_hidden_size", hf="intermediate_size", released="ffn_hidden_dim", said=True
    )
    chunk_size: int = _value(
        2048,
        said=True,
        help="Positions an attention chunk spans; nothing attends across chunks (2048).",
    )
    z_dim: int = _value(
        None,
        said=True,
        help="Width of the shared representation that queries and keys come from (hidden size/4).",
    )
    value_dim: int = _value(
        None, said=True, help="Width of the attention values and their gate (2 x hidden size)."
    )
    cema_ndim: int = _value(16, said=True, help="EMA dimensions per channel (16).")
    norm_num_groups: int = _value(
        None, said=True, help="Groups of TimestepNorm (hidden size / 32, at most 64)."
    )
    rotary_base: float = _value(
        10_000.0, megatron="rotary_base", hf="rope_theta", released="rope_base"
    )
    norm_eps: float = _value(1e-5, megatron="layernorm_epsilon")
    swiglu: bool = _value(False, megatron="swiglu", core="gated_linear_unit")
    rescale_nffn: bool = _value(
        False, help="Multiply the FFN's output by a learned vector starting at 0.1 * 0.5^layer."
    )
    scale_embedding: bool = _value(
        False, released="scale_emb", help="Multiply the embedding by sqrt(hidden size)."
    )
    dropout: float = _value(0.0, megatron="hidden_dropout")
    hidden_dropout: float = _value(
        0.0,
        help="Dropout on the mixer's and FFN's hidden activations (0). Megatron's --hidden-dropout "
        "is the one on the embedding and on both residual updates.",
    )
    attention_dropout: float = _value(0.0, megatron="attention_dropout")
    init_mode: str = _value(
        "he", hf="megalodon_init_mode", choices=INIT_MODES, help="How projections start (he)."
    )
    # Megatron's argument says the opposite and its vocabulary is padded: config_from_arguments.
    tied: bool = _value(
        False,
        megatron="",
        core="share_embeddings_and_output_weights",
        hf="tie_word_embeddings",
        released="share_emb",
    )
    vocab_size: int = _value(32_000, megatron="", core="vocab_size", said=True)
    # Megatron says it in two arguments: config_from_arguments.
    layers: str = _value(None, megatron="", hf="layer_symbols", released="")
    normalization: str = _beside(
        "LayerNorm", "normalization", "normalization", "*-E", choices=("LayerNorm", "RMSNorm")
    )
    linear_bias: bool = _beside(False, "add_bias_linear", "linear_bias", "*-")
    attention_heads: int = _beside(None, "num_attention_heads", "attention_heads", "*")
    attention_groups: int = _beside(None, "num_query_groups", "num_key_value_heads", "*")
    attention_head_dim: int = _beside(None, "kv_channels", "head_dim", "*")
    attention_positions: str = _beside(
        "none", "position_embedding_type", "attention_positions", "*", choices=("none", "rope")
    )
    rotary_percent: float = _beside(1.0, "rotary_percent", "partial_rotary_factor", "*")
    qkv_bias: bool = _beside(False, "add_qkv_bias", "qkv_bias", "*")
    num_experts: int = _beside(None, "num_experts", "num_experts", "EX", core="num_moe_experts")
    experts_per_token: int = _beside(2, "moe_router_topk", "num_experts_per_tok", "EX")
    expert_ffn_size: int = _beside(None, "moe_ffn_hidden_size", "moe_intermediate_size", "EX")
    shared_expert_size: int = _beside(
        None, "moe_shared_expert_intermediate_size", "shared_expert_intermediate_size", "EX"
    )
    shared_expert_gate: bool = _beside(False, "moe_shared_expert_gate", "shared_expert_gate", "EX")
    router_score: str = _beside(
        "softmax", "moe_router_score_function", "router_score", "EX", choices=("softmax", "sigmoid")
    )
    router_pre_softmax: bool = _beside(False, "moe_router_pre_softmax", "router_pre_softmax", "EX")
    router_scaling: float = _beside(1.0, "moe_router_topk_scaling_factor", "router_scaling", "EX")
    router_bias: bool = _beside(False, "moe_router_enable_expert_bias", "router_bias", "EX")

    def __post_init__(self) -> None:
        for name, kind in KINDS.items():
            given = getattr(self, name)
            if given is None and FIELDS[name].default is None:
                continue
            accepted = {"int": int, "float": (int, float), "bool": bool, "str": str}[kind]
            if not isinstance(given, accepted) or (isinstance(given, bool) and kind != "bool"):
                raise ValueError(f"{name} is {given!r}; it takes a value of {kind}.")
        self._derive("z_dim", self.hidden_size // 4)
        self._derive("value_dim", 2 * self.hidden_size)
        self._derive("norm_num_groups", min(64, max(1, self.hidden_size // 32)))
        self._check_layers()
        for name, field in FIELDS.items():
            if field.metadata["symbols"] and not self.has(name):
                object.__setattr__(self, name, field.default)
        if self.has("attention_heads"):
            self._derive("attention_heads", self.num_heads)
            self._derive("attention_groups", self.attention_heads)
            self._derive("attention_head_dim", self.hidden_size // max(1, self.attention_heads))
            # As Megatron has it.
            object.__setattr__(self, "qkv_bias", self.qkv_bias or self.linear_bias)
        if self.has("num_experts"):
            self._derive("expert_ffn_size", self.ffn_hidden_size)
        self._check()

    def _derive(self, name: str, value: Any) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    def has(self, name: str) -> bool:
        """Whether a value says something of this model, which it does where its layers have it."""
        symbols = FIELDS[name].metadata["symbols"]
        return not symbols or any(symbol in symbols for symbol in self.layers or "M")

    @property
    def symbols(self) -> str:
        """What each layer is."""
        return self.layers or "M" * self.num_layers

    def _check_layers(self) -> None:
        if self.layers is None:
            return
        for symbol in self.layers:
            if symbol not in SYMBOLS:
                raise ValueError(
                    f"layers has {symbol!r}; it takes {', '.join(SYMBOLS)}, for "
                    f"{', '.join(SYMBOLS.values())}."
                )
        if len(self.layers) != self.num_layers and 1 <= self.num_layers <= MAX_LAYERS:
            raise ValueError(
                f"layers has {len(self.layers)} symbols and num_layers is {self.num_layers}; give "
                "each layer one."
            )
        if not self.layers.strip("M"):
            object.__setattr__(self, "layers", None)

    def _check(self) -> None:
        for name, kind in KINDS.items():
            if (
                kind == "int"
                and getattr(self, name) is None
                and (not self.has(name) or name == "shared_expert_size")
            ):
                continue
            if kind == "int" and not 1 <= getattr(self, name) < 2**31:
                wanted = "a positive integer" if getattr(self, name) < 1 else "less than 2**31"
                raise ValueError(f"{_said(name)} is {getattr(self, name)}; it takes {wanted}.")
        if self.num_layers > MAX_LAYERS:
            raise ValueError(f"num_layers is {self.num_layers}; it takes {MAX_LAYERS} at most.")
        for name in ("rotary_base", "norm_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it takes a positive number.")
        for name in ("dropout", "hidden_dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it takes a number from 0 up to below 1."
                )
        heads = self.num_heads
        for name in ("z_dim", "value_dim"):
            if getattr(self, name) % heads:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, which the {heads} heads "
                    f"(--num-attention-heads) do not divide; take a multiple of {heads}."
                )
        if (self.z_dim // heads) % 2:
            raise ValueError(
                f"z_dim is {self.z_dim}, so a head is {self.z_dim // heads} wide; RoPE rotates "
                f"pairs, so take a multiple of {2 * heads}."
            )
        if self.hidden_size % self.norm_num_groups:
            raise ValueError(
                f"norm_num_groups is {self.norm_num_groups}, which does not divide --hidden-size "
                f"{self.hidden_size}."
            )
        if self.has("attention_heads") and self.attention_heads % self.attention_groups:
            raise ValueError(
                f"{_said('attention_groups')} is {self.attention_groups}, which does not divide "
                f"the {self.attention_heads} of {_said('attention_heads')}."
            )
        if not 0 < self.rotary_percent <= 1:
            raise ValueError(
                f"{_said('rotary_percent')} is {self.rotary_percent}; it takes more than 0 and 1 "
                "at most."
            )
        if self.has("num_experts") and self.experts_per_token > self.num_experts:
            raise ValueError(
                f"{_said('experts_per_token')} is {self.experts_per_token}, but num_experts is "
                f"{self.num_experts}; take that or less."
            )
        for name, field in FIELDS.items():
            choices = field.metadata["choices"]
            if choices and getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it takes {', '.join(choices)}."
                )

    @property
    def head_dim(self) -> int:
        """Width of a query or key head."""
        return self.z_dim // self.num_heads

    def named(self, form: str) -> dict[str, Any]:
        """The values by their names in a form: megatron, core, hf or released.

        Those that say nothing of this model are left out.
        """
        found = {t: getattr(self, ours) for ours, t in names(form).items() if self.has(ours)}
        return {name: value for name, value in found.items() if value is not None}

    def own_values(self) -> dict[str, Any]:
        """The values that Megatron has no argument for."""
        return {name: getattr(self, name) for name in OWN}


FIELDS = {field.name: field for field in dataclasses.fields(MegalodonConfig)}
KINDS = {name: str(field.type) for name, field in FIELDS.items()}
"""Every value's type, by its name: int, float, bool or str."""
OWN = tuple(name for name, field in FIELDS.items() if field.metadata["megatron"] is None)
"""The values that Megatron has no argument for."""


def _said(name: str) -> str:
    """A value's name for a sentence, with Megatron's argument where that is another one."""
    theirs = FIELDS[name].metadata["megatron"]
    is_other = FIELDS[name].metadata["symbols"] and theirs != name
    return f"{name} (--{theirs.replace('_', '-')})" if is_other else name


def names(form: str) -> dict[str, str]:
    """A form's names (megatron, core, hf or released) by ours; what it lacks is left out."""
    prefix = ARGUMENT_PREFIX if form in ("megatron", "core") else ""
    found = {
        name: prefix + name if field.metadata[form] is None else field.metadata[form]
        for name, field in FIELDS.items()
    }
    return {ours: theirs for ours, theirs in found.items() if theirs}


def config_from(
    values: Mapping[str, Any], form: str, origin: str, **others: Any
) -> MegalodonConfig:
    """The model that values with a form's names describe; None is as good as absent.

    Args:
        values: a configuration, with other values among them.
        form: megatron, core, hf or released.
        origin: the configuration's file, for errors.
        **others: values by our names, that the form has none for.

    Raises:
        ValueError: a value is missing, of the wrong type, or does not fit the others.
    """
    by_name = names(form)
    found = {
        ours: values[theirs] for ours, theirs in by_name.items() if values.get(theirs) is not None
    } | others
    for name, field in FIELDS.items():
        if name not in found and name in by_name and field.metadata["said"]:
            raise ValueError(f"{origin} does not say {by_name[name]}.")
    try:
        return MegalodonConfig(**found)
    except ValueError as error:
        raise ValueError(f"{origin} describes no model: {error}") from None


def layers_beside_blocks(pattern: str | None) -> str:
    """The symbols of a model's layers, or of its pattern, that are no Megalodon block."""
    return "".join(z for z in pattern or "" if z not in BLOCKS + "|/")


def layers_of(
    pattern: str | None,
    num_layers: int,
    num_experts: int | None,
    expert_frequency: int | list[int] = 1,
) -> str:
    """The symbols of a model's layers by Megatron's arguments.

    Args:
        pattern: --hybrid-layer-pattern, of which layers that predict further tokens are left out;
            None for blocks alone.
        num_layers: of a model without a pattern.
        num_experts: in an E layer or, where the pattern has none, in blocks.
        expert_frequency: --moe-layer-freq: of how many blocks the first one has experts, or a 1 for
            each block that has and a 0 for each that has not.

    Raises:
        ValueError: there is no such frequency; one sentence says so.
    """
    layers = (pattern or "M" * num_layers).partition("/")[0].replace("|", "")
    if not num_experts or "E" in layers:
        return layers
    blocks = layers.count("M")
    if isinstance(expert_frequency, int):
        if expert_frequency < 1:
            raise ValueError(f"--moe-layer-freq is {expert_frequency}; it takes 1 or more.")
        with_experts = [int(block % expert_frequency == 0) for block in range(blocks)]
    else:
        with_experts = expert_frequency
    if len(with_experts) != blocks:
        raise ValueError(
            f"--moe-layer-freq has {len(with_experts)} numbers and there are {blocks} Megalodon "
            "blocks; give each one."
        )
    if not any(with_experts) or set(with_experts) - {0, 1}:
        raise ValueError(
            f"--moe-layer-freq is {with_experts}; it takes a 1 for each block with experts, of "
            "which there has to be one, and a 0 for each without."
        )
    numbers = iter(with_experts)
    return "".join("X" if z == "M" and next(numbers) else z for z in layers)


def layers_of_a_depth(pattern: str | None, layers: str) -> str:
    """The symbols of the layers that predict one further token; in a GPTModel it is one block.

    Their blocks are of the kind of the model's last.

    Args:
        pattern: --hybrid-layer-pattern with a /, or None.
        layers: the model's symbols, by layers_of.
    """
    block = next(symbol for symbol in reversed(layers) if symbol in BLOCKS)
    return (pattern or "/M").rpartition("/")[2].replace("M", block)


UNDESCRIBED = {
    "rotary_interleaved": "*",
    "moe_router_num_groups": "EX",
    "moe_expert_capacity_factor": "EX",
    "moe_router_force_load_balancing": "EX",
}
"""Arguments that change what trained layers compute, with those layers, and have no value here."""

BALANCING_THAT_CHOOSES = ("sinkhorn", "quantile_balancing")
"""Values of --moe-router-load-balancing-type that change which experts are chosen."""


def shape_from_arguments(values: Mapping[str, Any], origin: str) -> MegalodonConfig:
    """The model of these arguments of Megatron's, but for what its embedding and output are.

    Raises:
        ValueError: they do not fit together.
    """
    if not values.get("group_query_attention"):
        values = {**values, "num_query_groups": None}
    layers = layers_of(
        values.get("hybrid_layer_pattern"),
        values.get("num_layers") or 0,
        values.get("num_experts"),
        values.get("moe_layer_freq") or 1,
    )
    return config_from(values, "megatron", origin, layers=layers)


def config_from_arguments(arguments: Namespace, vocab_size: int, origin: str) -> MegalodonConfig:
    """The model that was trained with these arguments of Megatron's.

    Raises:
        ValueError: they are not Megalodon's, or do not fit together.
    """
    values = vars(arguments)
    if values.get(f"{ARGUMENT_PREFIX}chunk_size") is None:
        raise ValueError(f"{origin} has no Megalodon: its arguments lack megalodon_chunk_size.")
    config = shape_from_arguments(values, f"{origin}'s arguments")
    _refuse_undescribed(config, values, origin)
    tied = not values.get("untie_embeddings_and_output_weights", False)
    return dataclasses.replace(config, tied=tied, vocab_size=vocab_size)


def _refuse_undescribed(config: MegalodonConfig, values: Mapping[str, Any], origin: str) -> None:
    """Refuses arguments that the layers beside blocks compute by and no value here stands for."""
    found = {name: values.get(name) for name in UNDESCRIBED if values.get(name)}
    if config.has("num_experts") and values.get("add_bias_linear"):
        found["add_bias_linear"] = True
    balancing = values.get("moe_router_load_balancing_type") or ()
    for kind in BALANCING_THAT_CHOOSES:
        if config.has("num_experts") and kind in balancing:
            found["moe_router_load_balancing_type"] = kind
    needed = [name for name, symbols in UNDESCRIBED.items() if set(symbols) & set(config.symbols)]
    for name, value in found.items():
        if name in (*needed, "add_bias_linear", "moe_router_load_balancing_type"):
            raise ValueError(
                f"{origin} was trained with --{name.replace('_', '-')} {value}, for which its "
                f"layers {config.layers} have no place outside Megatron."
            )
    if set(config.symbols) & set("-EX") and not config.swiglu:
        raise ValueError(
            f"{origin} was trained without --swiglu; outside Megatron, MLPs and experts have it."
        )
