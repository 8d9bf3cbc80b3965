"""The specs that Megatron builds Megalodon from: `--spec megalodon_mcore.spec megalodon`.

Each name below is a MegalodonSpec. `pretrain_gpt.py` calls it with its model configuration;
callers that hand it straight to GPTModel reach it through a hook on GPTModel's constructor, since
Megatron has no other place where a spec learns its configuration and names the final norm.
`pretrain_hybrid.py` takes the same names; HybridModel's constructor has a hook too, since it makes
its embedding before it comes to its stack.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import logging
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from megalodon_mcore import (
    checkpoint_errors,
    hybrid,
    megatron_fixes,
    muon,
    packed_data,
    throughput,
)
from megalodon_mcore.config import ARGUMENT_PREFIX, FIELDS, MegalodonConfig, layers_of, names
from megalodon_mcore.config_sources import settle, values_in_arguments
from megalodon_mcore.global_arguments import megatron_arguments
from megalodon_mcore.layers.apex_norm import ApexLayerNorm, has_apex_norm
from megalodon_mcore.layers.block import FinalTimestepNorm, MegalodonLayer
from megalodon_mcore.layers.emulated_fp8 import EmulatedFp8Backend, with_emulated_fp8
from megalodon_mcore.layers.initialization import embedding_initializer
from megalodon_mcore.layers.submodules import LINEAR_LAYERS, MegalodonLayerSubmodules
from megalodon_mcore.optimizer_check import check_optimizer
from megalodon_mcore.options import check_megatron_arguments
from megalodon_mcore.parallel.documents import Documents
from megalodon_mcore.parallel.model_parallel import ModelParallel
from megalodon_mcore.parallel.sequence_layout import SEQUENCE_ORDERS
from megalodon_mcore.sizes import SIZES
from megalodon_mcore.validation import (
    check_fp8_sizes,
    check_layout,
    check_prediction,
    check_rotation,
    check_supported,
)

logger = logging.getLogger(__name__)


class Parts(NamedTuple):
    """What a model is put together from."""

    layer: ModuleSpec
    """A Megalodon block."""
    final_norm: functools.partial
    """The model's last norm, called as Megatron calls a norm's class."""
    attention: dict[str, Any]
    """The arguments of its own that an AttentionLayer takes."""
    backend: BackendSpecProvider
    """The classes of Megatron's own layers."""

    def parallel(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection
    ) -> ModelParallel:
        """The groups that the layers are spread over, with the documents that they share."""
        order, documents = (self.attention[name] for name in ("sequence_order", "documents"))
        return ModelParallel(pg_collection, config.sequence_parallel, order, documents)


@dataclass
class MegalodonBlockSubmodules(TransformerBlockSubmodules):
    """A pipeline stage's layers, and what comes after the last of them."""

    prediction: MultiTokenPredictionBlockSubmodules | None = None
    """Layers that predict tokens beyond the next one, in the stead of those that Megatron's model
    builder makes of its own layers."""


