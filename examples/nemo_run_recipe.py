#!/usr/bin/env python3
"""Launches a recipe with NeMo-Run, on this machine or on a Slurm cluster.

python examples/nemo_run_recipe.py local --gpus 8 pretrain-recipe 200m-4k train.train_iters=100
python examples/nemo_run_recipe.py slurm --nodes 8 --account A --partition P --job-dir /shared/runs
    pretrain-recipe 7b-32k checkpoint.save=/shared/7b checkpoint.load=/shared/7b

--dry-run prints what would be submitted. NeMo-Run is `pip install nemo-run 'leptonai<0.28'` (0.11.1
does not import beside newer leptonai). On Slurm it is run on a login node, and the environment that
it is run in, with this package and Megatron-Bridge, must be visible from the nodes; or give
--container-image. A failed job is started again --retries times and goes on from its last
checkpoint.
"""

from __future__ import annotations

import argparse

import nemo_run as run


def main() -> None:
    """Builds the task and its executor and hands them to NeMo-Run."""
    args = parse_arguments()
    task = run.Script(
        path="megalodon_mcore",
        m=True,
        entrypoint="python",
        args=[args.command, args.recipe, *args.arguments],
    )
    executor = local_executor(args) if args.where == "local" else slurm_executor(args)
    with run.Experiment(f"megalodon-{args.recipe}", executor=executor) as experiment:
        experiment.add(task, name=args.command)
        if args.dry_run:
            experiment.dryrun()
        else:
            experiment.run(detach=args.where == "slurm", tail_logs=args.where == "local")


def local_executor(args: argparse.Namespace) -> run.LocalExecutor:
    """torchrun on this machine."""
    return run.LocalExecutor(ntasks_per_node=args.gpus, launcher="torchrun", retries=args.retries)


def slurm_executor(args: argparse.Namespace) -> run.SlurmExecutor:
    """torchrun on every node of a Slurm job."""
    return run.SlurmExecutor(
        account=args.account,
        partition=args.partition,
        nodes=args.nodes,
        ntasks_per_node=args.gpus,
        gpus_per_node=args.gpus,
        time=args.time,
        retries=args.retries,
        container_image=args.container_image,
        launcher="torchrun",
        tunnel=run.LocalTunnel(job_dir=args.job_dir),
        # The installed package runs, not a copy of this folder.
        packager=run.Packager(),
    )


def parse_arguments() -> argparse.Namespace:
    """What the command line says; everything after the recipe is the command's own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("where", choices=["local", "slurm"])
    parser.add_argument("--gpus", type=int, default=8, help="Ranks on a node (8).")
    parser.add_argument("--nodes", type=int, default=1, help="Nodes, on Slurm (1).")
    parser.add_argument("--account", help="Slurm's.")
    parser.add_argument("--partition", help="Slurm's.")
    parser.add_argument("--time", default="24:00:00", help="Slurm's limit (24:00:00).")
    parser.add_argument("--job-dir", help="Shared folder for NeMo-Run's files, on Slurm.")
    parser.add_argument("--container-image", help="Image that the job runs in, on Slurm.")
    parser.add_argument("--retries", type=int, default=3, help="Starts after a failure (3).")
    parser.add_argument("--dry-run", action="store_true", help="Print and stop.")
    parser.add_argument("command", choices=["pretrain-recipe", "finetune-recipe"])
    parser.add_argument("recipe", help="A name that `megalodon-mcore pretrain-recipe` knows.")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="For the command.")
    args = parser.parse_args()
    if args.where == "slurm" and not (args.account and args.job_dir):
        parser.error("slurm needs --account and --job-dir")
    return args


if __name__ == "__main__":
    main()
