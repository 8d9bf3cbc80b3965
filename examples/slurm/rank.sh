#!/usr/bin/env bash
# What srun starts for every rank: gives torch.distributed what torchrun would.
set -euo pipefail
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
exec python -u "$@"