@dataclass(frozen=True)
class MegalodonSpec:
    """Builds the layers and the final norm for a configuration.

    Args:
        size: gives the defaults.
        settled: the model that a caller has found from all sources of values, in their stead.
        sequence_order: how context parallelism cuts a sequence, one of SEQUENCE_ORDERS; an argument
            --megalodon-sequence-order comes first. Without both it is what Megatron's scripts do.
        emulated_fp8: the recipe by which linear layers emulate FP8, or None; an argument
            --megalodon-emulated-fp8 comes first.
        emulated_fp8_layers: which of them; --megalodon-emulated-fp8-layers comes first.
    """

    size: MegalodonConfig | None = None
    settled: MegalodonConfig | None = None
    sequence_order: str | None = None
    emulated_fp8: str | None = None
    emulated_fp8_layers: tuple[str, ...] = LINEAR_LAYERS

    def __call__(
        self,
        model_config: Any,
        vp_stage: int | None = None,
    ) -> TransformerBlockSubmodules:
        """Builds the layers' spec; GPTModelBuilder calls it with its GPTModelConfig."""
        return self.block_submodules(
            model_config.transformer,
            rotary_base=model_config.rotary_base,
            position_embedding_type=model_config.position_embedding_type,
            vp_stage=vp_stage,
        )

    def block_submodules(
        self,
        config: TransformerConfig,
        rotary_base: float = 10_000,
        position_embedding_type: str = "none",
        vp_stage: int | None = None,
        pp_rank: int | None = None,
    ) -> TransformerBlockSubmodules:
        """The specs of one pipeline stage; sets the embedding's initializers in `config`.

        Raises:
            ValueError: the configuration asks for what Megalodon cannot do, or values do not fit.
        """
        megalodon, sequence_order = self.check(config, position_embedding_type, rotary_base)
        parts = self._parts(config, megalodon, sequence_order)
        return MegalodonBlockSubmodules(
            layer_specs=[parts.layer] * get_num_layers_to_build(config, vp_stage, pp_rank),
            layer_norm=parts.final_norm,
            prediction=hybrid.prediction_of(parts, config),
        )

    def hybrid_parts(
        self,
        config: TransformerConfig,
        pattern: str,
        position_embedding_type: str,
        rotary_base: float,
        rotary_percent: float,
    ) -> Parts:
        """The parts of a HybridModel's stack; sets the embedding's initializers in `config`.

        Raises:
            ValueError: as block_submodules, or the pattern has what Megalodon has no layer for.
        """
        found = self.check(config, position_embedding_type, rotary_base, pattern, rotary_percent)
        return self._parts(config, *found, rotary_percent)

    def _parts(
        self,
        config: TransformerConfig,
        megalodon: MegalodonConfig,
        sequence_order: str,
        rotary_percent: float = 1.0,
    ) -> Parts:
        config.init_method = embedding_initializer(config.hidden_size)
        config.embedding_init_method = config.init_method
        shared = {"sequence_order": sequence_order, "documents": Documents()}
        return Parts(
            ModuleSpec(
                module=MegalodonLayer,
                params={"megalodon": megalodon} | shared,
                submodules=self.layer_submodules(config),
            ),
            functools.partial(FinalTimestepNorm, num_groups=megalodon.norm_num_groups, **shared),
            shared | {"rotary_base": megalodon.rotary_base, "rotary_percent": rotary_percent},
            self.backend(config),
        )

    def check(
        self,
        config: TransformerConfig,
        position_embedding_type: str,
        rotary_base: float = 10_000,
        pattern: str | None = None,
        rotary_percent: float = 1.0,
    ) -> tuple[MegalodonConfig, str]:
        """The model's values and the order of sequences, once all is found to fit together.

        pattern: the layers' symbols where they are HybridModel's.
        rotary_percent: of a head, in its layers of attention.

        Raises:
            ValueError: as block_submodules.
        """
        arguments = megatron_arguments()
        if pattern is not None:
            hybrid.check_pattern(pattern, config.num_moe_experts, config.mtp_num_layers)
        if arguments is not None:
            check_megatron_arguments(arguments, pattern)
        check_supported(config, position_embedding_type, pattern)
        if "*" in (pattern or ""):
            check_rotation(config, position_embedding_type, rotary_percent)
        self.layer_submodules(config)
        megalodon = self.resolve(config, rotary_base, pattern)
        check_optimizer(arguments)
        sequence_order = self._sequence_order(config)
        seq_length = getattr(arguments, "seq_length", None)
        if arguments is not None:
            packed_data.check(arguments, sequence_order)
        check_layout(config, megalodon, sequence_order, seq_length, pattern)
        # Bridge's hybrid providers have 0 where Megatron has None.
        if config.mtp_num_layers != type(config).mtp_num_layers:
            packed = arguments is not None and packed_data.is_packed(arguments)
            tied = not getattr(arguments, "untie_embeddings_and_output_weights", True)
            check_prediction(config, sequence_order, packed, tied)
        if config.fp8:
            micro_batch_size = getattr(arguments, "micro_batch_size", None)
            check_fp8_sizes(config, megalodon, seq_length, micro_batch_size)
        return megalodon, sequence_order

    def _sequence_order(self, config: TransformerConfig) -> str:
        arguments = megatron_arguments()
        order = getattr(arguments, "megalodon_sequence_order", None) or self.sequence_order
        if order is None and arguments is None and config.context_parallel_size > 1:
            raise ValueError(
                f"--context-parallel-size is {config.context_parallel_size}, but nothing says how "
                "the caller cuts its sequences; take MegalodonSpec(sequence_order=...), "
                f"{' or '.join(SEQUENCE_ORDERS)}."
            )
        return order or packed_data.order_of_megatron(arguments)

    def layer_submodules(self, config: TransformerConfig) -> MegalodonLayerSubmodules:
        """The classes that --transformer-impl and --megalodon-emulated-fp8 choose.

        Raises:
            ValueError: Transformer Engine is asked for and does not import, or the emulation's
                values are unknown or do not go with the rest.
        """
        recipe, layers = self._emulation()
        if config.transformer_impl == "transformer_engine":
            if recipe is not None:
                raise ValueError(
                    f"--megalodon-emulated-fp8 is {recipe}, which is for Megatron's own linear "
                    "layers; with --transformer-impl transformer_engine take --fp8-format, or take "
                    "--transformer-impl local."
                )
            # Here, because both import it; Megatron's wrappers look for it once.
            from megatron.core.extensions.transformer_engine import HAVE_TE

            if not HAVE_TE:
                raise ValueError(
                    "--transformer-impl is transformer_engine, Megatron's default, but Transformer "
                    "Engine does not import here; install it or take --transformer-impl local."
                )
            from megalodon_mcore.layers.transformer_engine import transformer_engine_submodules

            submodules = transformer_engine_submodules(config)
        else:
            submodules = MegalodonLayerSubmodules()
            if has_apex_norm(config):
                norm = functools.partial(ApexLayerNorm, config=config)
                submodules = dataclasses.replace(
                    submodules, feed_forward_norm=norm, expert_norm=norm
                )
            if recipe is not None:
                submodules = with_emulated_fp8(submodules, recipe, layers)
        if config.num_moe_experts:
            experts = get_moe_module_spec_for_backend(
                self.backend(config), config.num_moe_experts, config.moe_grouped_gemm
            )
            submodules = dataclasses.replace(submodules, experts=experts)
        return submodules

    def backend(self, config: TransformerConfig) -> BackendSpecProvider:
        """The classes of Megatron's own layers, beside blocks and in experts."""
        recipe, layers = self._emulation()
        if config.transformer_impl == "transformer_engine":
            from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

            return TESpecProvider()
        return LocalSpecProvider() if recipe is None else EmulatedFp8Backend(recipe, layers)

    def _emulation(self) -> tuple[str | None, tuple[str, ...]]:
        """The recipe of emulated FP8, or None, and the linear layers that have it."""
        arguments = megatron_arguments()
        recipe = getattr(arguments, "megalodon_emulated_fp8", None) or self.emulated_fp8
        layers = getattr(arguments, "megalodon_emulated_fp8_layers", None)
        return recipe, layers or self.emulated_fp8_layers

    def resolve(
        self,
        config: TransformerConfig,
        rotary_base: float = 10_000,
        pattern: str | None = None,
    ) -> MegalodonConfig:
        """The model's values: Megatron's, and our own as `settle` finds them.

        Of layers beside blocks it has what a TransformerConfig says. What comes out is written back
        to Megatron's arguments, so that checkpoints keep it.
        """
        self._warn_of_differences(config)
        arguments = megatron_arguments()
        if self.settled is not None:
            own = self.settled.own_values()
        else:
            given, checkpoint = {}, None
            if arguments is not None:
                given = values_in_arguments(arguments)
                if getattr(arguments, "use_checkpoint_args", False):
                    checkpoint = values_in_arguments(_arguments_in_checkpoint(arguments))
            own = settle(given, checkpoint, self.size)
        resolved = MegalodonConfig(
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            ffn_hidden_size=config.ffn_hidden_size,
            rotary_base=rotary_base,
            norm_eps=config.layernorm_epsilon,
            swiglu=config.gated_linear_unit,
            dropout=config.hidden_dropout,
            attention_dropout=config.attention_dropout,
            **_values_beside_blocks(config, pattern),
            **{"num_heads": config.num_attention_heads} | own,
        )
        if arguments is not None:
            for name, value in resolved.own_values().items():
                setattr(arguments, ARGUMENT_PREFIX + name, value)
            _say_what_the_checkpoint_had(arguments, resolved)
            throughput.count_own_flops()
        return resolved

    def _warn_of_differences(self, config: TransformerConfig) -> None:
        if self.size is None:
            return
        for name in ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size"):
            wanted = getattr(self.size, name.replace("attention_", ""))
            given = getattr(config, name)
            if wanted != given:
                logger.warning(
                    "--%s is %s; the named size has %s.", name.replace("_", "-"), given, wanted
                )


