"""The wheel, installed where nothing is but what it says it requires, runs the quickstart."""

import json
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from conversion.fresh_environment import make_environment

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_runs_the_quickstart(tmp_path):
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--wheel-dir", tmp_path],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    needed = [text for text in requires("megalodon-mcore") if not is_extra(text)]
    python, _ = make_environment(tmp_path / "env", needed)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    target = subprocess.check_output([python, "-c", code], text=True).strip()
    subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, target], check=True)

    text = tmp_path / "text.txt"
    text.write_text((ROOT / "examples" / "quickstart.py").read_text() * 20)
    words = ["--text", text, "--out", "out", "--iterations", "4"]
    elsewhere = {"cwd": tmp_path, "env": {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}}
    done = subprocess.run(
        [python, ROOT / "examples" / "quickstart.py", *words],
        capture_output=True,
        text=True,
        **elsewhere,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (tmp_path / summary["sample"]).stat().st_size > 100
    where = subprocess.check_output(
        [python, "-c", "import megalodon_mcore.kernels as m; print(m.__file__)"],
        text=True,
        **elsewhere,
    )
    assert Path(where.strip()).is_relative_to(target)


def is_extra(text: str) -> bool:
    marker = Requirement(text).marker
    return marker is not None and "extra" in str(marker)
