#!/usr/bin/env bash
# Installs Transformer Engine and Megatron-Bridge into .venv-nvidia and runs the tests that need
# them; no GPU is needed. Usage: bash tests/nvidia.sh [PYTEST ARGUMENTS]
# Transformer Engine's torch extension is compiled on the way (some 15 minutes), unless
# PIP_FIND_LINKS names a folder with a wheel of it.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=.venv-nvidia
constraints=tests/nvidia-constraints.txt
. examples/environment.sh
enter_environment

install() {
    python -m pip install --quiet --constraint "$constraints" "$@"
}

stamp=.venv-nvidia/.installed-$(cat "$constraints" "$0" | cksum | cut -d' ' -f1)
if [ ! -e "$stamp" ]; then
    echo "Installing Transformer Engine and Megatron-Bridge (several minutes the first time)..."
    install pytest ninja pybind11 wheel 'setuptools>=77'
    install torch
    # Its torch extension must see the torch that is installed here, and CUDA's headers, of which
    # torch brings all but these two packages. A wheel that pip keeps may be of another torch.
    cuda=$(python -c 'import torch; print(torch.version.cuda)')
    install "nvidia-cuda-crt==$cuda.*" "nvidia-cuda-cccl==$cuda.*"
    CPATH=$(printf '%s\n' "$PWD/$environment"/lib/python3*/site-packages/nvidia/*/include | paste -sd:) \
        install --no-cache-dir --no-build-isolation 'transformer-engine[core-cu13,pytorch]'
    # Without its dependencies: they want a GPU or a newer glibc, and the tests use none of those.
    install --no-deps megatron-bridge
    install hydra-core omegaconf rich datasets peft einops transformers \
        'megatron-energon[av-decode]' multi-storage-client tensorboard diffusers nvidia-modelopt
    # Bridge's training loop asks for nvidia-resiliency-ext 0.6, whose wheels need a newer glibc than
    # many machines have. The tests use none of it but its presence, so an older one passes for it.
    install --no-deps nvidia-resiliency-ext==0.4.1
    install defusedxml
    folder=$(python -c 'import nvidia_resiliency_ext as package; print(*package.__path__)')
    echo '__version__ = "0.6.0"' > "$folder/__init__.py"
    touch "$stamp"
fi
if [ $# -eq 0 ]; then
    # By name, because the other tests' files import what only tests/run.sh installs.
    mapfile -t files < <(grep -rlE 'mark\.(transformer_engine|bridge)' --include='test_*.py' tests)
    set -- -m "transformer_engine or bridge" "${files[@]}"
fi
exec python -m pytest "$@"
