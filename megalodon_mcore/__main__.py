"""The command line: `python -m megalodon_mcore`, installed as `megalodon-mcore`."""

from __future__ import annotations

import sys
from argparse import ArgumentParser

from megalodon_mcore import missing_kernels

DESCRIPTION = "Train Megalodon, the long-context architecture, inside Megatron-Core."
PRETRAIN_HELP = (
    "Train in Megatron's loop; takes every Megatron argument and --megalodon-* ones "
    "(`pretrain --help` lists them)."
)

RECIPE_COMMANDS = {
    "pretrain-recipe": "Train a Megatron-Bridge recipe (with Megatron-Bridge installed).",
    "finetune-recipe": "Fine-tune a Hugging Face folder as a recipe says, likewise.",
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit status, 2 with one sentence where input was wrong and 130
    where it was interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    # Before anything imports Megatron.
    missing_kernels.ignore_warnings()
    if argv and argv[0] == "pretrain":
        # Megatron has its own parser of several hundred arguments.
        from megalodon_mcore import pretraining

        pretraining.main(argv[1:])
        return 0
    if argv and argv[0] == "compare-measure":
        # Of compare, which starts it for each model.
        from megalodon_mcore.compare import measure

        return measure.main(argv[1:])
    if argv and argv[0] in RECIPE_COMMANDS:
        command, run = argv[0], lambda: _run_recipe(*argv)
    else:
        parser, commands = _build_parser()
        args = parser.parse_args(argv)
        command, run = args.command, lambda: commands[args.command].run(args)
    try:
        return run()
    except (ValueError, OSError, EOFError) as error:
        print(f"megalodon-mcore {command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"megalodon-mcore {command}: interrupted.", file=sys.stderr)
        return 130


def _build_parser() -> tuple[ArgumentParser, dict]:
    from megalodon_mcore import describe, generate, state_command
    from megalodon_mcore.compare import command as compare
    from megalodon_mcore.conversion import command as convert
    from megalodon_mcore.conversion import container
    from megalodon_mcore.data import prepare_command
    from megalodon_mcore.scoring import command as evaluate

    parser = ArgumentParser(prog="megalodon-mcore", description=DESCRIPTION)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands = {
        "prepare-data": (prepare_command, "Turn text or JSONL into Megatron's indexed datasets."),
        "generate": (generate, "Continue a prompt from a checkpoint, printing as it goes."),
        "state": (state_command, "Read a long text once, and go on from there as often as wanted."),
        "evaluate": (evaluate, "Score a checkpoint on text, or on finding what a prompt says."),
        "convert": (convert, "Turn a checkpoint into another format, or one from elsewhere."),
        "container": (
            container,
            "Let a checkpoint of GPTModel go on as HybridModel, or the other way round.",
        ),
        "compare": (compare, "Train Megalodon beside Megatron's GPT and say what came out."),
        "describe": (describe, "Print a named size: configuration, parameters, bytes."),
    }
    for name, (module, summary) in commands.items():
        module.add_arguments(subparsers.add_parser(name, help=summary, description=summary))
    subparsers.add_parser("pretrain", help=PRETRAIN_HELP, add_help=False)
    for name, summary in RECIPE_COMMANDS.items():
        subparsers.add_parser(name, help=summary, add_help=False)
    return parser, {name: module for name, (module, _) in commands.items()}


def _run_recipe(command: str, *argv: str) -> int:
    # Before Megatron-Bridge is imported, which looks at the GPU.
    from megalodon_mcore import pretraining

    pretraining.set_up(list(argv))
    try:
        from megalodon_mcore.bridge import run_recipe
    except ImportError as error:
        raise ValueError(
            f"Megatron-Bridge 0.6 cannot be imported ({error}); tests/nvidia.sh shows how to "
            "install it."
        ) from None
    return run_recipe.run(command, list(argv))


if __name__ == "__main__":
    sys.exit(main())
