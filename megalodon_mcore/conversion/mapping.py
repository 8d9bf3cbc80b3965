"""The one table of a model's tensors and of their names and places in every format.

A parameter here is the smallest tensor that any format has: where a format joins several (Megatron
has Wh1 and Wh2, and W1 and W3, in one weight each), it holds a range of the joined one. All formats
but megalodon-hf's store norm weights as offsets from one, linear weights as [out, in], and CEMA's
parameters in the shapes of the released code, so values never change.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from megalodon_mcore.conversion.architecture import Architecture


class Part(NamedTuple):
    """A range of a joined tensor: the index-th of the ranges along the axis."""

    axis: int
    index: int


class Row(NamedTuple):
    """One line of the table; names without their `decoder.layers.N.` and the like in front."""

    mcore: str
    hf: str
    released: str
    shape: str
    """Widths by letter: D hidden, Z, E value, F ffn, N cema_ndim, V vocabulary, or a number."""
    split: int | None
    """The axis that the released code's model parallelism cuts; None where ranks have copies."""
    float32: bool = False
    """Whether it stays float32 in a bf16 checkpoint."""
    part: Part | None = None
    """Its place in Megatron's parameter, where that holds more."""
    tp: int | None = None
    """The axis that Megatron's tensor parallelism cuts; None where ranks have copies. The Z rows of
    an axis are cut by heads, which several ranks may share."""
    only: str = ""
    """The Architecture's flag that it exists with; "not tied" for its opposite."""

    def exists_in(self, architecture: Architecture) -> bool:
        """Whether a model of this architecture has it."""
        flag = self.only.removeprefix("not ")
        return not flag or getattr(architecture, flag) != self.only.startswith("not ")


LAYER_ROWS = (
    Row("mixer.timestep_norm.weight", "timestep_norm.weight", "mega.timenorm.weight", "D", 0, True),
    Row("mixer.timestep_norm.bias", "timestep_norm.bias", "mega.timenorm.bias", "D", 0, True),
    Row("mixer.cema.alpha", "cema.alpha", "mega.cema.alpha", "D N 1", 0, True, tp=0),
    Row("mixer.cema.delta", "cema.delta", "mega.cema.delta", "D N 1", 0, True, tp=0),
    Row("mixer.cema.theta", "cema.theta", "mega.cema.theta", "D 1 1", 0, True, tp=0),
    Row("mixer.cema.gamma", "cema.gamma", "mega.cema.gamma", "D N 2", 0, True, tp=0),
    Row("mixer.cema.omega", "cema.omega", "mega.cema.omega", "D 1", 0, True, tp=0),
    Row("mixer.cema_norm.weight", "cema_norm.weight", "mega.rmsnorm.weight", "D", None, True),
    Row("mixer.linear_z.weight", "wz.weight", "mega.wz.weight", "Z D", 0, tp=0),
    Row("mixer.linear_z.bias", "wz.bias", "mega.wz.bias", "Z", 0, tp=0),
    Row("mixer.query_key.weight", "query_key.weight", "mega.gamma", "2 Z", 1, True, tp=1),
    Row("mixer.query_key.bias", "query_key.bias", "mega.beta", "2 Z", 1, True, tp=1),
    Row("mixer.linear_v.weight", "wv.weight", "mega.wv.weight", "E D", 0, tp=0),
    Row("mixer.linear_v.bias", "wv.bias", "mega.wv.bias", "E", 0, tp=0),
    Row("mixer.linear_r.weight", "wr.weight", "mega.wr.weight", "E D", 0, tp=0),
    Row("mixer.linear_r.bias", "wr.bias", "mega.wr.bias", "E", 0, tp=0),
    Row(
        "mixer.linear_proj.weight", "wh1.weight", "mega.wh1.weight", "D D", 0,
        part=Part(1, 0), tp=1,
    ),
    Row("mixer.linear_proj.bias", "wh1.bias", "mega.wh1.bias", "D", 0),
    Row(
        "mixer.linear_proj.weight", "wh2.weight", "mega.wh2.weight", "D E", 1,
        part=Part(1, 1), tp=1,
    ),
    Row("feed_forward.norm.weight", "ffn_norm.weight", "nffn.norm.weight", "D", None, True),
    Row("feed_forward.norm.bias", "ffn_norm.bias", "nffn.norm.bias", "D", None, True),
    Row(
        "feed_forward.linear_fc1.weight", "ffn.w1.weight", "nffn.fc1.weight", "F D", 0,
        part=Part(0, 0), tp=0,
    ),
    Row(
        "feed_forward.linear_fc1.weight", "ffn.w3.weight", "nffn.fc3.weight", "F D", 0,
        part=Part(0, 1), only="swiglu", tp=0,
    ),
    Row("feed_forward.linear_fc2.weight", "ffn.w2.weight", "nffn.fc2.weight", "D F", 1, tp=1),
    Row(
        "feed_forward.rescale.weight", "ffn.rescale.weight", "nffn.alpha", "D", None, True,
        only="rescale_nffn",
    ),
)  # fmt: skip
"""What each layer has."""

