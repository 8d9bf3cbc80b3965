"""The table's axes of tensor parallelism against what the model's parameters say of themselves."""

import pytest

from building import build
from megalodon_mcore.parameters import LAYER_PREFIXES, LAYER_ROWS, MODEL_ROWS
from megalodon_mcore.planning.layout import ParallelLayout
from megalodon_mcore.planning.rank import fake_rank


@pytest.mark.parametrize("heads", [1, 2], ids=["shared-head", "own-heads"])
def test_the_table_knows_how_tensor_parallelism_cuts(heads):
    table = {row.mcore: row.tp for row in MODEL_ROWS}
    table |= {
        f"{LAYER_PREFIXES['mcore']}0.{row.mcore}": row.tp for row in LAYER_ROWS if "M" in row.layers
    }
    with fake_rank(ParallelLayout(seq_length=64, tp=2)):
        model, _ = build(
            dict(num_heads=heads, rescale_nffn=True),
            heads=2,
            num_layers=1,
            swiglu=True,
            tensor_model_parallel_size=2,
        )
        cut = {
            name: axis if (axis := getattr(parameter, "partition_dim", -1)) >= 0 else None
            for name, parameter in model.named_parameters()
        }
    assert cut == table
