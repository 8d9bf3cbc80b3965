"""The arguments of `megalodon-mcore pretrain`: Megatron's and ours, defaults and checks."""

from __future__ import annotations

from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from typing import Any

from megalodon_mcore import checkpoint_errors, checkpoint_tokenizer, missing_kernels, packed_data
from megalodon_mcore.argument_values import check_values, in_one_sentence
from megalodon_mcore.config import ARGUMENT_PREFIX, FIELDS, KINDS, OWN
from megalodon_mcore.options import (
    check_arguments,
    honoured_beside,
    refusals_beside_megalodon,
    refusals_of_pretrain,
)
from megalodon_mcore.parallel.sequence_layout import SEQUENCE_ORDERS
from megalodon_mcore.sizes import SIZES, megatron_arguments

MEGATRONS = "megatron."
"""What the module of a --spec of Megatron's own layers begins with."""
LOST = ("moe_shared_expert_gate",)
"""Arguments of the model that Megatron's --use-checkpoint-args does not bring back."""


def parse_arguments(
    from_checkpoint: tuple[str, ...] = (), tokenizer_option: str = "--tokenizer-model"
) -> Namespace:
    """Parses and validates sys.argv and makes it Megatron's global arguments.

    Like Megatron's parse_and_validate_args, but a spec may be one word, and --use-checkpoint-args
    brings back the arguments named in `from_checkpoint` too. (Megalodon's own values are brought
    back by the spec, whoever parsed the arguments.) `tokenizer_option` is how the user names the
    place of a tokenizer that the checkpoint has lost.

    Raises:
        ValueError: that tokenizer is missing and no other was named, or Megatron refuses a value.
    """
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.checkpointing import load_args_from_checkpoint
    from megatron.training.global_vars import set_global_variables

    args = parse_args(_prepare_parser)
    if args.use_checkpoint_args:
        if args.load is None:
            raise SystemExit(
                "--use-checkpoint-args takes its values from --load, which is missing."
            )
        named = {name: getattr(args, name) for name in checkpoint_tokenizer.ARGUMENTS}
        with checkpoint_errors.loading(args):
            loaded = load_args_from_checkpoint(args)
        if isinstance(loaded, tuple):
            for name in from_checkpoint:
                setattr(args, name, getattr(loaded[1], name, None))
            for name in LOST:
                setattr(args, name, getattr(loaded[1], name, getattr(args, name)))
            checkpoint_tokenizer.settle_arguments(args, named, tokenizer_option)
    if args.spec is not None and len(args.spec) == 1:
        args.spec = [args.spec[0], "spec"]
    if args.dist_ckpt_optim_fully_reshardable is None:
        args.dist_ckpt_optim_fully_reshardable = can_save_fully_reshardable(args)
    with in_one_sentence():
        validate_args(args)
    set_global_variables(args)
    return args


def _prepare_parser(parser: ArgumentParser) -> ArgumentParser:
    """Adds our arguments, and refuses what is given and not honoured before Megatron acts on it."""
    add_megalodon_arguments(parser)
    try:
        args = parser.parse_known_args()[0]
        check_values(args, parser)
        if args.hybrid_layer_pattern is not None:
            from megalodon_mcore.hybrid import check_pattern

            check_pattern(args.hybrid_layer_pattern, args.num_experts, args.mtp_num_layers)
        honoured = honoured_beside(args.hybrid_layer_pattern, args.num_experts, args.mtp_num_layers)
        own_layers = args.spec[0].startswith(MEGATRONS)
        refused = refusals_beside_megalodon() if own_layers else refusals_of_pretrain()
        check_arguments(args, parser, refused, honoured)
        if own_layers:
            _check_megatrons_layers(args)
    except ValueError as error:
        raise SystemExit(f"megalodon-mcore pretrain: {error}") from None
    return parser


