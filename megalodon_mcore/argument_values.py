"""Values that no argument of `pretrain` takes, and arguments that mean nothing without another."""

from __future__ import annotations

import ast
import importlib.util
import json
import linecache
import math
import os
import traceback
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megalodon_mcore.checkpoint_errors import CheckpointError
from megalodon_mcore.config import ARGUMENT_PREFIX, KINDS, OWN
from megalodon_mcore.conversion.mcore_checkpoint import TRACKER

AT_LEAST_ONE = frozenset(
    """
    num_layers hidden_size num_attention_heads ffn_hidden_size seq_length max_position_embeddings
    micro_batch_size global_batch_size eval_micro_batch_size eval_global_batch_size vocab_size
    padded_vocab_size make_vocab_size_divisible_by tensor_model_parallel_size
    pipeline_model_parallel_size context_parallel_size num_layers_per_virtual_pipeline_stage
    num_virtual_stages_per_pipeline_rank recompute_num_layers save_interval save_retain_interval
    non_persistent_save_interval exit_interval exit_duration_in_mins lr_decay_iters
    lr_decay_samples lr_wsd_decay_iters lr_wsd_decay_samples train_samples muon_num_ns_steps
    num_dataset_builder_threads manual_gc_interval num_experts moe_router_topk moe_ffn_hidden_size
    moe_shared_expert_intermediate_size mtp_num_layers kv_channels num_query_groups log_interval
    tensorboard_log_interval
    """.split()
) | {ARGUMENT_PREFIX + name for name in OWN if KINDS[name] == "int"}
AT_LEAST_ZERO = frozenset(
    """
    train_iters num_workers seed lr min_lr lr_warmup_iters lr_warmup_samples
    lr_warmup_init weight_decay start_weight_decay end_weight_decay clip_grad sgd_momentum
    muon_momentum decoupled_lr decoupled_min_lr mid_level_dataset_surplus eval_interval eval_iters
    """.split()
)
ABOVE_ZERO = frozenset(
    """
    layernorm_epsilon adam_eps loss_scale initial_loss_scale min_loss_scale rotary_base
    distributed_timeout_minutes
    """.split()
)
BELOW_ONE = frozenset(
    """
    hidden_dropout attention_dropout adam_beta1 adam_beta2 lion_beta1 lion_beta2
    """.split()
) | {ARGUMENT_PREFIX + name for name in OWN if KINDS[name] == "float"}
"""At least 0 as well."""

WITHOUT = {
    "save": """
        save_interval save_retain_interval async_save save_params_interval save_wgrads_interval
        save_dgrads_interval save_activations_interval non_persistent_save_interval
    """,
    "load": "ckpt_step no_load_optim no_load_rng finetune",
    "fp8": """
        fp8_margin fp8_interval fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad fp8_recipe
        first_last_layers_bf16 num_layers_at_start_in_bf16 num_layers_at_end_in_bf16
    """,
    "recompute_granularity": "recompute_method recompute_num_layers recompute_modules",
    "megalodon_emulated_fp8": "megalodon_emulated_fp8_layers",
}
"""The arguments without effect unless the one that they stand below is given."""

INSTEAD_OF = {
    "load": ("pretrained_checkpoint",),
    "save": ("non_persistent_local_ckpt_dir", "non_persistent_global_ckpt_dir"),
    "recompute_granularity": ("recompute_activations",),
}
"""The arguments that serve as well as that one."""

FOLDERS = ("save", "tensorboard_dir", "data_cache_path", "wandb_save_dir")
"""Where something is written."""


def check_values(args: Namespace, parser: ArgumentParser) -> None:
    """Checks what the parser gave, before Megatron looks at it.

    Raises:
        ValueError: one sentence names the first argument that does not fit and what would work.
    """
    defaults = vars(parser.parse_args([]))
    options = {action.dest: _written(action) for action in reversed(parser._actions[1:])}
    given = {
        name: value
        for name, value in vars(args).items()
        if name in options and value is not None and value != defaults[name]
    }
    for name, value in given.items():
        wanted = _out_of_range(name, value)
        if wanted:
            raise ValueError(f"{options[name]} is {value}; it must be {wanted}.")
    for needed, names in WITHOUT.items():
        if any(getattr(args, name, None) for name in (needed, *INSTEAD_OF.get(needed, ()))):
            continue
        for name in names.split():
            if name in given:
                raise ValueError(
                    f"{options[name]} is given, which does nothing without {options[needed]}; add "
                    "that or leave it out."
                )
    _check_recompute(args)
    _check_schedule(args)
    _check_pipeline(args)
    if args.dataloader_type == "external":
        raise ValueError(
            "--dataloader-type is external, but this command has no loader to hand over; take "
            "single or cyclic."
        )
    if args.wandb_project and not importlib.util.find_spec("wandb"):
        raise ValueError(
            f"--wandb-project is {args.wandb_project}, but wandb is not installed; install it or "
            "take --tensorboard-dir."
        )
    for name in FOLDERS:
        if getattr(args, name, None):
            _check_folder(options[name], Path(getattr(args, name)))
    if args.load:
        _check_load(args)
    read_sequences_per_dataset(args.per_dataset_sequences_path)


def _written(action: Action) -> str:
    """How its option is written: as its value is named, where it can be."""
    plain = "--" + action.dest.replace("_", "-")
    return plain if plain in action.option_strings else action.option_strings[-1]


