"""What a Megalodon remembers of the sequences it has read."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, PreTrainedModel

if TYPE_CHECKING:
    from .configuration_megalodon import MegalodonConfig

RECORDED_STEPS = 64


class Snapshot(NamedTuple):
    """What a cache remembered before some steps, and their embeddings [batch, steps, D]."""

    states: list[dict]  # without attention layers', whose slots are only written behind
    seen: Tensor
    room: int
    steps: Tensor


class MegalodonCache(Cache):
    """All that a Megalodon remembers of a batch of sequences; of blocks it does not grow with them.

    Every tensor has one shape and, without gradients, one place for good: so a decoding step fits
    a CUDA graph. Slots of a row's chunk that it has not reached hold anything. is_compileable asks
    `generate` to compile its steps where transformers does so, on a GPU.

    Attention layers (`*`) keep the keys and values of all steps: theirs grow, a quarter at a time,
    unless max_length, of a row's steps with its padding, makes room once and for all.

    After activate_past_recording `crop` takes back the last steps, as assisted generation wants.
    """

    is_compileable = False

    def __init__(
        self, config: MegalodonConfig, is_compileable: bool = False, max_length: int | None = None
    ) -> None:
        super().__init__(layers=[])
        self.num_layers, self.is_compileable = config.num_hidden_layers, is_compileable
        self.attention = [n for n, z in enumerate(config.symbols) if z == "*"]
        self.max_length = max_length if self.attention else None
        self.recorded_steps = 0
        if self.attention and is_compileable and max_length is None:
            raise ValueError(
                "is_compileable is set, but the model's attention layers (*) keep all steps; give "
                "the cache a max_length, or leave is_compileable out."
            )
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        # Of each layer: mean and var, float64 [batch, G], cema [batch, D, N, 2], keys and values
        # [batch, H, C, Z/H and E/H], and what CEMA's step takes from the parameters; then the final
        # norm's mean and var.
        self.states: list[dict] = []
        # Of attention layers: keys and values [batch, groups, room, width].
        self.room = self.max_length or 0
        self.seen: Tensor | None = None  # int64 [batch], without padding
        self.columns: Tensor | None = None  # int64 [], with padding
        # Oldest first; and embeddings to be fed again before the next piece, since some behind them
        # were taken back.
        self.snapshots: list[Snapshot] = []
        self.again: Tensor | None = None

    def allocate(self, model: PreTrainedModel, like: Tensor) -> None:
        """Makes room for a batch such as `like` [batch, length, D]."""
        self.seen = like.new_zeros(len(like), dtype=torch.int64)
        self.columns = like.new_zeros((), dtype=torch.int64)
        dtype, device = like.dtype, like.device
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        for layer in (*model.layers, model.norm):
            target = next(layer.parameters()).device
            target = device if target.type == "meta" else target
            rows = like.new_empty(len(like), 0, device=target)
            self.states.append(layer.new_state(rows, dtype, self.max_length or 0))
        if not torch.compiler.is_compiling():
            for tensor in (self.seen, self.columns, *(z for s in self.states for z in s.values())):
                torch._dynamo.mark_static_address(tensor)

    def make_room(self, steps: int) -> None:
        """Gives attention layers slots for a piece of so many steps.

        Raises:
            ValueError: max_length is passed.
        """
        if not self.attention:
            return
        if self.max_length is not None:
            require(
                self.seen.max() + steps <= self.max_length,
                f"The cache was made for {self.max_length} steps and is full; make it with a "
                "larger max_length.",
            )
            return
        # What no row is beyond, without a look at the device.
        self.room += steps
        for layer in self.attention:
            state = self.states[layer]
            held = state["keys"].shape[2]
            if held < self.room:
                more = max(self.room - held, held // 4)
                for name in ("keys", "values"):
                    state[name] = F.pad(state[name], (0, 0, 0, more))

    def __len__(self) -> int:
        return self.num_layers

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many steps were fed, padding included."""
        return 0 if self.columns is None else int(self.columns)

    def restart_count(self) -> None:
        """Counts steps from here, for a `generate` that is given only what follows."""
        if self.columns is not None:
            self.columns.zero_()

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """How many steps fit; -1 where there is no bound."""
        return -1 if self.max_length is None else self.max_length

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows, in this order."""
        if self.seen is None:
            return
        self.seen = self.seen[indices.to(self.seen.device)]
        self.snapshots = []
        if self.again is not None:
            self.again = self.again[indices.to(self.again.device)]
        for state in self.states:
            for name in ROWS & state.keys():
                rows = state[name].index_select(0, indices.to(state[name].device))
                set_state(state, name, rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follows beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        if self.seen is not None:
            rows = torch.arange(len(self.seen), device=self.seen.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def activate_past_recording(self, steps: int = RECORDED_STEPS) -> None:
        """From here on `crop` can take back the last `steps` steps, and as many again once these
        are fed anew.

        The blocks' states are kept up to four times. Recorded rows take no padding.
        """
        self.recorded_steps = max(self.recorded_steps, steps)

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` takes steps back."""
        return self.recorded_steps > 0

    def record(self, steps: Tensor) -> None:
        """Notes what is remembered before a piece of embeddings [batch, length, D]."""
        steps = steps.detach()
        last = self.snapshots[-1].steps if self.snapshots else None
        if last is not None and last.shape[1] + steps.shape[1] <= self.recorded_steps // 2:
            # Feeding a few steps again costs less than another copy.
            joined = torch.cat([last, steps], dim=1)
            self.snapshots[-1] = self.snapshots[-1]._replace(steps=joined)
        else:
            states: list[dict] = [
                {}
                if layer in self.attention
                else {name: state[name].clone() for name in ROWS & state.keys()}
                for layer, state in enumerate(self.states)
            ]
            self.snapshots.append(Snapshot(states, self.seen.clone(), self.room, steps))
        while sum(each.steps.shape[1] for each in self.snapshots[1:]) >= self.recorded_steps:
            del self.snapshots[0]

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last -tokens_to_remove steps back; of a positive number, all but so many.

        Raises:
            ValueError: the cache has not recorded as many.
        """
        count = -tokens_to_remove
        if tokens_to_remove > 0:
            count = max(0, self.get_seq_length() - tokens_to_remove)
        held = sum(each.steps.shape[1] for each in self.snapshots)
        held += 0 if self.again is None else self.again.shape[1]
        if count > held:
            raise ValueError(
                f"{count} steps are to be taken back, of which the cache has recorded {held}; call "
                f"activate_past_recording({count}) before they are fed."
            )
        if count:
            self.columns.sub_(count)
        while count:
            if self.again is None:
                self.again = self._return_to(self.snapshots.pop())
            taken = min(count, self.again.shape[1])
            self.again = self.again[:, : self.again.shape[1] - taken]
            if not self.again.shape[1]:
                self.again = None
            count -= taken

    def _return_to(self, snapshot: Snapshot) -> Tensor:
        """Remembers what it did then; returns the steps since."""
        for state, before in zip(self.states, snapshot.states, strict=True):
            for name, value in before.items():
                set_state(state, name, value)
        self.seen, self.room = snapshot.seen.clone(), snapshot.room
        return snapshot.steps


# What a cache's state has for every row.
ROWS = {"mean", "var", "cema", "keys", "values"}


def in_place(tensor: Tensor) -> bool:
    """Whether a tensor of a cache may be written to, since no gradients go through it."""
    return not torch.is_grad_enabled() and not tensor.requires_grad


def set_state(state: dict, name: str, value: Tensor) -> None:
    """Puts a tensor in a state, in its place unless gradients go through either."""
    if state[name].shape == value.shape and in_place(state[name]):
        state[name].copy_(value)
    else:
        state[name] = value.to(state[name].dtype)


def set_rows(state: dict, name: str, rows: Tensor, value: Tensor) -> None:
    """Puts rows in a tensor of a state."""
    set_state(state, name, state[name].index_copy(0, rows, value.to(state[name].dtype)))


def require(condition: Tensor, sentence: str) -> None:
    """Raises a ValueError with the sentence, in a compiled graph a RuntimeError, if it is false."""
    if torch.compiler.is_compiling():
        torch._assert_async(condition, sentence)
    elif not condition:
        raise ValueError(sentence)
