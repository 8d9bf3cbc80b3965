"""`megalodon-mcore pretrain-recipe` and `finetune-recipe`: run a recipe in Bridge's loop."""

from __future__ import annotations

import argparse
from argparse import ArgumentParser

from megatron.bridge.training import checkpointing
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.finetune import finetune
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides

from megalodon_mcore.bridge.recipes import RECIPES, finetune_config
from megalodon_mcore.bridge.recipes.finetuning import pad_packed_examples
from megalodon_mcore.checkpoint_errors import load_in_one_sentence
from megalodon_mcore.optimizer_check import check_optimizer


def run(command: str, argv: list[str]) -> int:
    """Runs a command with these arguments.

    Raises:
        SystemExit: the arguments are wrong (2).
        ValueError: a value of the recipe does not fit; one sentence names it.
    """
    finetunes = command == "finetune-recipe"
    args = _parser(command, finetunes).parse_intermixed_args(argv)
    cfg = RECIPES[args.recipe]()
    if finetunes:
        cfg = finetune_config(cfg, args.pretrained, args.data, args.packed, args.lora)
    cfg = process_config_with_overrides(cfg, args.config, args.overrides)
    pad_packed_examples(cfg)
    check_optimizer(cfg.optimizer)
    check_adapters(cfg)
    if args.dry_run:
        cfg.model.finalize()
        print(describe(args.recipe, cfg))
        return 0
    load_in_one_sentence(checkpointing, lambda state, **_: state.cfg.checkpoint)
    (finetune if finetunes else pretrain)(cfg, forward_step)
    return 0


def check_adapters(cfg: ConfigContainer) -> None:
    """Refuses a layout in which Bridge builds an adapter of another shape than its layer.

    Raises:
        ValueError: ranks share a head, so that each has all of linear_z.
    """
    ranks, heads = cfg.model.tensor_model_parallel_size, cfg.model.config().num_heads
    if cfg.peft is not None and ranks > heads:
        raise ValueError(
            f"--lora is given with model.tensor_model_parallel_size={ranks}, but the model has "
            f"{heads} heads, and ranks that share one have no part of its queries to adapt; take "
            f"{heads} ranks or fewer."
        )


def describe(name: str, cfg: ConfigContainer) -> str:
    """Summarizes a run in a few lines."""
    model, train = cfg.model, cfg.train
    sizes = f"TP {model.tensor_model_parallel_size} PP {model.pipeline_model_parallel_size} "
    sizes += f"CP {model.context_parallel_size}"
    if model.num_moe_experts:
        sizes += f" EP {model.expert_model_parallel_size}"
    tokens = train.global_batch_size * model.seq_length
    return "\n".join(
        (
            f"recipe      {name}",
            f"model       {model.num_layers} layers of width {model.hidden_size}"
            + (f", {model.config().layers}" if model.config().layers else ""),
            f"sequences   {model.seq_length} tokens, chunks of {model.megalodon_chunk_size}",
            f"layout      {sizes}, micro-batches of {train.micro_batch_size}",
            f"precision   {cfg.mixed_precision or 'float32'}",
            f"batches     {train.train_iters} of {train.global_batch_size} sequences "
            f"({tokens} tokens)",
            f"optimizer   {cfg.optimizer.optimizer}, rate {cfg.optimizer.lr} to "
            f"{cfg.optimizer.min_lr}, {cfg.scheduler.lr_decay_style}",
            f"checkpoints {cfg.checkpoint.save}",
        )
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"is {text}; it takes a positive integer.")
    return int(text)


def _parser(command: str, finetunes: bool) -> ArgumentParser:
    parser = ArgumentParser(
        prog=f"megalodon-mcore {command}",
        description="Fine-tune a model as a recipe says." if finetunes else "Pretrain a recipe.",
        epilog="Under torchrun it runs on as many ranks; without a GPU, over gloo.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("recipe", choices=list(RECIPES), help="The recipe.")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="Values over the recipe's, as train.train_iters=100.",
    )
    if finetunes:
        parser.add_argument(
            "--pretrained", required=True, help="Hugging Face folder to start from."
        )
        parser.add_argument(
            "--data",
            required=True,
            help="Folder of training.jsonl and validation.jsonl with input and output.",
        )
        parser.add_argument(
            "--packed",
            action="store_true",
            help="Put as many examples into a sequence as it has room for; they stay apart.",
        )
        parser.add_argument(
            "--lora", type=_positive, metavar="RANK", help="Train low-rank adapters alone."
        )
    parser.add_argument("--config", help="YAML file of values over the recipe's.")
    parser.add_argument("--dry-run", action="store_true", help="Print what would run and stop.")
    return parser
