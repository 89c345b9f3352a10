"""Real processes of the command line that start in a moment: a server imports the libraries once, and every process is a fork of it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["trimlingual.stages.finetune", "trimlingual.stages.quantize", "trimlingual.stages.rank"])


class Command:
    """`trimlingual` with these words, in one process or in several that work together.

    These get the variables that torchrun sets, and are ended as torchrun ends them. What they print is kept in files of `folder`.
    `command_line` is the module whose `main` they call.
    """

    def __init__(
        self,
        words: Sequence[str],
        folder: Path,
        processes: int = 1,
        environment: Mapping[str, str] | None = None,
        command_line: str = "trimlingual.cli",
    ) -> None:
        self._said = [(folder / f"stdout.{rank}", folder / f"stderr.{rank}") for rank in range(processes)]
        variables = dict(environment or {})
        port = free_port()
        self._processes = []
        for rank, said in enumerate(self._said):
            for path in said:
                path.touch()  # a process may be ended before it opens them
            if processes > 1:
                numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                numbers["MASTER_PORT"] = port
                variables |= {"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}}
            self._processes.append(FORKS.Process(target=_main, args=(list(words), said, variables, command_line)))
            self._processes[-1].start()

    def until(self, there: Callable[[], object], seconds: float = 120) -> None:
        """Wait until something is there; AssertionError if a process ends before."""
        deadline = time.monotonic() + seconds
        while not there():
            assert all(process.is_alive() for process in self._processes), self.stderr()
            assert time.monotonic() < deadline, f"not there after {seconds} s"
            time.sleep(0.002)

    def send_signal(self, number: int) -> None:
        """To every process that has not ended."""
        for process in self._processes:
            if process.is_alive():
                with suppress(ProcessLookupError):  # it has ended, and the server of forks has not said so yet
                    os.kill(process.pid, number)

    def kill(self) -> int:
        """`kill -9` of all; as `wait`."""
        self.send_signal(signal.SIGKILL)
        return self.wait()

    def wait(self, seconds: float = 120) -> int:
        """Exit code of the first process (negative: the signal that ended it), once all have ended; one that fails ends the others."""
        deadline = time.monotonic() + seconds
        while any(process.is_alive() for process in self._processes):
            assert time.monotonic() < deadline, f"still running after {seconds} s"
            if any(process.exitcode for process in self._processes):
                self.send_signal(signal.SIGTERM)
            time.sleep(0.01)
        return self._processes[0].exitcode

    def succeed(self) -> None:
        """Wait for an end without error."""
        assert self.wait(300) == 0, self.stderr()

    def stdout(self) -> str:
        """What all have printed."""
        return "".join(out.read_text(encoding="utf-8") for out, _ in self._said)

    def stderr(self) -> str:
        """What all have said beside."""
        return "".join(err.read_text(encoding="utf-8") for _, err in self._said)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _main(words: list[str], said: tuple[Path, Path], variables: dict[str, str], command_line: str) -> None:
    for descriptor, path in zip((1, 2), said):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), descriptor)
    os.environ.update(variables)
    sys.argv = ["trimlingual", *words]
    import_module(command_line).main()
