"""A process that keeps what it frees takes fewer pages from the kernel, and gives them back when it is told to."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

CODE = """
import json, resource
import numpy as np
from pathlib import Path
from probelog.models import memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])

def data():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmData:"))

def work():
    before = faults()
    for _ in range(20):
        np.ones(6_000_000)  # 48 MB
    return faults() - before

kept = {keep} and memory.keep_freed()
work()
found = {{"kept": kept, "faults": work(), "before": resident()}}
memory.give_back()
found["after"] = resident()
memory.keep_nothing()
large = np.ones(6_000_000)
held = data()
del large
print(json.dumps(found | {{"returned": held - data()}}))
"""


def measured(keep: bool) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(keep=keep)], capture_output=True, text=True, check=True
    )
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="no glibc: nothing is kept, which is NOT tested"
)
def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    plain, keeping = measured(False), measured(True)
    assert keeping["kept"]
    assert keeping["faults"] < plain["faults"] / 10
    assert plain["before"] + 40e6 < keeping["before"]
    assert keeping["after"] < keeping["before"] - 40e6
    assert keeping["returned"] > 40e6
