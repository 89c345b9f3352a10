"""Many files are described by several processes, and as one process describes them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from trimlingual.data.audio import DataError, inspect_audio
from trimlingual.data.inspection import CHUNK, inspect_all
from trimlingual.data.rows import MINI_DATA

CLIPS = sorted(MINI_DATA.rglob("*.ogg"))[: 2 * CHUNK + 3]


def test_several_processes_find_what_one_finds(tmp_path):
    (tmp_path / "empty.wav").touch()
    paths = [*CLIPS, tmp_path / "empty.wav", tmp_path / "missing.wav"]
    for found, path in zip(inspect_all(paths, num_processes=2), paths, strict=True):
        alone = inspect_audio(path)
        if isinstance(alone, DataError):
            assert isinstance(found, DataError)
            assert str(found) == str(alone)
            continue
        assert vars(found).keys() == vars(alone).keys()
        assert all(np.array_equal(getattr(found, name), value) for name, value in vars(alone).items())


def test_a_script_without_a_guard_is_not_run_again(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; from pathlib import Path; from trimlingual.data.inspection import inspect_all; "
        "print(len(list(inspect_all([Path(name) for name in sys.argv[1:]], num_processes=2))), 'found')"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, script, *CLIPS], capture_output=True, text=True, env=environment)
    assert done.stdout == f"{len(CLIPS)} found\n", done.stderr


def test_a_process_that_ends_is_said_with_its_files(monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(DataError, match=rf"ended \(exit code 1\) among the {CHUNK} files from {CLIPS[0]} to") as caught:
        list(inspect_all(CLIPS, num_processes=2))
    assert "take the file out" in str(caught.value)


def test_what_is_left_is_not_waited_for():
    results = inspect_all(CLIPS * 40, num_processes=2)
    assert next(results)
    results.close()  # ends the processes, or would hang


def test_no_file_is_no_work():
    assert list(inspect_all([])) == []