def _check_megatrons_layers(args: Namespace) -> None:
    """Refuses what says something of Megalodon's layers alone, beside a --spec of Megatron's."""
    for name in ("size", "emulated_fp8", "emulated_fp8_layers", *OWN):
        value = getattr(args, ARGUMENT_PREFIX + name)
        if value is not None:
            raise ValueError(
                f"--megalodon-{name.replace('_', '-')} is {value}, but --spec {args.spec[0]} has "
                "no Megalodon layers; leave one of them out."
            )
    order = args.megalodon_sequence_order
    if args.context_parallel_size > 1 and order != "zigzag":
        raise ValueError(
            f"--megalodon-sequence-order is {order}, but with --context-parallel-size Megatron's "
            "own layers expect what its scripts do; take zigzag."
        )


def can_save_fully_reshardable(args: Namespace) -> bool:
    """Whether the optimizer's state goes from this run's checkpoints to any layout if asked to."""
    is_local = args.non_persistent_ckpt_type == "local"
    return args.use_distributed_optimizer and args.ckpt_format == "torch_dist" and not is_local


def check_run(args: Namespace) -> None:
    """Checks what does not concern the model: the data, its evaluation, and what needs a GPU.

    Raises:
        ValueError: one sentence names the argument, its value and what would work.
    """
    from megatron.training import get_tokenizer

    from megalodon_mcore import evaluation
    from megalodon_mcore.gpu_arguments import check_gpu_arguments

    check_gpu_arguments(args)
    tokens = get_tokenizer().vocab_size
    if args.padded_vocab_size < tokens:
        raise ValueError(
            f"--padded-vocab-size is {args.padded_vocab_size}, but the tokenizer has {tokens} "
            "tokens; leave it out."
        )
    if args.sft:
        packed_data.check_prompt_format(args, get_tokenizer())
    if args.fim_data:
        packed_data.check_fim_tokens(args, get_tokenizer())
    evaluation.prepare(args)


def model_config_from_arguments(args: Namespace) -> Any:
    """Megatron's configuration of a model, also where tensor-parallel ranks share a head.

    Its constructor refuses that, while no Megalodon block goes by its number of heads; what does
    not fit Megalodon is found by `check_model`.
    """
    from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args

    pattern = args.hybrid_layer_pattern
    make = gpt_config_from_args if pattern is None else hybrid_config_from_args
    heads, tp = args.num_attention_heads, args.tensor_model_parallel_size
    if heads % tp == 0 or "*" in (pattern or ""):
        return make(args)
    args.num_attention_heads = tp
    try:
        model_config = make(args)
    finally:
        args.num_attention_heads = heads
    model_config.transformer.num_attention_heads = heads
    model_config.transformer.num_query_groups = heads
    return model_config


def check_model(model_config: Any) -> None:
    """Resolves the spec before any process group exists, so that a wrong value fails at once.

    Raises:
        SystemExit: with the one sentence of the ValueError, or Transformer Engine has no GPU.
    """
    from megalodon_mcore.gpu_arguments import count_gpus
    from megalodon_mcore.spec import MegalodonSpec

    pattern = getattr(model_config, "hybrid_layer_pattern", None)
    if pattern is None:
        spec = model_config.transformer_layer_spec
    else:
        spec = model_config.hybrid_stack_spec
    if not isinstance(spec, MegalodonSpec):
        return
    try:
        spec.check(
            model_config.transformer,
            model_config.position_embedding_type,
            model_config.rotary_base,
            pattern,
            model_config.rotary_percent,
        )
    except ValueError as error:
        raise SystemExit(f"megalodon-mcore pretrain: {error}") from None
    implementation = model_config.transformer.transformer_impl
    if implementation == "transformer_engine" and not count_gpus():
        raise SystemExit(
            "megalodon-mcore pretrain: --transformer-impl is transformer_engine, whose layers run "
            "on GPUs alone, and there is none; take --transformer-impl local."
        )


