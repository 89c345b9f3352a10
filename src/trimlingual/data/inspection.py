"""What many sound files hold, on all cores.

Decoding a clip of seconds is a few dozen calls of a fraction of a millisecond, each of which takes the interpreter lock again. Threads
in one interpreter gain nothing, so many clips are shared out to processes. These are started by hand, not by `multiprocessing`, which
would run a user's script again in each of them where it does not stand under `if __name__ == "__main__"`.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue

from trimlingual.data.audio import DataError, Recording, inspect_audio

PER_PROCESS = 250  # files from which a process pays: it starts within a second or so
MOST = 32  # processes; each takes 0.1 GB of memory
CHUNK = 32  # files that a process is given at a time


def inspect_all(
    paths: Sequence[Path], num_processes: int | None = None
) -> Generator[Recording | DataError, None, None]:
    """`inspect_audio` of each path, in their order; by as many processes as there are cores, if that pays.

    DataError if a process ends, as by a fault in a library or for want of memory.
    """
    if num_processes is None:
        num_processes = min(os.cpu_count() or 1, MOST, len(paths) // PER_PROCESS)
    if num_processes < 2:
        with _threads(os.cpu_count()) as pool:
            yield from pool.map(inspect_audio, paths)
        return
    chunks = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]
    idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()

    def ask(chunk: Sequence[Path]) -> list[Recording | DataError]:
        process = idle.get()
        try:
            return _ask(process, chunk)
        finally:
            idle.put(process)

    with ExitStack() as stack:
        for _ in range(num_processes):
            idle.put(stack.enter_context(_process()))
        for answers in stack.enter_context(_threads(num_processes)).map(ask, chunks):
            yield from answers


@contextmanager
def _threads(num: int | None) -> Iterator[ThreadPoolExecutor]:
    """A pool that, when the block ends, does not wait for what has not begun."""
    pool = ThreadPoolExecutor(num)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _process() -> Iterator[subprocess.Popen[bytes]]:
    """A process that serves, until the block ends."""
    path = os.pathsep.join(filter(None, sys.path))
    one_thread = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    process = subprocess.Popen(
        # -P: the folder that the user happens to be in is not on the path
        [sys.executable, "-P", "-c", f"from {__name__} import serve; serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path, **one_thread},
    )
    assert process.stdin
    assert process.stdout
    try:
        yield process
    finally:
        with suppress(OSError):  # it has ended already
            process.stdin.close()
        process.stdout.close()
        process.wait()


def _ask(process: subprocess.Popen[bytes], chunk: Sequence[Path]) -> list[Recording | DataError]:
    assert process.stdin
    assert process.stdout
    try:
        pickle.dump(chunk, process.stdin)
        process.stdin.flush()
        answers: list[Recording | DataError] = pickle.load(process.stdout)
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise DataError(
            f"a process that checks audio ended (exit code {process.wait()}) among the {len(chunk)} files from {chunk[0]} to "
            f"{chunk[-1]}; run again, and if it happens again, take the file out that makes it end"
        ) from error
    return answers


def serve() -> None:
    """The work of a process: lists of paths come in, lists of what the files hold go out, until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the process that asks ends the others
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # what a library prints is no answer
        while True:
            try:
                paths = pickle.load(sys.stdin.buffer)
            except EOFError:
                return
            pickle.dump([inspect_audio(path) for path in paths], answers)
            answers.flush()