MODEL_ROWS = (
    Row(
        "embedding.word_embeddings.weight", "model.embed_tokens.weight", "embed.weight", "V D", 1,
        tp=0,
    ),
    Row(
        "decoder.final_layernorm.weight", "model.norm.weight", "output.final_norm.weight",
        "D", 0, True,
    ),
    Row(
        "decoder.final_layernorm.bias", "model.norm.bias", "output.final_norm.bias", "D", 0, True
    ),
    Row(
        "output_layer.weight", "lm_head.weight", "output.output.weight", "V D", 1,
        only="not tied", tp=0,
    ),
)  # fmt: skip
"""What a model has once. The released format has its output weight even where it is tied."""

LAYER_PREFIXES = {"mcore": "decoder.layers.", "hf": "model.layers.", "released": "layers."}


class Parameter(NamedTuple):
    """A parameter of one model; `layer` is None outside the layers."""

    row: Row
    layer: int | None
    shape: tuple[int, ...]

    @property
    def mcore(self) -> str:
        """The name in a model's state_dict; joined weights have several parameters."""
        return self._name("mcore", self.row.mcore)

    @property
    def hf(self) -> str:
        """The name in the Hugging Face model; each parameter has one, so it identifies it."""
        return self._name("hf", self.row.hf)

    @property
    def released(self) -> str:
        """The name in the released code's checkpoints."""
        return self._name("released", self.row.released)

    @property
    def float32(self) -> bool:
        """Whether it stays float32 in a bf16 checkpoint."""
        return self.row.float32

    def _name(self, kind: str, own: str) -> str:
        return own if self.layer is None else f"{LAYER_PREFIXES[kind]}{self.layer}.{own}"


def widths_of(architecture: Architecture) -> dict[str, int]:
    """What the letters of a row's shape stand for."""
    return {
        "D": architecture.hidden_size,
        "Z": architecture.z_dim,
        "E": architecture.value_dim,
        "F": architecture.ffn_hidden_size,
        "N": architecture.cema_ndim,
        "V": architecture.vocab_size,
    }


def parameters(architecture: Architecture) -> Iterator[Parameter]:
    """All of a model's parameters, from the embedding to the output."""
    widths = widths_of(architecture)

    def of(rows: tuple[Row, ...], layer: int | None) -> Iterator[Parameter]:
        for row in rows:
            if row.exists_in(architecture):
                letters = row.shape.split()
                shape = tuple(widths[z] if z in widths else int(z) for z in letters)
                yield Parameter(row, layer, shape)

    yield from of(MODEL_ROWS[:1], None)
    for layer in range(architecture.num_layers):
        yield from of(LAYER_ROWS, layer)
    yield from of(MODEL_ROWS[1:], None)


def number_of_values(architecture: Architecture) -> int:
    """All parameters' elements, counted from the table."""
    total = 0
    for parameter in parameters(architecture):
        values = 1
        for width in parameter.shape:
            values *= width
        total += values
    return total
