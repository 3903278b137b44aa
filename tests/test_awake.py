"""The example that keeps cores awake: what runs beside the command, and that it ends with it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

AWAKE = Path(__file__).resolve().parent.parent / "examples" / "awake.py"

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="only Linux has idle priority")

# Says what spins beside it once all do, waits for all its children, of which there are none, and ends.
COMMAND = """
import json, os, pathlib, sys, time

def spinning():
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            arguments, pid = (folder / "cmdline").read_bytes().split(b"\\0"), int(folder.name)
            if sys.argv[1].encode() in arguments and pid != os.getpid():
                yield pid, os.sched_getscheduler(pid), sorted(os.sched_getaffinity(pid))
        except (FileNotFoundError, ProcessLookupError):
            pass

for _ in range(500):
    found = list(spinning())
    if [policy for _, policy, _ in found] == [os.SCHED_IDLE] * len(os.sched_getaffinity(0)):
        break
    time.sleep(0.02)
try:
    os.wait()
except ChildProcessError:
    print(json.dumps(found))
sys.exit(7)
"""


def test_each_core_gets_an_idle_process_that_ends_with_the_command(tmp_path):
    mark = str(tmp_path)
    arguments = [sys.executable, AWAKE, sys.executable, "-c", COMMAND, mark]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (7, "")
    found = json.loads(done.stdout)
    assert [policy for _, policy, _ in found] == [os.SCHED_IDLE] * len(os.sched_getaffinity(0))
    assert sorted(cores for *_, cores in found) == [[core] for core in sorted(os.sched_getaffinity(0))]
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid, *_ in found):
        assert time.monotonic() < deadline, "a process spins on"
        time.sleep(0.02)


def test_a_command_that_cannot_run_is_named():
    done = subprocess.run([sys.executable, AWAKE, "no-such-command"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "no-such-command cannot be run (No such file or directory)" in done.stderr
