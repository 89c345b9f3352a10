"""bitsandbytes asks the library `kernels`, where it is installed, for code from the Hub. It never gets any."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import trimlingual
from trimlingual.exports import proof_script

OURS = "import trimlingual"
PROOF = f"""
import runpy
try:
    runpy.run_path({proof_script.__file__!r}, run_name="__main__")
except KeyError:  # nothing is asked of it
    pass
"""


@pytest.fixture
def asked(tmp_path):
    """Run a program where a package `kernels` is installed; what was asked of it, and what the program said."""
    package = tmp_path / "installed" / "kernels"
    package.mkdir(parents=True)
    (tmp_path / "installed" / "kernels-0.16.0.dist-info").mkdir()
    (tmp_path / "installed" / "kernels-0.16.0.dist-info" / "METADATA").write_text("Name: kernels\nVersion: 0.16.0\n")
    note = f"open({str(tmp_path / 'asked')!r}, 'a').write"
    (package / "__init__.py").write_text(f"{note}('imported ')\ndef get_kernel(name, **more):\n    {note}(name)\n")

    def run(program: str) -> tuple[str, str]:
        path = [str(package.parent), str(Path(trimlingual.__file__).parents[1])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, input="{}")
        assert not done.returncode, done.stderr
        return (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else "", done.stderr

    return run


@pytest.mark.parametrize("first", [OURS, PROOF])
def test_no_code_is_fetched(asked, first):
    what, said = asked(f"{first}\nimport bitsandbytes, peft\nfrom transformers import Trainer")
    assert not what
    if first == OURS:
        assert "kernels" not in said


def test_a_program_that_uses_kernels_itself_keeps_it(asked):
    what, _ = asked(f"import kernels; {OURS}; import kernels; kernels.get_kernel('by name')")
    assert what == "imported by name"


def test_the_package_would_be_asked(asked):
    """Otherwise the tests above could not fail. Only CPUs that compute in bfloat16 have such code."""
    if "avx512_bf16" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("bitsandbytes has no code on the Hub for this CPU")
    what, _ = asked("import bitsandbytes")
    assert what == "imported kernels-community/quantization-bitsandbytes"
