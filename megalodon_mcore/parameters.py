"""The one table of a model's parameters: names, shapes, types, places on ranks, first values.

A parameter here is the smallest tensor that any format has: where a format joins several (Megatron
has Wh1 and Wh2, and W1 and W3, in one weight each), it holds a range of the joined one. All formats
but megalodon-hf's store norm weights as offsets from one, linear weights as [out, in], and CEMA's
parameters in the shapes of the released code, so values never change.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from megalodon_mcore.config import BLOCKS, MegalodonConfig


class Part(NamedTuple):
    """A range of a joined tensor: the index-th of the ranges along the axis."""

    axis: int
    index: int
    apart: bool = False
    """Whether a checkpoint of Megatron's has it under a name of its own."""


@dataclass(frozen=True)
class Row:
    """One line of the table; names without their `decoder.layers.N.` and the like in front."""

    mcore: str
    hf: str
    released: str
    shape: str
    """Widths by letter, or numbers. D hidden, Z, E value, F ffn, N cema_ndim, V vocabulary; of
    layers beside blocks Q queries, keys and values, A attention's output, X experts, G an expert's
    ffn, S the shared expert's."""
    init: str
    """The first values: a name of `layers.initialization`'s; "" in modules of Megatron's own, which
    see to it, and to their places on ranks."""
    split: int | None = 0
    """The axis that the released code's model parallelism cuts; None where ranks have copies."""
    float32: bool = False
    """Whether it stays float32 in a bf16 model. Muon takes the others' matrices."""
    tp: int | None = None
    """The axis that Megatron's tensor parallelism cuts; None where ranks have copies. The Z rows of
    an axis are cut by heads, which several ranks may share."""
    gradient: str = ""
    """The part of its gradient that ranks with copies see: "positions", other ones under sequence
    parallelism; "parts", of what they go on to compute; else all of it, or Megatron's own layer
    knows."""
    part: Part | None = None
    """Its place in Megatron's parameter, where that holds more."""
    only: str = ""
    """The configuration's value that it exists with, as "swiglu", "not tied" or "name=value"."""
    layers: str = BLOCKS
    """The symbols of the layers that have it; no matter outside layers."""

    def exists_in(self, config: MegalodonConfig) -> bool:
        """Whether a model of this configuration has it, in its layers that may."""
        name, _, wanted = self.only.removeprefix("not ").partition("=")
        if not name:
            return True
        value = getattr(config, name)
        return value == wanted if wanted else bool(value) != self.only.startswith("not ")

    def shape_in(self, config: MegalodonConfig) -> tuple[int, ...]:
        """The whole tensor's shape."""
        return self.shape_of(
            D=config.hidden_size,
            Z=config.z_dim,
            E=config.value_dim,
            F=config.ffn_hidden_size,
            N=config.cema_ndim,
            V=config.vocab_size,
            **_widths_beside(config),
        )

    def shape_of(self, **widths: int) -> tuple[int, ...]:
        """The shape for these widths by letter."""
        return tuple(widths[z] if z in widths else int(z) for z in self.shape.split())

    @property
    def by_heads(self) -> bool:
        """Whether tensor parallelism cuts it by heads, so that ranks may share a part."""
        return self.tp is not None and self.shape.split()[self.tp] == "Z"


def _widths_beside(config: MegalodonConfig) -> dict[str, int]:
    """The widths of layers beside blocks that the model has."""
    found = {}
    if config.has("attention_heads"):
        queries = config.attention_heads * config.attention_head_dim
        keys = config.attention_groups * config.attention_head_dim
        found |= {"Q": queries + 2 * keys, "A": queries}
    if config.has("num_experts"):
        found |= {"X": config.num_experts, "G": config.expert_ffn_size}
        found["S"] = config.shared_expert_size or 0
    return found


def _norm(mcore: str, hf: str, released: str, **values: object) -> Row:
    return Row(
        mcore, hf, released, "D", "zeros", **({"gradient": "positions"} | values), float32=True
    )


def _ema(name: str, shape: str, init: str) -> Row:
    own = f"cema.{name}"
    return Row(f"mixer.{own}", own, f"mega.{own}", shape, init, float32=True, tp=0)


def _linear(mcore: str, hf: str, released: str, shape: str, **values: object) -> Row:
    init = "projection" if " " in shape else "zeros"
    return Row(mcore, hf, released, shape, init, **({"tp": 0} | values))


def _affine(mcore: str, hf: str, released: str) -> Row:
    return Row(
        mcore, hf, released, "2 Z", "zeros", split=1, float32=True, tp=1, gradient="parts"
    )  # fmt: skip


def _megatron(
    layers: str, mcore: str, hf: str, shape: str, tp: int = 0, bias: str = "linear_bias"
) -> tuple[Row, Row]:
    """A linear layer of Megatron's own, with the value that its bias exists with."""
    width = shape.split()[0]
    return (
        Row(f"{mcore}.weight", f"{hf}.weight", "", shape, "", tp=tp, layers=layers),
        Row(
            f"{mcore}.bias", f"{hf}.bias", "", width, "", tp=None if tp else 0, only=bias,
            layers=layers,
        ),
    )  # fmt: skip


