"""Megalodon (arXiv 2404.08801) for Hugging Face transformers; needs torch and transformers alone.

Embedding, layers, a final TimestepNorm, and a projection to logits. A layer is a Megalodon block
(block_megalodon.py); with `layer_symbols` some are others: `*`, `-` and `E` compute x + attention,
MLP or experts of norm(x), and `X` is a block with experts for its FFN (layers_megalodon.py).
Attention layers remember keys and values of the whole sequence, and so grow with it.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.generation import GenerationMode
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .block_megalodon import (
    ComplexEMA,
    Float32Module,
    LayerNorm,
    MegalodonDecoderLayer,
    Rescale,
    RMSNorm,
    Span,
    TimestepNorm,
    make_span,
    runs_samples_apart,
)
from .cache_megalodon import MegalodonCache, require
from .configuration_megalodon import MegalodonConfig
from .layers_megalodon import (
    DocumentAttention,
    Experts,
    GatedMLP,
    experts_of,
    make_place,
    mixture,
    projections,
)
from .packing_megalodon import PACKING, packed_samples


class MegalodonPlainLayer(GradientCheckpointingLayer):
    """x + f(norm(x)), f attention over the document (`*`), an MLP (`-`) or experts (`E`)."""

    def __init__(self, config: MegalodonConfig, symbol: str) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.norm = (RMSNorm if config.normalization == "RMSNorm" else LayerNorm)(config)
        self.attention = DocumentAttention(config) if symbol == "*" else None
        sizes = (config.hidden_size, config.intermediate_size, config.linear_bias)
        self.ffn = GatedMLP(*sizes) if symbol == "-" else None
        self.experts, self.shared_expert = experts_of(config) if symbol == "E" else (None, None)

    def new_state(self, rows: Tensor, dtype: torch.dtype, room: int) -> dict[str, Tensor]:
        """Of a batch such as `rows` [batch, ...]: attention's keys and values, for `room` steps."""
        return {} if self.attention is None else self.attention.new_state(rows, dtype, room)

    def forward(self, x: Tensor, span: Span, state: dict | None = None) -> Tensor:
        """[batch, length, D] to the same; updates the state."""
        u = self.norm(x)
        if self.attention is not None:
            update = self.attention(u, span.place, state)
        else:
            update = mixture(self, u) if self.ffn is None else self.ffn(u)
        return x + F.dropout(update, self.dropout, self.training)


def layer_of(config: MegalodonConfig, index: int) -> MegalodonDecoderLayer | MegalodonPlainLayer:
    """A model's layer, by its symbol."""
    symbol = config.symbols[index]
    if symbol in "MX":
        return MegalodonDecoderLayer(config, index, symbol == "X")
    return MegalodonPlainLayer(config, symbol)


