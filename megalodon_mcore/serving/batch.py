"""Which tokens of a step belong to which request, and where requests have their states."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from megalodon_mcore.hf.block_megalodon import Span, make_span
from megalodon_mcore.kernels.segments import Segment, Segments, numbered

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.kv_cache_interface import MambaSpec

    from megalodon_mcore.hf import MegalodonConfig


class Decoding:
    """Requests of one token each, computed as the Hugging Face model's cache is.

    All that differs from step to step is in `blocks` and `ends`, which vLLM writes in place, and
    what follows from them is computed in the model: so a CUDA graph holds a step.
    """

    def __init__(
        self, config: MegalodonConfig, blocks: Tensor, ends: Tensor, room: int, dtype: torch.dtype
    ) -> None:
        """Takes what is known before the model runs.

        Args:
            config: the model's.
            blocks: where each request has its states, integers [R]; 0 for a row of nobody.
            ends: tokens of each, this one among them, integers [R]; 0 for a row of nobody.
            room: slots of a chunk that some of them have filled with this token, or more.
            dtype: the model's.
        """
        self.config, self.blocks, self.ends = config, blocks, ends
        self.room, self.dtype = room, dtype

    @cached_property
    def pages(self) -> Tensor:
        """As blocks, int64."""
        return self.blocks.long()

    @cached_property
    def span(self) -> Span:
        """Where the tokens lie in their requests."""
        seen = (self.ends.long() - 1).clamp_min(0)
        like = self.blocks.new_empty(len(seen), 1, self.config.hidden_size, dtype=self.dtype)
        return make_span(self.config, seen, None, like, True, None)

    def read(self, state: Tensor) -> Tensor:
        """The requests' rows of pages [pages, ...], zero where a page holds another's."""
        rows = state[self.pages]
        return rows.masked_fill_((self.span.seen == 0).view(-1, *[1] * (rows.dim() - 1)), 0)


class Pieces(NamedTuple):
    """Requests' pieces of several tokens, one after another in one row."""

    segments: Segments
    pages: Tensor
    """Where each has its states, int64 [S]."""
    before: tuple[Tensor, Tensor]
    """Pages and slots of the chunks that segments start inside of, in their order: int64 [M]."""
    after: tuple[Tensor, Tensor]
    """Pages and slots that the steps of chunks go to which segments end inside of: int64 [K]."""
    steps: Tensor
    """Those steps, int64 [K]."""

    @classmethod
    def of(cls, segments: Segments, pages: Tensor, chunk_size: int) -> Pieces:
        """The pieces that are these segments."""
        _, start, length, position = segments.table().unbind(1)
        number, end = torch.arange(len(segments))[:, None], position + length
        held = numbered(number, 0, position % chunk_size)
        # A step's number less its slot is the same for all of a chunk.
        fill = end % chunk_size
        rows = torch.cat([number, (start + length - fill)[:, None]], 1)
        kept = numbered(rows, fill - fill.minimum(length), fill)
        held, kept = (z.to(pages.device, non_blocking=True) for z in (held, kept))
        before, after = (pages[held[:, 0]], held[:, 1]), (pages[kept[:, 0]], kept[:, 2])
        return cls(segments, pages, before, after, kept[:, 1] + kept[:, 2])


class Batch(NamedTuple):
    """A step's requests, those that decode before the others: made once, read by every layer."""

    decoding: Decoding | None
    pieces: Pieces | None

    @classmethod
    def of_nobody(cls, config: MegalodonConfig, x: Tensor) -> Batch:
        """Of steps x [length, D] that vLLM tries a model with, in the page that no request has."""
        page = torch.zeros(1, dtype=torch.int64, device=x.device)
        table = Segments(len(x), 1, [Segment(0, 0, len(x), 0)])
        return cls(None, Pieces.of(table, page, config.chunk_size))

    def apart(
        self,
        step: Callable[..., Tensor],
        piece: Callable[..., Tensor],
        *tensors: Tensor,
    ) -> Tensor:
        """step(decoding, ...) of the first steps of tensors [steps, ...], and piece of the rest."""
        if self.pieces is None:
            return step(self.decoding, *tensors)
        if self.decoding is None:
            return piece(self.pieces, *tensors)
        n = len(self.decoding.blocks)
        first = step(self.decoding, *(z[:n] for z in tensors))
        return torch.cat([first, piece(self.pieces, *(z[n:] for z in tensors))])


class MegalodonBackend(AttentionBackend):
    """Names the builder of batches to vLLM."""

    @staticmethod
    def get_name() -> str:
        """The name in logs."""
        return "MEGALODON"

    @staticmethod
    def get_builder_cls() -> type[BatchBuilder]:
        """What makes a step's Batch."""
        return BatchBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        """Whether it is of states and not of keys alone."""
        return True


class BatchBuilder(AttentionMetadataBuilder[Batch]):
    """Makes a Batch of what vLLM says of a step."""

    # vLLM then puts requests of a single token first.
    reorder_batch_threshold = 1
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self,
        kv_cache_spec: MambaSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.model_config = vllm_config.model_config
        # The kernel looks at no more than is filled; only what a CPU copies gains by a bound.
        self.bounded = device.type == "cpu"

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Batch:
        """The Batch of the step's requests."""
        step, config = common_attn_metadata, self.model_config.hf_config
        blocks, chunk = step.block_table_tensor[: step.num_reqs, 0], config.chunk_size
        decodes = split_decodes_and_prefills(step)[0]
        ends = step.seq_lens_cpu_upper_bound.tolist()
        decoding = pieces = None
        if decodes:
            room = 1 + max((z - 1) % chunk for z in ends[:decodes])
            decoding = Decoding(
                config,
                blocks[:decodes],
                step.seq_lens[:decodes],
                room if self.bounded else chunk,
                self.model_config.dtype,
            )
        if decodes < step.num_reqs:
            starts = step.query_start_loc_cpu.tolist()
            segments = [
                Segment(0, start - decodes, stop - start, end - (stop - start))
                for start, stop, end in zip(starts, starts[1:], ends, strict=False)
            ][decodes:]
            table = Segments(segments[-1].start + segments[-1].length, 1, segments)
            pieces = Pieces.of(table, blocks[decodes:].long(), chunk)
        return Batch(decoding, pieces)
