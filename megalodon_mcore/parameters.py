"""The one table of a model's parameters: names, shapes, types, places on ranks, first values.

A parameter here is the smallest tensor that any format has: where a format joins several (Megatron
has Wh1 and Wh2, and W1 and W3, in one weight each), it holds a range of the joined one. All formats
but megalodon-hf's store norm weights as offsets from one, linear weights as [out, in], and CEMA's
parameters in the shapes of the released code, so values never change.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from megalodon_mcore.config import MegalodonConfig


class Part(NamedTuple):
    """A range of a joined tensor: the index-th of the ranges along the axis."""

    axis: int
    index: int


@dataclass(frozen=True)
class Row:
    """One line of the table; names without their `decoder.layers.N.` and the like in front."""

    mcore: str
    hf: str
    released: str
    shape: str
    """Widths by letter: D hidden, Z, E value, F ffn, N cema_ndim, V vocabulary, or a number."""
    init: str
    """The first values: a name of `layers.initialization`'s."""
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
    """The configuration's flag that it exists with; "not tied" for its opposite."""

    def exists_in(self, config: MegalodonConfig) -> bool:
        """Whether a model of this configuration has it."""
        flag = self.only.removeprefix("not ")
        return not flag or getattr(config, flag) != self.only.startswith("not ")

    def shape_in(self, config: MegalodonConfig) -> tuple[int, ...]:
        """The whole tensor's shape."""
        return self.shape_of(
            D=config.hidden_size,
            Z=config.z_dim,
            E=config.value_dim,
            F=config.ffn_hidden_size,
            N=config.cema_ndim,
            V=config.vocab_size,
        )

    def shape_of(self, **widths: int) -> tuple[int, ...]:
        """The shape for these widths by letter."""
        return tuple(widths[z] if z in widths else int(z) for z in self.shape.split())

    @property
    def by_heads(self) -> bool:
        """Whether tensor parallelism cuts it by heads, so that ranks may share a part."""
        return self.tp is not None and self.shape.split()[self.tp] == "Z"


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
        "mixer.linear_proj.weight", "wh1.weight", "mega.wh1.weight", "D D", tp=1, part=Part(1, 0)
    ),
    _linear("mixer.linear_proj.bias", "wh1.bias", "mega.wh1.bias", "D", tp=None),
    _linear(
        "mixer.linear_proj.weight", "wh2.weight", "mega.wh2.weight", "D E",
        split=1, tp=1, part=Part(1, 1),
    ),
    _norm("feed_forward.norm.weight", "ffn_norm.weight", "nffn.norm.weight", split=None),
    _norm("feed_forward.norm.bias", "ffn_norm.bias", "nffn.norm.bias", split=None),
    _linear(
        "feed_forward.linear_fc1.weight", "ffn.w1.weight", "nffn.fc1.weight", "F D",
        part=Part(0, 0),
    ),
    _linear(
        "feed_forward.linear_fc1.weight", "ffn.w3.weight", "nffn.fc3.weight", "F D",
        part=Part(0, 1), only="swiglu",
    ),
    _linear(
        "feed_forward.linear_fc2.weight", "ffn.w2.weight", "nffn.fc2.weight", "D F", split=1, tp=1
    ),
    Row(
        "feed_forward.rescale.weight", "ffn.rescale.weight", "nffn.alpha", "D", "rescale",
        split=None, float32=True, gradient="positions", only="rescale_nffn",
    ),
)  # fmt: skip
"""The parameters of each layer."""

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

LINEAR_MODULES = tuple(
    dict.fromkeys(row.mcore.rpartition(".")[0] for row in LAYER_ROWS if not row.float32)
)
"""A layer's linear layers by their names in it."""

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

    def of(rows: tuple[Row, ...], layer: int | None) -> Iterator[Parameter]:
        for row in rows:
            if row.exists_in(config):
                yield Parameter(row, layer, row.shape_in(config))

    yield from of(MODEL_ROWS[:1], None)
    for layer in range(config.num_layers):
        yield from of(LAYER_ROWS, layer)
    yield from of(MODEL_ROWS[1:], None)


def number_of_values(config: MegalodonConfig) -> int:
    """All parameters' elements."""
    return sum(math.prod(parameter.shape) for parameter in parameters(config))


def checkpoint_suffix(row: Row) -> str:
    """Of a name in a checkpoint, which keeps columns that lie side by side apart."""
    return f"_h{row.part.index + 1}" if row.part and row.part.axis == 1 else ""


def rows_by_parameter(prefix: str, config: MegalodonConfig) -> dict[str, list[Row]]:
    """The rows of each parameter of a module, by its name there.

    Args:
        prefix: what the module's names have before them in the table, such as `mixer.`.
        config: of the model that it is in.
    """
    found: dict[str, list[Row]] = {}
    for row in (*LAYER_ROWS, *MODEL_ROWS):
        if row.mcore.startswith(prefix) and row.exists_in(config):
            found.setdefault(row.mcore.removeprefix(prefix), []).append(row)
    return found