class MegalodonPreTrainedModel(PreTrainedModel):
    config_class = MegalodonConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MegalodonDecoderLayer", "MegalodonPlainLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["cema", "norm", "query_key", "rescale", "router_bias"]
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The released initializers."""
        if isinstance(module, nn.Embedding) or module is self.get_output_embeddings():
            std = 1 / math.sqrt(self.config.hidden_size)
            init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)
        elif isinstance(module, nn.Linear | Experts):
            for weight, *fans in projections(module):
                self._init_projection(weight, *fans)
            bias = module.router_bias if isinstance(module, Experts) else module.bias
            if bias is not None:
                init.zeros_(bias)
        elif isinstance(module, Rescale):
            init.constant_(module.weight, module.start)
        elif isinstance(module, ComplexEMA):
            init.normal_(module.alpha, std=0.2)
            init.normal_(module.delta, std=0.2)
            channels = len(module.theta)
            steps = torch.randperm(channels) + 1
            frequency = torch.exp(-math.log(channels) / channels * steps.double())
            # The clamp is for a single channel, whose frequency 1 has an infinite logit.
            init.copy_(module.theta, torch.logit(frequency, eps=1e-7).view(-1, 1, 1))
            init.copy_(module.gamma, F.pad(torch.randn(*module.gamma.shape[:2], 1), (0, 1)))
            init.trunc_normal_(module.omega, std=0.25, a=-1.0, b=1.0)
        elif isinstance(module, Float32Module):
            for parameter in module.parameters():
                init.zeros_(parameter)

    def _init_projection(self, weight: Tensor, fan_in: int, fan_out: int) -> None:
        mode = self.config.megalodon_init_mode
        if mode == "xavier":
            bound = math.sqrt(6 / (fan_in + fan_out))
            init.uniform_(weight, a=-bound, b=bound)
        elif mode == "gaussian":
            init.trunc_normal_(weight, std=1.0, a=-3.0, b=3.0)
        else:
            init.normal_(weight, std=0.02 if mode == "bert" else 1 / math.sqrt(3 * fan_in))


class MegalodonModel(MegalodonPreTrainedModel):
    """Embedding, layers and final TimestepNorm."""

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            layer_of(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = TimestepNorm(config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: MegalodonCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        positions_to_keep: int | Tensor = 0,
        position_ids: Tensor | None = None,
        **others: object,
    ) -> BaseModelOutputWithPast:
        """Runs or continues sequences.

        Args:
            input_ids: int64 [batch, length]; or
            inputs_embeds: [batch, length, D], before scale_embedding.
            attention_mask: [batch, length], or longer with what the cache has seen in front. Zeros
                mark padding, wherever it is; a row gets what it would get without it, and zeros
                at the padding.
            past_key_values: the cache that an earlier call returned.
            use_cache: whether to return one; config.use_cache, and False in training, if left out.
            output_hidden_states: return the embedding and each block's output too, the last one
                after the final norm; the input is then not cut into pieces.
            positions_to_keep: return the hidden states of the last so many columns (0: of all), or
                of the columns with these numbers.
            position_ids: follow from the rest; where they start again at 0 in a row, so does a
                sample, which gets what it would get alone. Packed rows take no padding and no
                cache.
            **others: cu_seq_lens_q or seq_idx, which say the same; the rest is ignored.
        """
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if inputs is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("Give input_ids or inputs_embeds, one of the two.")
        batch, length = inputs.shape[:2]
        if length == 0:
            raise ValueError("input_ids is empty; give at least one token.")
        given_use_cache = use_cache
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        cache = past_key_values
        if cache is None and use_cache:
            cache = MegalodonCache(self.config)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        self._check_cache(cache, batch)
        decoding = cache is not None and length == 1
        real = self._real_steps(attention_mask, batch, length, decoding)
        samples = None if decoding else packed_samples(position_ids, real, inputs, others)
        if samples is not None:
            if past_key_values is not None or given_use_cache:
                raise ValueError(
                    "samples are packed into a row, which no cache can go on with; leave out "
                    "use_cache and past_key_values."
                )
            cache = None
        behind = 0
        if cache is not None and cache.recorded_steps:
            inputs, behind = self._after_what_is_fed_again(inputs, real, cache)
            length, decoding, real = inputs.shape[1], inputs.shape[1] == 1, None

        # Real steps go to the front of their rows; `step` says where each column's went.
        compiling = torch.compiler.is_compiling()
        lengths, longest = None, length
        step = torch.arange(length, device=inputs.device).expand(batch, -1)
        if real is not None:
            lengths = real.sum(1)
            step = torch.where(real, real.cumsum(1) - 1, -1)
        if real is not None and not decoding:
            order = real.long().argsort(dim=1, descending=True, stable=True)
            inputs = inputs[torch.arange(batch, device=inputs.device)[:, None], order]
            longest = length if compiling else max(1, int(lengths.max()))

        # Where the rows are; nothing asks while decoding.
        starts, anchor = [0] * batch, 0
        if cache is not None and cache.states:
            starts = None if decoding or compiling else cache.seen.tolist()
            anchor = starts[0] if starts else 0
        bounds = [0, longest]
        cuts = cache is not None and not torch.is_grad_enabled() and not output_hidden_states
        if cuts and not compiling:
            piece = self.config.piece_length
            bounds = [0, *range(piece - anchor % piece, longest, piece), longest]
            recorded = cache.recorded_steps
            if 0 < recorded < longest:
                bounds = sorted({*bounds, longest - recorded})
        columns: slice | Tensor = slice(behind, None)
        if isinstance(positions_to_keep, Tensor):
            columns = positions_to_keep + behind
        elif positions_to_keep:
            columns = slice(-positions_to_keep, None)
        kept_step, output = step[:, columns], None
        hidden_states = [] if output_hidden_states else None
        for first, stop in pairwise(bounds):
            own = None if lengths is None else (lengths - first).clamp(0, stop - first)
            if cache is not None and cache.recorded_steps:
                cache.record(inputs[:, first:stop])
            x = self._run(inputs[:, first:stop], own, cache, starts, samples, hidden_states)
            if starts is not None:
                steps = [stop - first] * batch if own is None else own.tolist()
                starts = [start + more for start, more in zip(starts, steps, strict=True)]
            if real is None and len(bounds) == 2:
                output = x[:, columns]
            else:
                output = put_back(x, kept_step - first, output)
        if output_hidden_states:
            hidden_states = tuple(put_back(x, step[:, behind:]) for x in hidden_states)
        if cache is not None:
            cache.columns.add_(length - behind)
        return BaseModelOutputWithPast(
            last_hidden_state=output, past_key_values=cache, hidden_states=hidden_states
        )

    def _after_what_is_fed_again(
        self, inputs: Tensor, real: Tensor | None, cache: MegalodonCache
    ) -> tuple[Tensor, int]:
        """A piece's embeddings behind those that the cache has to be fed again; how many these are.

        Raises:
            ValueError: the piece has padding.
        """
        if real is not None and not real.all():
            raise ValueError(
                "attention_mask has zeros, but the cache records steps so that they can be taken "
                "back; give rows without padding, or a cache that records none."
            )
        x = self.embed_tokens(inputs) if inputs.dim() == 2 else inputs
        if not cache.states:
            cache.allocate(self, x)
        again, cache.again = cache.again, None
        if again is None:
            return x, 0
        return torch.cat([again.to(x), x], dim=1), again.shape[1]

    def _run(
        self,
        inputs: Tensor,
        lengths: Tensor | None,
        cache: MegalodonCache | None,
        starts: list[int] | None,
        samples: list[list[int]] | None,
        hidden_states: list[Tensor] | None,
    ) -> Tensor:
        """One piece, real steps first; updates the cache and appends to hidden_states.

        Of lengths, those of the rows, there are none where nothing is padded; starts are how many
        steps came before, where that is known; samples is what packed_samples returns.
        """
        if samples is not None and runs_samples_apart():
            return self._run_apart(inputs, samples, hidden_states)
        x = self.embed_tokens(inputs) if inputs.dim() == 2 else inputs
        if self.config.scale_embedding:
            x = x * math.sqrt(self.config.hidden_size)
        if lengths is not None:
            padding = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
            x = x.masked_fill(padding[..., None], 0)
        x = F.dropout(x, self.config.dropout, self.training)

        if cache is not None and not cache.states:
            cache.allocate(self, x)
        seen = x.new_zeros(len(x), dtype=torch.int64) if cache is None else cache.seen
        span = make_span(self.config, seen, lengths, x, cache is not None, starts, samples)
        if "*" in self.config.symbols:
            room = None
            if cache is not None:
                cache.make_room(x.shape[1])
                room = cache.room
            place = make_place(self.config, seen, x, room, starts, samples)
            span = span._replace(place=place)
        states = [None] * (len(self.layers) + 1) if cache is None else cache.states
        for layer, state in zip((*self.layers, self.norm), states, strict=True):
            if hidden_states is not None and layer is not self.norm:
                hidden_states.append(x)
            x = layer(x, span, state)
        if hidden_states is not None:
            hidden_states.append(x)
        if cache is not None:
            # What gradients saved of it is not written over.
            grows = cache.seen.add if torch.is_grad_enabled() else cache.seen.add_
            cache.seen = grows(span.lengths)
        return x

    def _run_apart(
        self, inputs: Tensor, samples: list[list[int]], hidden_states: list[Tensor] | None
    ) -> Tensor:
        """Packed samples one after another."""
        rows, parts = [], []
        for row, bounds in enumerate(samples):
            outputs = []
            for start, stop in pairwise(bounds):
                part = None if hidden_states is None else []
                sample = inputs[row : row + 1, start:stop]
                outputs.append(self._run(sample, None, None, [0], None, part))
                parts.append(part)
            rows.append(torch.cat(outputs, dim=1))
        if hidden_states is not None:
            for pieces in zip(*parts, strict=True):
                joined = torch.cat(pieces, dim=1)
                hidden_states.append(joined.unflatten(1, inputs.shape[:2]).squeeze(0))
        return torch.cat(rows)

    def _check_cache(self, cache: MegalodonCache | None, batch: int) -> None:
        if cache is None:
            return
        if not isinstance(cache, MegalodonCache):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}; Megalodon takes the MegalodonCache "
                "that a call with use_cache=True returns."
            )
        if self.training and self.gradient_checkpointing and torch.is_grad_enabled():
            raise ValueError(
                "Gradient checkpointing runs blocks twice, which a cache does not take; leave out "
                "use_cache and past_key_values."
            )
        if cache.seen is not None and len(cache.seen) != batch:
            raise ValueError(
                f"The input has {batch} rows and past_key_values {len(cache.seen)}; give as "
                "many rows as the cache holds."
            )

    def _real_steps(
        self, attention_mask: Tensor | None, batch: int, length: int, decoding: bool
    ) -> Tensor | None:
        """Marks what is no padding, bool [batch, length]; None if all is (where one may ask)."""
        if attention_mask is None:
            return None
        shape = attention_mask.shape
        if len(shape) != 2 or shape[0] != batch or shape[1] < length:
            raise ValueError(
                f"attention_mask has shape {list(attention_mask.shape)}; it takes zeros and ones "
                f"{[batch, length]}, or more columns for what the cache has seen."
            )
        mask = attention_mask[:, -length:]
        real = mask.bool()
        if decoding:
            return real
        require(
            (mask == real).all(),
            "attention_mask has numbers other than 0 and 1; it takes ones for a row's one sample "
            "and zeros for padding.",
        )
        return None if not torch.compiler.is_compiling() and real.all() else real


def put_back(x: Tensor, step: Tensor, output: Tensor | None = None) -> Tensor:
    """x[b, step[b, c]] for every column c whose step is in x; the rest is output's, or zero."""
    step = step.to(x.device)
    here = (step >= 0) & (step < x.shape[1])
    found = x.take_along_dim(step.clamp(0, x.shape[1] - 1)[..., None], dim=1)
    return torch.where(here[..., None], found, 0 if output is None else output)


