"""Files damaged at random, a few hundred of them; damaged_files.py tries as many as are wanted."""

import pytest
from damaged_files import complaints

CASES = {"convert": 200, "from_pretrained": 100, "prepare_data": 150, "generate": 30}


@pytest.mark.slow
@pytest.mark.parametrize("command", CASES)
def test_each_is_refused_in_a_sentence_or_read(command, tmp_path):
    wrong, ended = complaints(command, range(CASES[command]), tmp_path)
    assert not wrong
    assert ended["refused"] and ended["fine"]