def _out_of_range(name: str, value: object) -> str:
    """Says what the value would have to be; empty where it fits or is no number."""
    numbers = value if isinstance(value, list) else [value]
    numbers = [z for z in numbers if isinstance(z, int | float) and not isinstance(z, bool)]
    for number in numbers:
        if not math.isfinite(number):
            return "a finite number"
        if name in AT_LEAST_ONE and number < 1:
            return "at least 1"
        if name in AT_LEAST_ZERO | BELOW_ONE and number < 0:
            return "at least 0"
        if name in ABOVE_ZERO and number <= 0:
            return "above 0"
        if name in BELOW_ONE and number >= 1:
            return "below 1"
    return ""


def _check_recompute(args: Namespace) -> None:
    if args.recompute_granularity == "full" and args.recompute_method is None:
        raise ValueError(
            "--recompute-granularity is full, which needs --recompute-method uniform or block."
        )


def _check_schedule(args: Namespace) -> None:
    for unit in ("iters", "samples"):
        warmup = getattr(args, f"lr_warmup_{unit}")
        steps = getattr(args, f"lr_decay_{unit}") or getattr(args, f"train_{unit}")
        if warmup and steps and warmup >= steps and not args.use_checkpoint_opt_param_scheduler:
            raise ValueError(
                f"--lr-warmup-{unit} is {warmup}, but the schedule has {steps} {unit} in all "
                f"(--lr-decay-{unit}, else --train-{unit}); take fewer."
            )


def _check_pipeline(args: Namespace) -> None:
    uneven = (
        args.decoder_first_pipeline_num_layers,
        args.decoder_last_pipeline_num_layers,
        args.pipeline_model_parallel_layout,
        args.account_for_embedding_in_pipeline_split,
        args.account_for_loss_in_pipeline_split,
    )
    if args.num_layers is not None and not any(uneven):
        # Here, because it imports Megatron.
        from megalodon_mcore.validation import check_stages

        check_stages(args.num_layers, args.pipeline_model_parallel_size)


def _check_folder(option: str, folder: Path) -> None:
    """Checks that it is a folder that can be written to, or can be made."""
    there = next((z for z in (folder, *folder.absolute().parents) if z.exists()), Path("/"))
    if not there.is_dir():
        raise ValueError(f"{option} is {folder}, but {there} is no folder; name another place.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{option} is {folder}, but {there} cannot be written to; name another.")


def _check_load(args: Namespace) -> None:
    """Checks that there is a checkpoint, but where the first of this run's own will be.

    Megatron would start from scratch after a warning among its others.
    """
    folder = Path(args.load)
    if args.non_persistent_ckpt_type or (folder / TRACKER).exists():
        step = args.ckpt_step
        if step is not None and not args.non_persistent_ckpt_type:
            found = sorted(int(z.name[5:]) for z in folder.glob("iter_*") if z.name[5:].isdigit())
            if step not in found:
                steps = ", ".join(map(str, found)) or "none"
                raise ValueError(
                    f"--ckpt-step is {step}, but {folder} has these iterations: {steps}."
                )
        if args.optimizer == "sgd" and not (args.no_load_optim or args.finetune):
            raise ValueError(
                "--optimizer is sgd, whose state Megatron saves and cannot load; add "
                "--no-load-optim, which starts it anew."
            )
        return
    if not args.save or folder.absolute() != Path(args.save).absolute():
        raise ValueError(
            f"--load is {folder}, which holds no checkpoint (it has no {TRACKER}); name a folder "
            "that --save wrote, or leave it out to start from scratch."
        )


def read_sequences_per_dataset(path: str | None) -> dict[str, int] | None:
    """How many sequences every dataset has, from the JSON file of --per-dataset-sequences-path.

    Raises:
        ValueError: it cannot be read, or is something else.
    """
    if not path:
        return None
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--per-dataset-sequences-path is {path}, which cannot be read as JSON: {error}."
        ) from None
    if not isinstance(found, dict) or not all(isinstance(z, int) for z in found.values()):
        raise ValueError(
            f"--per-dataset-sequences-path is {path}, which must be an object of dataset prefixes "
            "with their numbers of sequences."
        )
    return found


@contextmanager
def in_one_sentence() -> Iterator[None]:
    """Around Megatron's own checks: what is raised there becomes a sentence.

    Raises:
        ValueError: for any Exception; of one without words it has the condition that failed.
    """
    try:
        yield
    except (ValueError, AssertionError) as error:
        if isinstance(error, CheckpointError) or str(error):
            raise ValueError(str(error)) from error
        raise ValueError(f"Megatron refuses these arguments: {_place_of(error)}.") from error
    except Exception as error:
        raise ValueError(
            f"Megatron cannot make sense of these arguments: {type(error).__name__}: {error} "
            f"({_place_of(error)})."
        ) from error


def _place_of(error: Exception) -> str:
    """The statement that raised it, and where that is."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    lines = range(frame.lineno, (frame.end_lineno or frame.lineno) + 1)
    text = " ".join(linecache.getline(frame.filename, n).strip() for n in lines)
    try:
        (statement,) = ast.parse(text).body
        if isinstance(statement, ast.Assert):
            text = f"{ast.unparse(statement.test)} does not hold"
    except (SyntaxError, ValueError):
        pass
    return f"{text}, {Path(frame.filename).name} line {frame.lineno}"
