"""What the layouts are compared with."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from distributed.layouts import Layout, Model
from distributed.training import Run, save_randomized, train


class Single(NamedTuple):
    """A checkpoint of random float32 parameters, and the training of one process from it."""

    start: Path
    run: Run


@pytest.fixture(scope="session")
def single(workers, tmp_path_factory):
    """Gives a model's Single. Models that differ in how they train start from one."""
    starts: dict[Model, Path] = {}
    runs: dict[Model, Run] = {}

    def of(model: Model) -> Single:
        exact = replace(model, bf16=False, dropout=0.0, optimizer="adam")
        if exact not in starts:
            starts[exact] = tmp_path_factory.mktemp("start")
            workers.run(1, save_randomized, exact, starts[exact])
        if model not in runs:
            (runs[model],) = workers.run(1, train, model, Layout(), starts[exact])
        return Single(starts[exact], runs[model])

    return of
