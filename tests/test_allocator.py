"""Freed memory is reused: a second large allocation takes no new pages."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from megalodon_mcore.allocator import with_large_pages

PROGRAM = """
import resource
from megalodon_mcore.allocator import keep_freed_memory

print(keep_freed_memory())
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
bytearray(64 << 20)
before = faults()
bytearray(64 << 20)
print(faults() - before)
"""
PAGES = (64 << 20) // os.sysconf("SC_PAGE_SIZE")


def run(**environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=kept | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    applied, faults = done.stdout.split()
    return applied == "True", int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_a_second_allocation_takes_no_new_pages():
    applied, faults = run()
    assert applied and faults < PAGES / 100
    applied, faults = run(MALLOC_ARENA_MAX="1")
    assert not applied and faults > PAGES / 2


LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not LARGE_PAGES.exists() or "[never]" in LARGE_PAGES.read_text(),
    reason="the system gives no large pages unless they are reserved",
)
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_large_pages():
    _, faults = run(MALLOC_ARENA_MAX="1", **with_large_pages({}))
    assert faults < PAGES / 10
    assert with_large_pages({"GLIBC_TUNABLES": "mine"}) == {"GLIBC_TUNABLES": "mine"}
