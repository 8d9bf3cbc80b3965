"""`megalodon-mcore container`: checkpoints of blocks alone, between GPTModel and HybridModel.

Both have the same tensors by the same names, the optimizer's too; but Megatron goes by the
arguments that a run has saved, and refuses those of the other model.
"""

from __future__ import annotations

import contextlib
import shutil
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch

from megalodon_mcore.config import config_from_arguments, layers_beside_blocks
from megalodon_mcore.conversion.mcore_checkpoint import (
    COMMON,
    OUTPUT_STATE,
    TRACKER,
    checkpoint_folder,
    common_state,
)
from megalodon_mcore.conversion.new_folder import new_folder
from megalodon_mcore.conversion.torch_dist_reader import TorchDistReader
from megalodon_mcore.conversion.torch_dist_writer import TorchDistWriter

DATA = "arguments.distcp"
LAYERS_APART = "decoder.layers.0."


def add_arguments(parser: ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("input", metavar="IN", type=Path, help="Folder that training had as --save")
    parser.add_argument("output", metavar="OUT", type=Path, help="Folder to make.")
    parser.add_argument(
        "--to",
        required=True,
        choices=["gpt", "hybrid"],
        help="What goes on with it: pretrain without or with --hybrid-layer-pattern.",
    )
    parser.add_argument("--iteration", type=int, help="Which of training's checkpoints (the last).")
    parser.add_argument(
        "--overwrite", action="store_true", help="Replace OUT, if it is a checkpoint."
    )


def run(args: Namespace) -> int:
    """Copies a checkpoint and changes what it says its model was.

    Raises:
        FileNotFoundError, FileExistsError: there is no checkpoint, or OUT is there already.
        ValueError: it is damaged, or has other layers than Megalodon's blocks.
    """
    source = checkpoint_folder(args.input, args.iteration)
    reader = TorchDistReader(source)
    common = common_state(reader)
    trained = common["args"]
    config = config_from_arguments(trained, 1, str(source))
    _, *predicting = (getattr(trained, "hybrid_layer_pattern", None) or "").split("/")
    if layers_beside_blocks(config.symbols) or set(predicting) - {"M"}:
        raise ValueError(
            f"{source} has layers {'/'.join([config.symbols, *predicting])}, and a GPTModel of "
            "Megalodon's has blocks (M) alone, and one for each further token."
        )
    are_alike = len(set(config.symbols)) == 1 and getattr(trained, "moe_layer_freq", 1) in (None, 1)
    if are_alike and any(key.startswith(LAYERS_APART) for key in reader.entries):
        raise ValueError(
            f"{source} has every layer's tensors apart, by other names in either model; save it "
            "without --ckpt-format fsdp_dtensor or Megatron's newer options for that."
        )
    pattern = "M" * config.num_layers + "/M" * (getattr(trained, "mtp_num_layers", None) or 0)
    trained.hybrid_layer_pattern = pattern if args.to == "hybrid" else None
    trained.is_hybrid_model = args.to == "hybrid"
    with new_folder(args.output, args.input, args.overwrite) as folder:
        target = folder / source.name
        shutil.copytree(source, target)
        with contextlib.closing(TorchDistWriter(target, DATA, reader.metadata)) as writer:
            # The file may be there, of an earlier conversion.
            for index in [z for z, place in reader.places.items() if place.relative_path == DATA]:
                del reader.places[index], reader.entries[index.fqn]
            # An object is one of a list, like every part that is saved by ranks.
            if (target / "common.pt").is_file():
                torch.save(common, target / "common.pt")
            else:
                writer.write_object(COMMON, [common])
            if args.to == "hybrid":
                writer.write_object(OUTPUT_STATE, [None])
            writer.finish()
        for beside in args.input.iterdir():
            if beside.is_dir() and not beside.name.startswith(("iter_", "release")):
                shutil.copytree(beside, folder / beside.name)
        (folder / TRACKER).write_text(source.name.removeprefix("iter_").lstrip("0") or "0")
    print(f"{args.output}: {source.name} for a {args.to} model of {config.num_layers} blocks.")
    return 0
