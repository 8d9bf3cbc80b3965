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


def _value(
    default: Any = dataclasses.MISSING,
    *,
    megatron: str | None = None,
    core: str | None = None,
    hf: str | None = None,
    released: str | None = None,
    said: bool = False,
    choices: tuple[str, ...] | None = None,
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
        help: of the command line, for arguments of our own.
    """
    names = {"megatron": megatron, "core": core or megatron, "hf": hf, "released": released}
    return dataclasses.field(
        default=default, metadata=names | {"said": said, "choices": choices, "help": help}
    )


@dataclass(frozen=True)
class MegalodonConfig:
    """A model's shape and the numbers that its forward pass depends on.

    Widths that are None follow from hidden_size and are numbers once it is made. No layer depends
    on vocab_size, without padding, and tied.

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

    def __post_init__(self) -> None:
        for name, kind in KINDS.items():
            given = getattr(self, name)
            if given is None and FIELDS[name].default is None:
                continue
            accepted = {"int": int, "float": (int, float), "bool": bool, "str": str}[kind]
            if not isinstance(given, accepted) or (isinstance(given, bool) and kind != "bool"):
                raise ValueError(f"{name} is {given!r}; it takes a value of {kind}.")
        derived = {
            "z_dim": self.hidden_size // 4,
            "value_dim": 2 * self.hidden_size,
            "norm_num_groups": min(64, max(1, self.hidden_size // 32)),
        }
        for name, width in derived.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, width)
        self._check()

    def _check(self) -> None:
        for name, kind in KINDS.items():
            if kind == "int" and not 1 <= getattr(self, name) < 2**31:
                wanted = "a positive integer" if getattr(self, name) < 1 else "less than 2**31"
                raise ValueError(f"{name} is {getattr(self, name)}; it takes {wanted}.")
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
        """The values by their names in a form: megatron, core, hf or released."""
        return {theirs: getattr(self, ours) for ours, theirs in names(form).items()}

    def own_values(self) -> dict[str, Any]:
        """The values that Megatron has no argument for."""
        return {name: getattr(self, name) for name in OWN}


FIELDS = {field.name: field for field in dataclasses.fields(MegalodonConfig)}
KINDS = {name: str(field.type) for name, field in FIELDS.items()}
"""Every value's type, by its name: int, float, bool or str."""
OWN = tuple(name for name, field in FIELDS.items() if field.metadata["megatron"] is None)
"""The values that Megatron has no argument for."""


def names(form: str) -> dict[str, str]:
    """A form's names (megatron, core, hf or released) by ours; what it lacks is left out."""
    prefix = ARGUMENT_PREFIX if form in ("megatron", "core") else ""
    found = {
        name: prefix + name if field.metadata[form] is None else field.metadata[form]
        for name, field in FIELDS.items()
    }
    return {ours: theirs for ours, theirs in found.items() if theirs}


def config_from(values: Mapping[str, Any], form: str, origin: str) -> MegalodonConfig:
    """The model that values with a form's names describe; None is as good as absent.

    Args:
        values: a configuration, with other values among them.
        form: megatron, core, hf or released.
        origin: the configuration's file, for errors.

    Raises:
        ValueError: a value is missing, of the wrong type, or does not fit the others.
    """
    by_name = names(form)
    found = {
        ours: values[theirs] for ours, theirs in by_name.items() if values.get(theirs) is not None
    }
    for name, field in FIELDS.items():
        if name not in found and name in by_name and field.metadata["said"]:
            raise ValueError(f"{origin} does not say {by_name[name]}.")
    try:
        return MegalodonConfig(**found)
    except ValueError as error:
        raise ValueError(f"{origin} describes no model: {error}") from None


def config_from_arguments(arguments: Namespace, vocab_size: int, origin: str) -> MegalodonConfig:
    """The model that was trained with these arguments of Megatron's.

    Raises:
        ValueError: they are not Megalodon's, or do not fit together.
    """
    values = vars(arguments)
    if values.get(f"{ARGUMENT_PREFIX}chunk_size") is None:
        raise ValueError(f"{origin} has no Megalodon: its arguments lack megalodon_chunk_size.")
    config = config_from(values, "megatron", f"{origin}'s arguments")
    tied = not values.get("untie_embeddings_and_output_weights", False)
    return dataclasses.replace(config, tied=tied, vocab_size=vocab_size)
