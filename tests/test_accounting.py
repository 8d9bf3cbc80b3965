"""The named sizes have the listed parameter counts."""

import pytest

from megalodon_mcore.accounting import ModelShape, total_parameters
from megalodon_mcore.config import SIZES

LISTED = {
    "200m": 220_627_968,
    "1.3b": 1_342_832_640,
    "1.3b-pg19": 1_327_628_288,
    "7.1b": 7_117_381_632,
    "7.3b": 7_385_817_088,
    "7b-paper": 7_385_817_088,
}


@pytest.mark.parametrize("name", SIZES)
def test_named_sizes_have_the_listed_parameter_counts(name):
    assert total_parameters(ModelShape.of(SIZES[name], 32_000)) == LISTED[name]
