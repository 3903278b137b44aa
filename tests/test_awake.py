"""The example that keeps cores awake: what runs beside the command, and that it ends with it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

AWAKE = Path(__file__).resolve().parent.parent / "examples" / "awake.py"

pytestmark = pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="only Linux has idle priority")

# Waits until its children have the scheduling that is expected, then prints them, and ends.
COMMAND = """
import json, os, pathlib, sys, time
children = pathlib.Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
for _ in range(500):
    found = [int(child) for child in children.read_text().split()]
    if all(os.sched_getscheduler(child) == os.SCHED_IDLE for child in found):
        break
    time.sleep(0.02)
print(json.dumps([(child, os.sched_getscheduler(child), sorted(os.sched_getaffinity(child))) for child in found]))
sys.exit(7)
"""


def test_each_core_gets_an_idle_process_that_ends_with_the_command():
    done = subprocess.run([sys.executable, AWAKE, sys.executable, "-c", COMMAND], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (7, "")
    found = json.loads(done.stdout)
    assert [policy for _, policy, _ in found] == [os.SCHED_IDLE] * len(os.sched_getaffinity(0))
    assert sorted(cores for *_, cores in found) == [[core] for core in sorted(os.sched_getaffinity(0))]
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{child}").exists() for child, *_ in found):
        assert time.monotonic() < deadline, "a process spins on"
        time.sleep(0.02)


def test_a_command_that_cannot_run_is_named():
    done = subprocess.run([sys.executable, AWAKE, "no-such-command"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "no-such-command cannot be run (No such file or directory)" in done.stderr
