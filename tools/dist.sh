#!/usr/bin/env bash
# Build sdist and wheel into dist/; install the wheel in a fresh environment outside the checkout and run the built-in recipe there.
# Usage: tools/dist.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD python=${1:-python3}
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
pip() { "$1" -m pip install --quiet --disable-pip-version-check --constraint "$root/constraints.txt" "${@:2}"; }

rm -rf dist
"$python" -m venv "$room/builder"
pip "$room/builder/bin/python" build
"$room/builder/bin/python" -m build --outdir dist .  # the wheel is built from the sdist, which is whole then
ls -l dist

"$python" -m venv "$room/fresh"
pip "$room/fresh/bin/python" torch
pip "$room/fresh/bin/python" dist/*.whl
cd "$room"
"$room/fresh/bin/trimlingual" --version
"$room/fresh/bin/trimlingual" compress mini --run-dir run
"$room/fresh/bin/trimlingual" translate run/exported "$("$room/fresh/bin/python" -c 'from trimlingual.data.rows import MINI_DATA; print(MINI_DATA / "test" / "0000.ogg")')" --to de
