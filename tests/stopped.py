"""tp5.py in a process that stops itself within one call: killed, or as by Ctrl-C.

    python tests/stopped.py FUNCTION NUMBER before|after KILL|INT ARGUMENTS-OF-TP5

It stops at call NUMBER of FUNCTION, such as os.replace; of many processes, number 1 alone does. It saves after every
tenth step and not by the clock, so that what it has saved until then is always the same.
"""

import itertools
import os
import pkgutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import textloader
import tp5


def stop(how: str) -> None:
    if how == "INT":
        signal.raise_signal(signal.SIGINT)
    else:
        os.kill(os.getpid(), 9)  # SIGKILL, which Windows has under no name


def stop_within(function: str, number: int, when: str, how: str) -> None:
    """Let this process stop before or after it does what call `number` of a function does."""
    owner, _, name = function.rpartition(".")
    owner = pkgutil.resolve_name(owner)
    real, calls = getattr(owner, name), itertools.count(1)

    def stopping(*arguments, **options):
        now = next(calls) == number
        if now and when == "before":
            stop(how)
        result = real(*arguments, **options)
        if now and when == "after":
            stop(how)
        return result

    setattr(owner, name, stopping)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background has ignored
    function, number, when, how, *arguments = sys.argv[1:]
    sys.argv = ["tp5.py", *arguments]
    tp5.time.perf_counter = itertools.count(step=3).__next__  # a step takes 3 seconds, of the 30 between saves
    if os.environ.get("RANK", "1") == "1":
        stop_within(function, int(number), when, how)
    textloader.guard(tp5.main)
