"""Files damaged at random, a few hundred of them; damaged_files.py tries as many as are wanted."""

import subprocess
import sys
from pathlib import Path

import pytest

CASES = {"convert": 200, "from_pretrained": 100, "prepare_data": 150, "generate": 8}


@pytest.mark.slow
@pytest.mark.parametrize("command", CASES)
def test_each_is_refused_in_a_sentence_or_read(command):
    program = Path(__file__).with_name("damaged_files.py")
    result = subprocess.run(
        [sys.executable, program, "--cases", str(CASES[command]), "--only", command],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    assert "'refused': " in result.stdout and "'fine': " in result.stdout
