"""What layers beside Megalodon blocks compute: attention, an MLP and experts.

D is hidden_size, H the attention heads, G their groups of keys and values, W a head's width. A
model's `layer_symbols` has `*` for attention over the whole document, `-` for an MLP, `E` for
experts, and `X` for a block whose FFN is made of experts.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cache_megalodon import in_place

if TYPE_CHECKING:
    from .configuration_megalodon import MegalodonConfig


def at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def never_narrow(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What moves or casts a module's tensors, but for types narrower than float32."""

    def keep_wide(tensor: Tensor) -> Tensor:
        probe = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
        if probe.dtype in (torch.bfloat16, torch.float16):
            return tensor.to(probe.device, torch.float32)
        return fn(tensor)

    return keep_wide


class Place(NamedTuple):
    """Where a piece of steps lies in whole documents; the same for every attention layer."""

    slots: Tensor  # int64 [batch or 1, length]: the steps' positions, and their places in a cache
    cos: Tensor  # [batch or 1, length, 1, half of what is rotated]
    sin: Tensor
    # Of a cache: bool [batch or 1, 1, length, room], which keys a step sees; None where nothing
    # came before, so that steps see those of the piece up to themselves.
    mask: Tensor | None
    samples: list[list[int]] | None  # of each row, where its samples start, and its length


def make_place(
    config: MegalodonConfig,
    seen: Tensor,
    like: Tensor,
    room: int | None,
    starts: list[int] | None,
    samples: list[list[int]] | None,
) -> Place:
    """The place of `like` [batch, length, D].

    Args:
        config: the model's.
        seen: int64 [batch], real steps before the piece.
        like: the input, padding behind a row's real steps.
        room: how many slots of the cache are in use, this piece's among them; None without one.
        starts: what `seen` holds; None where nobody has looked.
        samples: where packed samples start.
    """
    length, device = like.shape[1], like.device
    steps = torch.arange(length, device=device)
    if samples is not None:
        rows = [torch.cat([torch.arange(b - a) for a, b in pairwise(row)]) for row in samples]
        slots = torch.stack(rows).to(device)
    elif starts is not None and len(set(starts)) == 1:
        slots = (starts[0] + steps)[None]
    else:
        slots = seen[:, None] + steps
    width = int((config.head_dim or 0) * config.partial_rotary_factor)
    width = width if config.attention_positions == "rope" else 0
    powers = torch.arange(0, width, 2, device=device, dtype=torch.float64) / max(1, width)
    angle = (slots[..., None] * config.rope_theta**-powers)[:, :, None]
    cos, sin = (z.to(at_least_float32(like).dtype) for z in (angle.cos(), angle.sin()))
    mask = None
    if room is not None and not (starts is not None and max(starts) == 0):
        mask = (torch.arange(room, device=device) <= slots[..., None])[:, None]
    return Place(slots, cos, sin, mask, samples)


def rotate_halves(x: Tensor, place: Place) -> Tensor:
    """Rotates (x[i], x[i + n]) of [batch, steps, heads, W], n half of what is rotated."""
    wide, half = at_least_float32(x), place.cos.shape[-1]
    first, second, rest = wide.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    turned = (
        first * place.cos - second * place.sin,
        second * place.cos + first * place.sin,
        rest,
    )
    return torch.cat(turned, dim=-1).to(x.dtype)


class DocumentAttention(nn.Module):
    """Causal attention over all of a document: what it has to remember grows with that.

    `qkv` has the heads of a group of queries beside that group's key and value.
    """

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__()
        self.heads, self.groups = config.attention_heads, cast(int, config.num_key_value_heads)
        self.width, self.dropout = cast(int, config.head_dim), config.attention_dropout
        columns = (self.heads + 2 * self.groups) * self.width
        self.qkv = nn.Linear(config.hidden_size, columns, bias=config.qkv_bias)
        self.proj = nn.Linear(self.heads * self.width, config.hidden_size, bias=config.linear_bias)

    def new_state(self, rows: Tensor, dtype: torch.dtype, room: int) -> dict[str, Tensor]:
        """Of a batch such as `rows` [batch, ...], which has read nothing: slots of `room` steps."""
        shape = (len(rows), self.groups, room, self.width)
        return {name: rows.new_zeros(shape, dtype=dtype) for name in ("keys", "values")}

    def forward(self, u: Tensor, place: Place, state: dict | None) -> Tensor:
        """[batch, length, D] to the same; the state's keys and values get the piece's."""
        by_group = self.qkv(u).unflatten(-1, (self.groups, -1, self.width))
        q, k, v = by_group[..., :-2, :].flatten(2, 3), by_group[..., -2, :], by_group[..., -1, :]
        q, k = rotate_halves(q, place), rotate_halves(k, place)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        if state is not None:
            self._write(state, place, keys=k, values=v)
        if place.mask is not None:
            room = place.mask.shape[-1]
            k, v = (state[name][:, :, :room].to(q.dtype) for name in ("keys", "values"))
        if place.samples is None:
            out = self._attend(q, k, v, place.mask)
        else:
            rows = [self._row(q, k, v, row, bounds) for row, bounds in enumerate(place.samples)]
            out = torch.cat(rows)
        return self.proj(out.transpose(1, 2).flatten(2))

    def _row(self, q: Tensor, k: Tensor, v: Tensor, row: int, bounds: list[int]) -> Tensor:
        """A row's packed samples one after another, which costs less than a mask of them all."""
        q, k, v = (z[row : row + 1] for z in (q, k, v))
        own = [
            self._attend(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], None)
            for a, b in pairwise(bounds)
        ]
        return torch.cat(own, dim=2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """[batch, H or G, steps, W] to [batch, H, steps, W]."""
        return F.scaled_dot_product_attention(
            *(q, k, v),
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None,
            enable_gqa=self.heads != self.groups,
        )

    def _write(self, state: dict, place: Place, **new: Tensor) -> None:
        """Puts [batch, G, length, W] into their slots.

        What stands behind a row's real steps goes into slots that the next ones write over.
        """
        for name, tensor in new.items():
            held = state[name]
            slots = place.slots[:, None, :, None].expand_as(tensor)
            write = held.scatter_ if in_place(held) else held.scatter
            state[name] = write(2, slots, tensor.to(held.dtype))


class GatedMLP(nn.Module):
    """(silu(u W1 + b1) * (u W3 + b3)) W2 + b2, with or without the biases."""

    def __init__(self, width: int, hidden: int, bias: bool = False) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=bias)
        self.w3 = nn.Linear(width, hidden, bias=bias)
        self.w2 = nn.Linear(hidden, width, bias=bias)

    def forward(self, u: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(u)) * self.w3(u))