def _gated(layers: str, mcore: str, hf: str, width: str, only: str = "") -> tuple[Row, ...]:
    """A first linear layer of two, with the gate's weight before the other, and its bias."""
    return tuple(
        Row(
            f"{mcore}.{name}", f"{hf}.{w}.{name}", "", shape, "", tp=0, part=Part(0, index),
            only=only if name == "weight" else "linear_bias", layers=layers,
        )
        for name, shape in (("weight", f"{width} D"), ("bias", width))
        for index, w in enumerate(("w1", "w3"))
        # Experts have no biases here.
        if name == "weight" or not only
    )  # fmt: skip


def _beside(layers: str, mcore: str, hf: str) -> tuple[Row, Row]:
    """A norm before a layer that is no block: RMSNorm or LayerNorm."""
    weight, bias = (
        Row(f"{mcore}.{z}", f"{hf}.{z}", "", "D", "zeros", float32=True, layers=layers)
        for z in ("weight", "bias")
    )
    return weight, dataclasses.replace(bias, only="normalization=LayerNorm")


def _experts(layers: str, mcore: str) -> tuple[Row, ...]:
    """A mixture of experts; a checkpoint of Megatron's has the experts of a layer in one tensor."""

    def row(ours: str, hf: str, shape: str, **values: Any) -> Row:
        return Row(mcore + ours, hf, "", shape, "", layers=layers, **values)

    first, shared = "experts.experts.linear_fc1.weight", "shared_experts."
    return (
        row("router.weight", "experts.router.weight", "X D"),
        row("router.expert_bias", "experts.router_bias", "X", float32=True, only="router_bias"),
        row(first, "experts.w1", "X G D", tp=1, part=Part(1, 0)),
        row(first, "experts.w3", "X G D", tp=1, part=Part(1, 1)),
        row("experts.experts.linear_fc2.weight", "experts.w2", "X D G", tp=2),
        *_gated(
            layers, f"{mcore}{shared}linear_fc1", "shared_expert", "S", only="shared_expert_size"
        ),
        row(
            f"{shared}linear_fc2.weight", "shared_expert.w2.weight", "D S", tp=1,
            only="shared_expert_size",
        ),
        row(
            f"{shared}gate_weight", "shared_expert.gate.weight", "1 D", only="shared_expert_gate"
        ),
    )  # fmt: skip


LAYER_ROWS = (
    _norm("mixer.timestep_norm.weight", "timestep_norm.weight", "mega.timenorm.weight"),
    _norm("mixer.timestep_norm.bias", "timestep_norm.bias", "mega.timenorm.bias"),
    _ema("alpha", "D N 1", "decay"),
    _ema("delta", "D N 1", "decay"),
    _ema("theta", "D 1 1", "frequency"),
    _ema("gamma", "D N 2", "readout"),
    _ema("omega", "D 1", "direct"),
    _norm(
        "mixer.cema_norm.weight", "cema_norm.weight", "mega.rmsnorm.weight",
        split=None, gradient="parts",
    ),
    _linear("mixer.linear_z.weight", "wz.weight", "mega.wz.weight", "Z D", gradient="parts"),
    _linear("mixer.linear_z.bias", "wz.bias", "mega.wz.bias", "Z", gradient="parts"),
    _affine("mixer.query_key.weight", "query_key.weight", "mega.gamma"),
    _affine("mixer.query_key.bias", "query_key.bias", "mega.beta"),
    _linear("mixer.linear_v.weight", "wv.weight", "mega.wv.weight", "E D"),
    _linear("mixer.linear_v.bias", "wv.bias", "mega.wv.bias", "E"),
    _linear("mixer.linear_r.weight", "wr.weight", "mega.wr.weight", "E D"),
    _linear("mixer.linear_r.bias", "wr.bias", "mega.wr.bias", "E"),
    _linear(
        "mixer.linear_proj.weight", "wh1.weight", "mega.wh1.weight", "D D", tp=1,
        part=Part(1, 0, apart=True),
    ),
    _linear("mixer.linear_proj.bias", "wh1.bias", "mega.wh1.bias", "D", tp=None),
    _linear(
        "mixer.linear_proj.weight", "wh2.weight", "mega.wh2.weight", "D E",
        split=1, tp=1, part=Part(1, 1, apart=True),
    ),
    _norm("feed_forward.norm.weight", "ffn_norm.weight", "nffn.norm.weight", split=None),
    _norm("feed_forward.norm.bias", "ffn_norm.bias", "nffn.norm.bias", split=None),
    _linear(
        "feed_forward.linear_fc1.weight", "ffn.w1.weight", "nffn.fc1.weight", "F D",
        part=Part(0, 0), layers="M",
    ),
    _linear(
        "feed_forward.linear_fc1.weight", "ffn.w3.weight", "nffn.fc3.weight", "F D",
        part=Part(0, 1), only="swiglu", layers="M",
    ),
    _linear(
        "feed_forward.linear_fc2.weight", "ffn.w2.weight", "nffn.fc2.weight", "D F", split=1, tp=1,
        layers="M",
    ),
    Row(
        "feed_forward.rescale.weight", "ffn.rescale.weight", "nffn.alpha", "D", "rescale",
        split=None, float32=True, gradient="positions", only="rescale_nffn",
    ),
    *_beside("*", "input_layernorm", "norm"),
    *_megatron("*", "self_attention.linear_qkv", "attention.qkv", "Q D", bias="qkv_bias"),
    *_megatron("*", "self_attention.linear_proj", "attention.proj", "D A", tp=1),
    *_beside("-E", "pre_mlp_layernorm", "norm"),
    *_gated("-", "mlp.linear_fc1", "ffn", "F"),
    *_megatron("-", "mlp.linear_fc2", "ffn.w2", "D F", tp=1),
    *_experts("E", "mlp."),
    *_experts("X", "feed_forward.experts."),
)  # fmt: skip
"""The parameters of each layer; those of no block are Megatron's, and no released code has them."""