def add_megalodon_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Adds `--megalodon-*` to Megatron's parser and makes its defaults Megalodon's."""
    from megalodon_mcore.kernels.fp8_linear import RECIPES
    from megalodon_mcore.layers.submodules import LINEAR_LAYERS

    group = parser.add_argument_group(
        title="megalodon", description="Values of Megalodon that Megatron has no argument for."
    )
    group.add_argument(
        "--megalodon-size",
        choices=list(SIZES),
        help="Named size: sets the defaults of the Megatron arguments (layers, widths, heads, "
        "SwiGLU, RoPE base, tied embeddings) and of those below.",
    )
    for name in OWN:
        option = "--" + (ARGUMENT_PREFIX + name).replace("_", "-")
        about = {"help": FIELDS[name].metadata["help"]}
        if KINDS[name] == "bool":
            group.add_argument(option, action=BooleanOptionalAction, **about)
        else:
            kind = {"int": int, "float": float, "str": str}[KINDS[name]]
            choices = FIELDS[name].metadata["choices"]
            group.add_argument(option, type=kind, choices=choices, **about)
    group.add_argument(
        "--megalodon-sequence-order",
        choices=SEQUENCE_ORDERS,
        default="contiguous",
        help="How context parallelism cuts a sequence (contiguous): in order; as Megatron's "
        "scripts do (zigzag); every document apart, as they do with --sft (document_zigzag).",
    )
    group.add_argument(
        "--megalodon-emulated-fp8",
        choices=list(RECIPES),
        help="Compute linear layers as FP8 tensor cores would, by casting: for experiments without "
        "them. (For FP8 itself, --transformer-impl transformer_engine --fp8-format.)",
    )
    group.add_argument(
        "--megalodon-emulated-fp8-layers",
        nargs="+",
        choices=LINEAR_LAYERS,
        help="Which linear layers emulate FP8 (all of them).",
    )
    group.add_argument(
        "--no-dist-ckpt-optim-fully-reshardable",
        dest="dist_ckpt_optim_fully_reshardable",
        action="store_false",
        help="Save the distributed optimizer as Megatron does by default: faster, and for other "
        "numbers of data-parallel ranks alone. Here --dist-ckpt-optim-fully-reshardable is the "
        "default with --use-distributed-optimizer and torch_dist checkpoints.",
    )
    parser.set_defaults(**_defaults())
    # Megatron's own usage line runs over several hundred arguments before it says what is wrong.
    parser.prog = "megalodon-mcore pretrain"
    parser.usage = "%(prog)s ARGUMENTS (--help lists them)"
    _repair_help(parser)
    return parser


def _repair_help(parser: ArgumentParser) -> None:
    """Escapes the percent signs of Megatron's help texts that argparse cannot format."""
    formatter = parser._get_formatter()
    for action in parser._actions:
        try:
            if action.help:
                formatter._expand_help(action)
        except (ValueError, TypeError, KeyError):
            action.help = action.help.replace("%", "%%")


def _defaults() -> dict[str, Any]:
    """Defaults over Megatron's: Megalodon's own, what this machine lacks, and the named size's."""
    from megalodon_mcore.spec import NAMES_BY_SIZE

    preparser = ArgumentParser(add_help=False, allow_abbrev=False)
    preparser.add_argument("--megalodon-size", choices=list(SIZES))
    size = preparser.parse_known_args()[0].megalodon_size

    defaults: dict[str, Any] = {
        "spec": ["megalodon_mcore.spec", NAMES_BY_SIZE[size] if size else "megalodon"],
        "position_embedding_type": "none",
        "normalization": "RMSNorm",
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "add_bias_linear": False,
        "transformer_impl": "local",
        "create_attention_mask_in_dataloader": False,
        # Its kernels turn nothing here, and some are not installed.
        "apply_rope_fusion": False,
        # Whole matrices, as in one process; Megatron's blockwise gives each layout other updates.
        "muon_tp_mode": "duplicated",
        # Neither; parse_arguments settles it.
        "dist_ckpt_optim_fully_reshardable": None,
    }
    if not missing_kernels.is_installed("fused_weight_gradient_mlp_cuda"):
        defaults["gradient_accumulation_fusion"] = False
    if not missing_kernels.is_installed("apex"):
        defaults |= {"no_persist_layer_norm": True, "masked_softmax_fusion": False}
    if size:
        defaults |= megatron_arguments(SIZES[size])
    return defaults
