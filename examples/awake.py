"""Keeps the processor's cores awake while a command runs, for a short tail of latency:

    python examples/awake.py python examples/serve.py --requests 1000
    taskset -c 0-7 python examples/awake.py python examples/serve.py    # on these cores alone

A core with nothing to do goes to sleep, and waking it takes its time, most of all in a virtual machine, where the host
gives the core away meanwhile. A program that waits for a GPU sleeps and wakes a few times a call. Here a process of the
lowest priority (SCHED_IDLE) spins on every core that the command may run on: it leaves the core to whatever else wants
it at once, and ends with the command. The price is power, and on a shared machine its neighbours' share of the cores.
Without a command the cores are kept awake until the program is stopped. Linux only.
"""

from __future__ import annotations

import os
import select
import signal
import sys


def spin(core: int, owner: int) -> None:
    """Keeps one core busy with what nobody else wants of it, until the process of the file descriptor `owner` ends."""
    os.sched_setaffinity(0, {core})
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    while not select.select([owner], [], [], 0)[0]:
        pass


def start(core: int, owner: int) -> None:
    """Starts a process that spins, as no child of this one: the command may wait for all its children."""
    child = os.fork()
    if child != 0:
        os.waitpid(child, 0)
        return
    if os.fork() == 0:
        try:
            spin(core, owner)
        except OSError as error:
            print(f"awake.py: core {core} may sleep: {error.strerror}", file=sys.stderr)
    os._exit(0)


def main(command: list[str]) -> None:
    """Starts a spinning process a core, then becomes the command."""
    if not hasattr(os, "pidfd_open"):
        sys.exit("error: awake.py needs Linux and its process file descriptors (5.3 or newer)")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends all quietly
    owner = os.pidfd_open(os.getpid())
    for core in os.sched_getaffinity(0):
        start(core, owner)
    if not command:
        signal.pause()
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"error: {command[0]} cannot be run ({error.strerror}); give a command as you would without awake.py")


if __name__ == "__main__":
    main(sys.argv[1:])