class MegalodonForCausalLM(MegalodonPreTrainedModel, GenerationMixin):
    """A Megalodon with its output projection."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__(config)
        self.model = MegalodonModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: MegalodonCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        position_ids: Tensor | None = None,
        **loss_arguments: object,
    ) -> CausalLMOutputWithPast:
        """Logits [batch, length, vocab_size], or of the columns that logits_to_keep asks for.

        Args as for MegalodonModel, and labels int64 [batch, length] for the loss of each next
        token; -100 is left out.
        """
        marks = {name: loss_arguments.pop(name) for name in PACKING if name in loss_arguments}
        if labels is not None and (marks or position_ids is not None):
            labels = self._without_first_of_samples(labels, attention_mask, position_ids, marks)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            positions_to_keep=logits_to_keep,
            position_ids=position_ids,
            return_dict=True,
            **marks,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **loss_arguments)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _without_first_of_samples(
        self,
        labels: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        marks: dict,
    ) -> Tensor:
        """Labels with -100 for samples' first tokens, which nothing before them predicts."""
        real = self.model._real_steps(attention_mask, *labels.shape, False)
        samples = packed_samples(position_ids, real, labels, marks)
        if samples is None:
            return labels
        labels = labels.clone()
        for row, bounds in enumerate(samples):
            labels[row, bounds[:-1]] = -100
        return labels

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict,
        generation_mode: object = None,
        batch_size: int | None = None,
        max_cache_length: int | None = None,
    ) -> None:
        """Makes the cache for `generate`, which calls this: Megalodon has one kind."""
        if generation_config.cache_implementation not in (None, "dynamic", "static"):
            raise ValueError(
                f"cache_implementation is {generation_config.cache_implementation!r}; Megalodon's "
                "cache is of constant size, and 'static' lets transformers compile a step."
            )
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            static = generation_config.cache_implementation == "static"
            length = max_cache_length if static else None
            cache = MegalodonCache(self.config, static, length)
            model_kwargs["past_key_values"] = cache
            assisted = generation_mode == GenerationMode.ASSISTED_GENERATION
            if assisted or generation_config.is_assistant:
                cache.activate_past_recording()

    def prepare_inputs_for_generation(
        self, *args: object, inputs_embeds: Tensor | None = None, **kwargs: object
    ) -> dict:
        """Of the mask, which grows with the sequence, only what goes with the new tokens."""
        inputs = super().prepare_inputs_for_generation(*args, inputs_embeds=inputs_embeds, **kwargs)
        given = inputs.get("input_ids")
        given = inputs["inputs_embeds"] if given is None else given
        if inputs.get("attention_mask") is not None:
            inputs["attention_mask"] = inputs["attention_mask"][:, -given.shape[1] :].contiguous()
        return inputs

    @staticmethod
    def create_masks_for_generate(
        config: MegalodonConfig, inputs_embeds: Tensor, attention_mask: Tensor | None, **_: object
    ) -> Tensor | None:
        """Makes no mask of queries and keys; `generate` asks for it where the cache is static."""
        return attention_mask

    def generate_batch(self, *args: object, **kwargs: object) -> None:
        """Refuses continuous batching.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "generate_batch pages keys and values, but Megalodon has running averages beside them; "
            "call generate with a batch padded on the left."
        )

    init_continuous_batching = continuous_batching_context_manager = generate_batch


__all__ = ["MegalodonCache", "MegalodonForCausalLM", "MegalodonModel", "MegalodonPreTrainedModel"]
