"""Runs a check on somebody else's code: in a process of its own, with limits, in a temporary folder.

Nothing outside that folder can be written, no process started, no connection made; `input()` finds
the end of its input and `time.sleep` does not wait.
"""

import contextlib
import io
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from .report import CANNOT_RUN, Verdict

CPU_SECONDS = 15  # of one check
WALL_SECONDS = 30
CALL_SECONDS = 3  # of CPU, in one call of a student's function
SPARE_MEMORY = 2**30  # bytes that a check may take

FORBIDDEN = {
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.startfile",
    "os.kill", "os.killpg", "pty.spawn", "socket.connect", "socket.bind", "socket.getaddrinfo", "urllib.Request",
}  # fmt: skip
WRITING = {
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
    "os.utime", "shutil.rmtree", "shutil.move", "shutil.copyfile", "shutil.copytree", "shutil.copymode",
    "sqlite3.connect", "shutil.copystat", "shutil.make_archive", "shutil.unpack_archive",
}  # fmt: skip


class TookTooLong(BaseException):
    """A call of a student's function has used up its time; no `except Exception` of theirs catches it."""


def guard_against_writing(folder: str) -> None:
    """From now on this process cannot write outside `folder`, nor start processes or connections."""
    inside = os.path.realpath(folder) + os.sep

    def refuse_outside(path) -> None:
        if isinstance(path, int):
            return
        real = os.path.realpath(os.fsdecode(path))
        if not (real + os.sep).startswith(inside) and real != os.path.realpath(os.devnull):
            raise PermissionError(f"the marker lets nothing be written outside its temporary folder: {real}")

    def hook(event, args):
        if event in FORBIDDEN:
            raise PermissionError(f"the marker does not allow {event}")
        if event == "open" and args[0] is not None:
            mode, flags = args[1], args[2] or 0
            if (isinstance(mode, str) and set(mode) & set("wax+")) or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                refuse_outside(args[0])
        elif event in WRITING:
            for path in args[:2]:
                if isinstance(path, (str, bytes, os.PathLike)):
                    refuse_outside(path)

    sys.addaudithook(hook)


def limit_resources(cpu: float) -> None:
    """Limit CPU time and memory, where the system offers it."""
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_CPU, (int(cpu) + 1, int(cpu) + 2))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + SPARE_MEMORY,) * 2)


@contextlib.contextmanager
def time_limit(seconds: float = CALL_SECONDS):
    """Raise TookTooLong inside when `seconds` of CPU time are used, again and again if that is caught."""
    if not hasattr(signal, "SIGPROF"):
        yield
        return

    def stop(*_):
        raise TookTooLong

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds, 0.5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


@contextlib.contextmanager
def captured():
    """Catch what is printed inside; yields the text's buffer."""
    buffer = io.StringIO()
    with contextlib.redirect_stdout(buffer), contextlib.redirect_stderr(io.StringIO()):
        yield buffer


def _child(connection, function, arguments, folder: str, cpu: float) -> None:
    """The life of a check's process: limits, seeds, the check, its answer, the end."""
    import torch

    if hasattr(os, "setsid"):
        os.setsid()  # its own children end with it
    os.chdir(folder)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    sys.dont_write_bytecode = True
    sys.argv = ["marker"]
    time.sleep = lambda seconds: None
    random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    limit_resources(cpu)
    guard_against_writing(folder)
    try:
        with captured():
            answer = function(*arguments)
    except TookTooLong:
        answer = Verdict(CANNOT_RUN, "it does not end")
    except BaseException as error:
        answer = error if isinstance(error, MemoryError) else f"{type(error).__name__}: {error}"
        answer = Verdict(CANNOT_RUN, f"the check was stopped: {answer}")
    connection.send(answer)
    connection.close()
    os._exit(0)  # whatever threads are left


def _context():
    """Processes that start with torch loaded, from a clean server where the system has one."""
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["torch", "torch.nn", "torch.utils.data", f"{__package__}.questions"])
    return context


def _wait(connection, wall: float) -> bool:
    """Wait for an answer; time that this process itself spent suspended does not count."""
    deadline = time.monotonic() + wall
    while (now := time.monotonic()) < deadline:
        if connection.poll(0.5):
            return True
        deadline += max(0.0, time.monotonic() - now - 1.0)
    return connection.poll(0)


def run(function, *arguments, cpu: float = CPU_SECONDS, wall: float = WALL_SECONDS):
    """`function(*arguments)` in a process of its own: its answer, or a Verdict that says why there is none."""
    context = _context()
    with tempfile.TemporaryDirectory(prefix="marker-", ignore_cleanup_errors=True) as folder:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(theirs, function, arguments, folder, cpu), daemon=True)
        process.start()
        theirs.close()
        answer = Verdict(CANNOT_RUN, f"it does not end within {wall:.0f} seconds")
        try:
            if _wait(ours, wall):
                answer = ours.recv()
        except (EOFError, OSError):
            answer = Verdict(CANNOT_RUN, "it ended the process (out of time or memory, or by os._exit)")
        finally:
            if hasattr(os, "killpg"):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join(5)
            ours.close()
        return answer
