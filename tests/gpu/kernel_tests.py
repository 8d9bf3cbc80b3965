"""The kernels' own tests, on the card: MEGALODON_TEST_DEVICE=cuda pytest tests/kernels.

A rehearsal runs some of them on the CPU, where the test suite runs the rest.
"""

import os
from importlib.util import find_spec

from stage import ROOT, Stage


class Rows:
    """A plugin of pytest that adds each test's outcome as soon as it is known."""

    def __init__(self, stage):
        self.stage = stage

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.removeprefix("tests/kernels/")
        if report.failed:
            message = str(report.longrepr).strip().splitlines()[-12:]
            self.stage.add(name, "fail", problem=" | ".join(message)[-500:])
        elif report.skipped:
            self.stage.add(name, "missing", problem=str(report.longrepr)[-200:])
        elif report.when == "call":
            self.stage.add(name, "pass")

    def pytest_collectreport(self, report):
        if report.failed:
            self.pytest_runtest_logreport(report)


def main(stage):
    if not find_spec("pytest"):
        stage.add("pytest", "missing", problem="pytest is not installed")
        return
    import pytest

    os.chdir(ROOT)
    arguments = ["-q", "-p", "no:cacheprovider", "-m", ""]
    if stage.rehearse:
        arguments += ["tests/kernels/test_dispatch.py", "tests/kernels/test_query_key.py"]
        arguments += ["-k", "not triton"]
    else:
        os.environ["MEGALODON_TEST_DEVICE"] = "cuda"
        arguments += ["tests/kernels"] + (["-n", "8"] if find_spec("xdist") else [])
    pytest.main(arguments, plugins=[Rows(stage)])


if __name__ == "__main__":
    main(Stage.from_arguments())
