"""What the stages share: their options, their rows, their clock."""

import argparse
import json
import os
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Where a stage's modules are.
MODULES = [str(ROOT / folder) for folder in ("tests/gpu", "tests/kernels", "examples/benchmarks")]

# What a row can be: right or wrong, a figure, not to be had here, or not reached in time.
VERDICTS = ("pass", "fail", "figure", "missing", "cut")


class Stage:
    """A stage's process: it adds rows, each written out at once, and minds the time.

    A row is a JSON object of a line: stage, case, verdict, and what was found.
    """

    def __init__(self, stage, rows, seconds, rehearse, part=""):
        self.name, self.path, self.rehearse, self.part = stage, Path(rows), rehearse, part
        self.deadline = time.monotonic() + seconds

    @classmethod
    def from_arguments(cls):
        parser = argparse.ArgumentParser()
        parser.add_argument("--stage", required=True)
        parser.add_argument("--rows", required=True)
        parser.add_argument("--seconds", type=float, required=True)
        parser.add_argument("--rehearse", action="store_true")
        parser.add_argument("--part", default="")
        return cls(**vars(parser.parse_args()))

    @property
    def device(self):
        return "cpu" if self.rehearse else "cuda"

    @property
    def left(self):
        """Seconds until this stage should have ended."""
        return self.deadline - time.monotonic()

    def add(self, case, verdict, **found):
        assert verdict in VERDICTS
        line = json.dumps({"stage": self.name, "case": case, "verdict": verdict, **found})
        # One write of an appended line: processes side by side do not mix theirs.
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, f"{line}\n".encode())
        os.close(file)

    def attempt(self, case, function, least=0.0):
        """Adds what the function returns (verdict, found), or what it raised, or that time is up.

        least: seconds that it will take at least.
        """
        if self.left < least:
            self.add(case, "cut")
            return
        start = time.monotonic()
        try:
            verdict, found = function()
        except Exception as error:  # whatever it is, the other cases go on
            traceback.print_exc()
            verdict, found = "fail", {"problem": f"{type(error).__name__}: {error}"[:400]}
        # A rehearsal's times mean nothing.
        took = {} if self.rehearse else {"took_s": round(time.monotonic() - start, 2)}
        self.add(case, verdict, **found, **took)