MODEL_ROWS = (
    Row(
        "embedding.word_embeddings.weight", "model.embed_tokens.weight", "embed.weight", "V D",
        "embedding", split=1, tp=0,
    ),
    _norm("decoder.final_layernorm.weight", "model.norm.weight", "output.final_norm.weight"),
    _norm("decoder.final_layernorm.bias", "model.norm.bias", "output.final_norm.bias"),
    Row(
        "output_layer.weight", "lm_head.weight", "output.output.weight", "V D", "embedding",
        split=1, tp=0, only="not tied",
    ),
)  # fmt: skip
"""The parameters that a model has once. The released format has its output weight even where
it is tied."""


def layer_rows(config: MegalodonConfig, symbol: str) -> list[Row]:
    """The rows of a layer with this symbol."""
    return [row for row in LAYER_ROWS if symbol in row.layers and row.exists_in(config)]


def linear_modules(config: MegalodonConfig, symbol: str) -> tuple[str, ...]:
    """The linear layers by their names in a layer with this symbol."""
    names = (row.mcore.rpartition(".")[0] for row in layer_rows(config, symbol))
    return tuple(dict.fromkeys(z for z in names if z.rpartition(".")[2].startswith("linear_")))


LAYER_PREFIXES = {"mcore": "decoder.layers.", "hf": "model.layers.", "released": "layers."}


class Parameter(NamedTuple):
    """A parameter of one model; `layer` is None outside the layers."""

    row: Row
    layer: int | None
    shape: tuple[int, ...]

    @property
    def mcore(self) -> str:
        """The name in a model's state_dict; joined weights have several parameters."""
        return self._name("mcore")

    @property
    def hf(self) -> str:
        """The name in the Hugging Face model; each parameter has one, so it identifies it."""
        return self._name("hf")

    @property
    def released(self) -> str:
        """The name in the released code's checkpoints."""
        return self._name("released")

    @property
    def float32(self) -> bool:
        """Whether it stays float32 in a bf16 checkpoint."""
        return self.row.float32

    def _name(self, form: str) -> str:
        own = getattr(self.row, form)
        return own if self.layer is None else f"{LAYER_PREFIXES[form]}{self.layer}.{own}"


def parameters(config: MegalodonConfig) -> Iterator[Parameter]:
    """All of a model's parameters, from the embedding to the output."""

    def of(rows: list[Row], layer: int | None) -> Iterator[Parameter]:
        for row in rows:
            yield Parameter(row, layer, row.shape_in(config))

    once = [row for row in MODEL_ROWS if row.exists_in(config)]
    by_symbol = {symbol: layer_rows(config, symbol) for symbol in set(config.symbols)}
    yield from of(once[:1], None)
    for layer, symbol in enumerate(config.symbols):
        yield from of(by_symbol[symbol], layer)
    yield from of(once[1:], None)


def number_of_values(config: MegalodonConfig) -> int:
    """All parameters' elements."""
    return sum(math.prod(parameter.shape) for parameter in parameters(config))


def checkpoint_suffix(row: Row) -> str:
    """Of a name in a checkpoint, which keeps columns that lie side by side apart."""
    return f"_h{row.part.index + 1}" if row.part and row.part.apart else ""


def rows_by_parameter(
    prefix: str, config: MegalodonConfig, symbol: str = "M"
) -> dict[str, list[Row]]:
    """The rows of each parameter of a module of ours, by its name there.

    Args:
        prefix: what the module's names have before them in the table, such as `mixer.`.
        config: of the model that it is in.
        symbol: of the layer that it is in.
    """
    found: dict[str, list[Row]] = {}
    for row in layer_rows(config, symbol) + [z for z in MODEL_ROWS if z.exists_in(config)]:
        if row.mcore.startswith(prefix) and row.init:
            found.setdefault(row.mcore.removeprefix(prefix), []).append(row)
    return found
