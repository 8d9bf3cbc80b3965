#!/usr/bin/env bash
# Sets up what the tests need and runs all of them, lint included.
# Usage: bash tests/run.sh [PYTEST ARGUMENTS]; without any, everything that can run here runs.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/environment.sh
enter_environment test
install_oldest_triton
ruff format --check .
ruff check .
pyrefly check
if [ $# -eq 0 ]; then
    # With several processes, a file that cannot be imported is told of at the end alone.
    collected=$(python -m pytest -m "" --collect-only -qq 2>&1) || { echo "$collected" && exit 1; }
    # One more than cores: tests wait for processes of theirs. A file's tests stay together, since
    # they share what took long to make.
    processes=$(($(nproc) < 4 ? $(nproc) + 1 : 4))
    set -- -m "" -n "$processes" --dist loadfile
fi
exec python -m pytest "$@"