def _values_beside_blocks(config: TransformerConfig, pattern: str | None) -> dict[str, Any]:
    """The values of MegalodonConfig that say something of other layers than dense blocks."""
    theirs = {ours: z for ours, z in names("core").items() if FIELDS[ours].metadata["symbols"]}
    found = {ours: getattr(config, name, None) for ours, name in theirs.items()}
    layers = layers_of(pattern, config.num_layers, config.num_moe_experts, config.moe_layer_freq)
    return {"layers": layers} | {ours: z for ours, z in found.items() if z is not None}


def _arguments_in_checkpoint(arguments: Namespace) -> Namespace | None:
    from megatron.training.checkpointing import load_args_from_checkpoint

    with checkpoint_errors.loading(arguments):
        loaded = load_args_from_checkpoint(copy.copy(arguments))
    return loaded[1] if isinstance(loaded, tuple) else None


def _say_what_the_checkpoint_had(arguments: Namespace, resolved: MegalodonConfig) -> None:
    """A line for each value that is another than that which --load was trained with."""
    folder = getattr(arguments, "load", None)
    if folder is None:
        return
    # On every rank, since Megatron compares what they read.
    lines = _differences(folder, resolved)
    if getattr(arguments, "rank", 0) == 0:
        for line in lines:
            logger.warning(line)


