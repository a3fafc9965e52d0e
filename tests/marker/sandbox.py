"""Runs a check on somebody else's code: in a process of its own, with limits, in a temporary folder.

The process answers by a file of JSON, which its parent reads as text and checks: nothing of a student's is
unpickled or called outside. On Linux the kernel (Landlock) lets it write in its temporary folder alone.
"""

import contextlib
import io
import json
import multiprocessing
import os
import random
import secrets
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import torch

CPU_SECONDS = 90  # of one question; a slow machine's
CALL_SECONDS = 3  # of CPU, in one call of a student's function
IDLE = 20  # a limit in seconds of CPU is this many times longer on the clock, for what waits and never works
SPARE_MEMORY = 2**30  # bytes that a check may take
MOST_BYTES = 2**20  # of an answer

# What Landlock does not cover; ctypes goes past this.
FORBIDDEN = {
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.startfile",
    "os.kill", "os.killpg", "pty.spawn", "socket.connect", "socket.bind", "socket.getaddrinfo", "urllib.Request",
    "os.chmod", "os.chown", "os.utime", "os.truncate",
}  # fmt: skip


class TookTooLong(BaseException):
    """A call of a student's function has used up its time; no `except Exception` of theirs catches it."""


class NoAnswer(Exception):
    """A check ended without an answer; the message says why."""


def unprotected() -> str:
    """Why the kernel cannot keep students' code from writing here; "" if it can."""
    try:
        from landlock import landlock_abi_version

        landlock_abi_version()
    except Exception:  # no such package, or no such kernel
        return "no Landlock: it needs Linux 5.13 and `pip install -r tests/requirements.txt`"
    return ""


def protect_files(folder: str) -> None:
    """From now on the kernel lets this process write in `folder` and to /dev/null alone."""
    from landlock import FSAccess, Ruleset

    writing = FSAccess.all() & ~(FSAccess.EXECUTE | FSAccess.READ_FILE | FSAccess.READ_DIR)
    ruleset = Ruleset(writing)
    ruleset.allow(folder, rules=writing & ~(FSAccess.MAKE_CHAR | FSAccess.MAKE_BLOCK))
    ruleset.allow(os.devnull, rules=writing & FSAccess.all_file())
    ruleset.apply()


def leave_network() -> None:
    """Go to a network namespace without connections, where Python (3.12) and the system allow it."""
    if hasattr(os, "unshare"):
        for flags in (os.CLONE_NEWNET, os.CLONE_NEWNET | os.CLONE_NEWUSER):
            with contextlib.suppress(OSError):
                os.unshare(flags)
                return


def refuse(event: str, _) -> None:
    """An audit hook: no processes, signals and connections by Python's own functions."""
    if event in FORBIDDEN:
        raise PermissionError(f"the marker does not allow {event}")


def limit_resources(cpu: int) -> None:
    """Limit CPU time and memory, where the system offers it."""
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + SPARE_MEMORY,) * 2)


@contextlib.contextmanager
def time_limit(seconds: float):
    """Raise TookTooLong inside when `seconds` of CPU time are used, again and again if that is caught."""
    if not hasattr(signal, "SIGPROF"):  # Windows
        yield
        return

    def stop(*_):
        raise TookTooLong

    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds, 0.5)
    signal.setitimer(signal.ITIMER_REAL, IDLE * seconds, 0.5)
    try:
        yield
    finally:
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)


@contextlib.contextmanager
def captured():
    """Catch what is printed inside; yields the text's buffer."""
    with contextlib.redirect_stdout(io.StringIO()) as buffer, contextlib.redirect_stderr(io.StringIO()):
        yield buffer


def attempt(function, *arguments, seconds: float | None = None):
    """Call what runs a student's code: (its result, None), or (None, whatever it raised)."""
    try:
        with captured(), time_limit(seconds or CALL_SECONDS), torch.no_grad():
            return function(*arguments), None
    except BaseException as error:  # students' code calls sys.exit, too
        return None, error


def _child(answer_file: str, function, arguments, cpu: int) -> None:
    """The life of a check's process: limits, seeds, the check, its answer, the end."""
    folder = os.path.dirname(answer_file)
    os.chdir(folder)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    if hasattr(os, "setsid"):
        os.setsid()  # its own children end with it
        os.closerange(3, 4096)  # no file, pipe or terminal of the parent
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    sys.dont_write_bytecode = True
    sys.argv = ["marker"]
    time.sleep = lambda seconds: None
    random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    try:
        limit_resources(cpu)
        if not unprotected():
            protect_files(folder)
        leave_network()
        sys.addaudithook(refuse)
        with captured():
            answer = function(*arguments)
    except BaseException as error:  # the marker's own failure: it accuses nobody
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{os.path.basename(last.filename)}:{last.lineno}"
        answer = {"failed": f"the marker was stopped: {type(error).__name__}: {error} ({place})"[:300]}
    Path(answer_file).write_text(json.dumps(answer), encoding="utf-8")
    os._exit(0)  # whatever threads are left


def read_answer(path: str) -> dict:
    """What a child wrote; NoAnswer if it is no verdict. The file may be anything: a link, a pipe, a gigabyte."""
    special = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        with open(path, "rb", opener=lambda path, flags: os.open(path, flags | special)) as file:
            answer = json.loads(file.read(MOST_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise NoAnswer(f"its process ended without an answer ({type(error).__name__})") from None
    if not isinstance(answer, dict):
        raise NoAnswer("its process answered nonsense")
    if "failed" in answer:
        raise NoAnswer(str(answer["failed"])[:300])
    return answer


def run(function, *arguments, cpu: int = CPU_SECONDS) -> dict:
    """`function(*arguments)`, a dict of plain values, from a process of its own; raises NoAnswer."""
    linux = sys.platform == "linux"  # a fork has torch loaded already; elsewhere it is not safe, or there is none
    context = multiprocessing.get_context("fork" if linux else "spawn")
    with tempfile.TemporaryDirectory(prefix="marker-", ignore_cleanup_errors=True) as folder:
        answer_file = os.path.join(os.path.realpath(folder), secrets.token_hex(16))
        process = context.Process(target=_child, args=(answer_file, function, arguments, cpu), daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks where other threads run: not used here
            process.start()
        deadline = time.monotonic() + IDLE * cpu
        while process.exitcode is None and time.monotonic() < deadline:
            time.sleep(0.01)
        code = process.exitcode
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
        if code is None:
            raise NoAnswer("it waits for something that never comes")
        if code < 0 and signal.Signals(-code).name in ("SIGXCPU", "SIGKILL"):
            raise NoAnswer(f"its {cpu} seconds of CPU time, or its memory, were used up")
        return read_answer(answer_file)