class SharedExpert(GatedMLP):
    """An expert for every token, weighted by a sigmoid of its own where it has a gate."""

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__(config.hidden_size, config.shared_expert_intermediate_size)
        gate = nn.Linear(config.hidden_size, 1, bias=False) if config.shared_expert_gate else None
        self.gate = gate

    def forward(self, u: Tensor) -> Tensor:
        output = super().forward(u)
        return output if self.gate is None else output * torch.sigmoid(self.gate(u))


class Experts(nn.Module):
    """The sum of the best experts for each token, by a router's weights.

    No expert is ever full: a token gets the same whatever stands beside it.
    """

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__()
        self.config = config
        width, hidden = config.hidden_size, config.moe_intermediate_size
        count = config.num_experts or 0
        self.router = nn.Linear(width, count, bias=False)
        # Training moves it to balance the experts; no gradient does.
        bias = torch.zeros(count, dtype=torch.float32) if config.router_bias else None
        self.router_bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.w1 = nn.Parameter(torch.empty(count, hidden, width))
        self.w3 = nn.Parameter(torch.empty(count, hidden, width))
        self.w2 = nn.Parameter(torch.empty(count, width, hidden))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Experts:
        bias, self.router_bias = self.router_bias, None
        super()._apply(fn, recurse)
        if bias is not None:
            # It decides between scores that are close.
            self.router_bias = nn.Parameter(never_narrow(fn)(bias.data), requires_grad=False)
        return self

    def forward(self, u: Tensor) -> Tensor:
        """[batch, length, D] to the same."""
        if not u.numel():
            return u
        tokens = u.flatten(0, 1)
        weights, chosen = self.route(tokens)
        experts = zip(self.w1.unbind(), self.w3.unbind(), self.w2.unbind(), strict=True)
        if torch.compiler.is_compiling():
            output = self._all(tokens, weights, chosen, experts)
        else:
            output = self._chosen(tokens, weights, chosen, experts)
        return output.view_as(u)

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Of [tokens, D]: weights and numbers of each one's experts, [tokens, k]."""
        config, k = self.config, self.config.num_experts_per_tok
        with torch.autocast(tokens.device.type, enabled=False):
            logits = F.linear(at_least_float32(tokens), at_least_float32(self.router.weight))
        if config.router_score == "sigmoid":
            scores = logits.sigmoid()
            # The bias has a say in the choice alone.
            ranked = scores if self.router_bias is None else scores + self.router_bias
            chosen = ranked.topk(k, dim=-1).indices
            weights = scores.gather(1, chosen)
            if k > 1:
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        elif config.router_pre_softmax:
            weights, chosen = logits.softmax(-1).topk(k, dim=-1)
        else:
            best, chosen = logits.topk(k, dim=-1)
            weights = best.softmax(-1)
        return weights * config.router_scaling, chosen

    def _chosen(
        self, tokens: Tensor, weights: Tensor, chosen: Tensor, experts: zip[tuple[Tensor, ...]]
    ) -> Tensor:
        """Each expert's tokens together."""
        k = chosen.shape[1]
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=self.config.num_experts).tolist()
        parts = tokens[order // k].split(counts)
        outputs = [_expert(u, *w) for u, w in zip(parts, experts, strict=True) if len(u)]
        by_token = torch.cat(outputs)[order.argsort()].unflatten(0, (-1, k))
        return (by_token * weights[..., None].to(by_token.dtype)).sum(1)

    def _all(
        self, tokens: Tensor, weights: Tensor, chosen: Tensor, experts: zip[tuple[Tensor, ...]]
    ) -> Tensor:
        """Every expert on every token, for a graph that has to fit any choice."""
        output = torch.zeros_like(tokens)
        for number, own in enumerate(experts):
            share = (weights * (chosen == number)).sum(-1, keepdim=True)
            output = output + share.to(tokens.dtype) * _expert(tokens, *own)
        return output


def _expert(u: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(u, w1)) * F.linear(u, w3), w2)


def experts_of(config: MegalodonConfig) -> tuple[Experts, SharedExpert | None]:
    """A layer's experts, and the one for every token where there is one."""
    shared = config.shared_expert_intermediate_size
    return Experts(config), SharedExpert(config) if shared else None


def mixture(layer: nn.Module, u: Tensor) -> Tensor:
    """A layer's experts of [batch, length, D], shared or not."""
    output = layer.experts(u)
    return output if layer.shared_expert is None else output + layer.shared_expert(u)


def projections(module: nn.Module) -> list[tuple[Tensor, int, int]]:
    """A module's own projections, with their widths in and out."""
    if isinstance(module, Experts):
        return [(w, w.shape[2], w.shape[1]) for w in (module.w1, module.w3, module.w2)]
    if isinstance(module, nn.Linear):
        return [(module.weight, module.in_features, module.out_features)]
    return []
