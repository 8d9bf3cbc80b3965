#!/usr/bin/env bash
# Trains a byte-level Megalodon of about 3M parameters on real text, plots it and samples from it.
# Usage: bash examples/quickstart.sh [--text FILE_OR_FOLDER] [--out FOLDER] [--pattern MM*M] ...  (--help for all)
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/environment.sh
enter_environment
exec python examples/quickstart.py "$@"
