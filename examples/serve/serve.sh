#!/usr/bin/env bash
# From a checkpoint to a server of OpenAI's API: by vllm-cpu where there is no GPU, else by vLLM.
# Usage: bash examples/serve/serve.sh CHECKPOINT [OPTIONS of vllm serve]
# CHECKPOINT is one of training, which is converted first, or a Hugging Face folder.
set -euo pipefail
repository="$(cd "$(dirname "$0")/../.." && pwd)"
[ $# -gt 0 ] || { sed -n 's/^# Usage: //p' "$0" >&2; exit 2; }
checkpoint=$(realpath "$1")
shift
cd "$repository"
. examples/environment.sh
folder=$checkpoint
if [ ! -e "$checkpoint/config.json" ]; then
    folder=$checkpoint-hf
    if [ ! -e "$folder/config.json" ]; then
        make_environment && install_project || exit 1
        "$environment"/bin/python -m megalodon_mcore convert --from mcore --to hf "$checkpoint" "$folder"
    fi
fi
environment=.venv-vllm constraints=tests/vllm-constraints.txt
if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
    environment=.venv-vllm-gpu
    make_environment
    "$environment"/bin/python -m pip install --quiet 'vllm>=0.32,<0.33'
    # Serving needs nothing of Megatron.
    "$environment"/bin/python -m pip install --quiet --no-deps --editable .
else
    install_vllm_cpu
    export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-4}
fi
exec "$environment"/bin/vllm serve "$folder" "$@"
