#!/usr/bin/env bash
# Runs what touches Megatron (specs, layouts, resharding, resume, the stock script) with the
# megatron package of a Megatron-LM checkout, such as its main, in front of the installed one.
# Usage: bash tests/megatron_main.sh CHECKOUT [PYTEST ARGUMENTS]
# As Megatron's scripts do, it compiles the dataset helpers there: make and a C++ compiler are needed.
set -euo pipefail
if [ ! -d "${1:-}/megatron/core" ]; then
    echo "Usage: bash tests/megatron_main.sh CHECKOUT [PYTEST ARGUMENTS]; CHECKOUT is '${1:-}'," \
        "which has no megatron/core." >&2
    exit 2
fi
checkout=$(realpath "$1")
shift
cd "$(dirname "$0")/.."
. examples/environment.sh
enter_environment test

# Beside the environment, which nothing else needs it in.
pybind11="$environment"/pybind11
[ -d "$pybind11" ] || python -m pip install --quiet --no-deps --target "$pybind11" pybind11
export PYTHONPATH="$checkout:$PWD:$PWD/$pybind11${PYTHONPATH:+:$PYTHONPATH}"
export MEGATRON_LM_PATH="$checkout"
make --quiet -C "$checkout"/megatron/core/datasets

python - "$checkout" <<'EOF'
import subprocess, sys
import megatron.core
from megatron.core.package_info import __version__
assert megatron.core.__file__.startswith(sys.argv[1]), megatron.core.__file__
commit = ["git", "-C", sys.argv[1], "log", "-1", "--format=%H of %cs"]
print(f"megatron.core {__version__}:", subprocess.run(commit, capture_output=True, text=True).stdout)
EOF
if [ $# -eq 0 ]; then
    set -- -m "not transformer_engine and not bridge" \
        tests/test_options.py tests/test_spec.py tests/layers tests/distributed tests/training
fi
exec python -m pytest "$@"
