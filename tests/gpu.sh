#!/usr/bin/env bash
# Proves and times everything on one GPU: bash tests/gpu.sh [--minutes 12] [--out DIR] [--wheels DIR]
# Runs from a bare checkout with Python 3.12, torch and Triton, by the python3 on PATH or $PYTHON.
# --wheels names a folder with a wheel of megatron-core, which the training steps need. What needs
# Transformer Engine or vLLM runs where python3 can import them.
# --rehearse does all of it small and without a GPU, with the oldest Triton, and prints no times.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
modules=tests/gpu:tests/kernels:tests/serving:tests:examples/benchmarks
if [[ " $* " == *" --rehearse "* ]]; then
    . examples/environment.sh
    if [ -z "${PYTHON:-}" ]; then
        enter_environment test
        python=python
    fi
    install_oldest_triton
    modules=$modules:$environment/triton-oldest
fi
# The package as it is installed, with kernels/ in it.
package=$(mktemp -d)
trap 'rm -rf "$package"' EXIT
mkdir "$package"/megalodon_mcore
ln -s "$PWD"/megalodon_mcore/* "$PWD"/kernels "$package"/megalodon_mcore/
MEGALODON_COMMIT=$(git rev-parse --short HEAD 2>/dev/null || true)
# Without the working folder, whose megalodon_mcore/ lacks them.
export PYTHONSAFEPATH=1 MEGALODON_COMMIT PYTHONPATH="$package:$modules${PYTHONPATH:+:$PYTHONPATH}"
"$python" -m run_stages "$@"
