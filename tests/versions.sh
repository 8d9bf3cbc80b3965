#!/usr/bin/env bash
# Runs the quick tests with the oldest versions that setup.py takes, or with the newest there are.
# Usage: bash tests/versions.sh oldest|newest [PYTEST ARGUMENTS]
set -euo pipefail
cd "$(dirname "$0")/.."
which=${1:-}
case "$which" in
    oldest) constraints=tests/oldest-constraints.txt ;;
    newest) constraints=/dev/null ;;
    *)
        echo "Usage: bash tests/versions.sh oldest|newest [PYTEST ARGUMENTS]" >&2
        exit 2
        ;;
esac
shift
environment=.venv-$which
. examples/environment.sh
enter_environment test
install_oldest_triton
exec python -m pytest "$@"