@functools.lru_cache
def _differences(folder: str, resolved: MegalodonConfig) -> list[str]:
    """Looked up once a run; an empty list where nothing was saved yet."""
    arguments = megatron_arguments()
    if not (Path(folder) / "latest_checkpointed_iteration.txt").is_file():
        return []
    trained = _arguments_in_checkpoint(arguments) or Namespace()
    lines = [
        f"--megalodon-{name.replace('_', '-')} is {getattr(resolved, name)}; the checkpoint in "
        f"--load {folder} was trained with {value}."
        for name, value in values_in_arguments(trained).items()
        if getattr(resolved, name) != value
    ]
    padded, before = (getattr(z, "padded_vocab_size", None) for z in (arguments, trained))
    if padded and before and padded != before:
        tp = arguments.tensor_model_parallel_size
        remedy = f" with --make-vocab-size-divisible-by {before // tp} they do not"
        lines.append(
            f"The vocabulary is padded to {padded} tokens; the checkpoint in --load {folder} had "
            f"{before}. Losses differ by the new ones' share in the softmax"
            + (f";{remedy}." if before % tp == 0 else ".")
        )
    return lines


def _before_construction(model: type, settle: Callable[[dict[str, Any]], None]) -> None:
    """Has `settle` see the arguments of a model's constructor, by name, before it does."""
    construct = model.__init__
    if getattr(construct, "settles_megalodon", False):
        return
    signature = inspect.signature(construct)

    @functools.wraps(construct)
    def settled(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        settle(bound.arguments)
        construct(*bound.args, **bound.kwargs)

    settled.settles_megalodon = True
    model.__init__ = settled


def _resolve_spec(given: dict[str, Any]) -> None:
    """Lets GPTModel take a MegalodonSpec, as GPTModelBuilder already takes any callable."""
    if isinstance(given["transformer_layer_spec"], MegalodonSpec):
        groups = given["pg_collection"]
        given["transformer_layer_spec"] = given["transformer_layer_spec"].block_submodules(
            given["config"],
            rotary_base=given["rotary_base"],
            position_embedding_type=given["position_embedding_type"],
            vp_stage=given["vp_stage"],
            pp_rank=groups.pp.rank() if groups is not None else None,
        )
    if isinstance(given["transformer_layer_spec"], MegalodonBlockSubmodules):
        given["mtp_block_spec"] = given["transformer_layer_spec"].prediction


def _resolve_stack(given: dict[str, Any]) -> None:
    """Lets HybridModel take a MegalodonSpec for its stack."""
    spec, pattern = given["hybrid_stack_spec"], given["hybrid_layer_pattern"]
    if not isinstance(spec, MegalodonSpec):
        return
    if pattern is None:
        raise ValueError("HybridModel has no --hybrid-layer-pattern; give one, such as MM*M.")
    names = ("position_embedding_type", "rotary_base", "rotary_percent")
    parts = spec.hybrid_parts(given["config"], pattern, *(given[name] for name in names))
    given["hybrid_stack_spec"] = hybrid.stack_of(parts, given["config"])


megatron_fixes.apply()
muon.apply()
_before_construction(GPTModel, _resolve_spec)
_before_construction(HybridModel, _resolve_stack)

megalodon = MegalodonSpec()
megalodon_200m = MegalodonSpec(SIZES["200m"])
megalodon_1_3b = MegalodonSpec(SIZES["1.3b"])
megalodon_1_3b_pg19 = MegalodonSpec(SIZES["1.3b-pg19"])
megalodon_7_1b = MegalodonSpec(SIZES["7.1b"])
megalodon_7_3b = MegalodonSpec(SIZES["7.3b"])
megalodon_7b = MegalodonSpec(SIZES["7b-paper"])

megalodon_hybrid = megalodon
"""The name that a reader of `pretrain_hybrid.py ...` expects; any other will do."""

spec = megalodon
"""The spec that the one-word form `--spec megalodon_mcore.spec` means."""

NAMES_BY_SIZE = {
    "200m": "megalodon_200m",
    "1.3b": "megalodon_1_3b",
    "1.3b-pg19": "megalodon_1_3b_pg19",
    "7.1b": "megalodon_7_1b",
    "7.3b": "megalodon_7_3b",
    "7b-paper": "megalodon_7b",
}
