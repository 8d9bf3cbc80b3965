"""The provider: whose word counts, and that it refuses what the layers would ignore."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from needs_bridge import needs_bridge

pytestmark = [pytest.mark.bridge, needs_bridge]


def test_what_is_set_comes_before_the_environment_and_that_before_the_size():
    program = Path(__file__).parent / "provider_values.py"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(program)], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-4000:]
    printed = json.loads(run.stdout.splitlines()[-1])
    assert printed["found"] == {
        **{"chunk_size": 32, "cema_ndim": 4},
        **{"z_dim": 128, "norm_num_groups": 32},
    }
    refused = printed["refused"]
    assert refused["kv_channels"].startswith("kv_channels is 8, but Megalodon's attention is")
    assert refused["num_query_groups"].startswith("num_query_groups is 3, but Megalodon's")
    assert refused["mtp_num_layers"].startswith("mtp_num_layers is 1, but Bridge's conversion")
    assert refused["qk_layernorm"].startswith("--qk-layernorm is set, but Megalodon's attention")
