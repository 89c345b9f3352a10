"""Damage drawn at random, each case from its own seed, and what may come of it: a right result, or an error of ours."""

from __future__ import annotations

import json
import random
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trimlingual
from trimlingual.run.artifacts import hash_file

PACKAGE = Path(trimlingual.__file__).parent


# Cases of each test. Their sum is part of what is promised: at least 1,000.
COUNTS = {
    "recipe text": 250, "recipe structure": 300, "overrides": 200, "manifest": 300, "tables": 150, "audio": 400, "run folder": 240,
    "command line": 40,
}  # fmt: skip


TEXTS = [
    "", " ", "\0", "\u2028", "a\u2028b", "\u0085", "\ufeff", "e\u0301", "\U0001f3a7", "x" * 300, "x" * 5000, "../../up", "/dev/zero",
    "/",    ".", "~", "no", "3e-4", "1_000", "{}", "[", "{language", "{0}", "%s", "null", "\ud800", "a\nb", "a\rb", "C:\\x", "http://x/y",
]  # fmt: skip


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def odd_value(rng: random.Random) -> Any:
    """A value nobody asked for, of any kind JSON and YAML know."""
    return rng.choice(
        [
            lambda: rng.choice([None, True, False]),
            lambda: rng.choice([0, -1, 1, 2, 10**9, -(10**30), 10**400]),
            lambda: rng.choice([0.0, -0.5, 1e308, float("nan"), float("inf"), 3e-4]),
            lambda: rng.choice([[], {}, [[]], {"a": {"b": None}}, ["de", "de"], {"": ""}, {"kind": "hub"}]),
            lambda: nested(rng.choice([3, 50, 120])),
            lambda: rng.choice(TEXTS),
        ]
    )()


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a structure."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in [(value, key), *places(value[key])]]


def mutate_structure(rng: random.Random, value: Any) -> Any:
    """A copy with one to three values changed, taken out, doubled or renamed."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 3)):
        found = places(value)
        if not found:
            return odd_value(rng)
        container, key = rng.choice(found)
        kind = rng.randrange(5)
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[rng.choice(TEXTS)] = container.pop(key)
        elif kind == 2:
            container[key] = rng.choice(found)[0]
            if key in container and container[key] is container:
                container[key] = None
            value = json.loads(json.dumps(value, default=str)) if not cyclic(value) else None
        else:
            container[key] = odd_value(rng)
            if len(json.dumps(value, default=str)) > 200_000:
                return value
    return value


def cyclic(value: Any) -> bool:
    try:
        json.dumps(value, default=str)
    except (ValueError, RecursionError):
        return True
    return False


def mutate_bytes(rng: random.Random, data: bytes, within: int | None = None) -> bytes:
    """A few bytes flipped, put in, taken out or cut off; `within` the first so many."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not changed:
            break
        at = rng.randrange(min(within or len(changed), len(changed)))
        kind = rng.randrange(7)
        if kind == 0:
            changed[at] = rng.randrange(256)
        elif kind == 1:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            changed[at:at] = rng.choice(
                [b"\0", b"\xff", b"\xe2\x80\xa8", b"\xc2\x85", b"\n", b"\t", b'"', b"{", b": ", b"&a *a"]
            )
        elif kind == 3:
            del changed[at : at + rng.choice([1, 2, 8, 40])]
        elif kind == 4:
            changed[at : at + 4] = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\1\0\0\0"])
        elif kind == 5:
            changed += changed[at : at + rng.randrange(1, 200)]
        else:
            del changed[at:]
    return bytes(changed)


def mutate_text(rng: random.Random, text: str) -> bytes:
    """Lines moved, doubled, indented or taken out; odd text put in; another encoding; bytes changed."""
    lines = text.split("\n")
    for _ in range(rng.randint(0, 3)):
        at = rng.randrange(len(lines))
        kind = rng.randrange(6)
        if kind == 0:
            lines.insert(rng.randrange(len(lines)), lines[at])
        elif kind == 1 and len(lines) > 1:
            del lines[at]
        elif kind == 2:
            lines[at] = " " * rng.randrange(4) + lines[at]
        elif kind == 3:
            cut = rng.randrange(len(lines[at]) + 1)
            lines[at] = lines[at][:cut] + rng.choice(TEXTS) + lines[at][cut:]
        elif kind == 4:
            lines[at] = rng.choice(
                [
                    "!!python/object/apply:os.getcwd []",
                    "&a [*a]",
                    "<<: *a",
                    "1" * 5000,
                    "x: 2020-13-45",
                    "[" * 600,
                    "a: b: c",
                ]
            )
        else:
            lines[at] = lines[at].replace(": ", rng.choice([":", " : ", ": !!binary ", ": &x ", ": ["]))
    data = "\n".join(lines).encode(rng.choice(["utf-8"] * 6 + ["utf-16", "utf-8-sig", "utf-32"]), "surrogatepass")
    return mutate_bytes(rng, data) if rng.random() < 0.4 else data


def is_ours(error: BaseException) -> bool:
    """Whether this package raised the error itself, with a message, as one the user can act on."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    raised_here = last is not None and Path(last.tb_frame.f_code.co_filename).is_relative_to(PACKAGE)
    return isinstance(error, ValueError) and raised_here and bool(str(error).strip())


FOUND: list[str] = []


@contextmanager
def failing(what: str, seed: int, shown: Any) -> Iterator[None]:
    """An error of ours is right; any other is a finding, with the seed of its case."""
    try:
        yield
    except Exception as error:
        if not is_ours(error):
            FOUND.append(
                f"{what}, seed {seed}: {type(error).__name__}: {str(error)[:200]}; {_where(error)}; case {repr(shown)[:400]}"
            )


def _where(error: BaseException) -> str:
    """The last line of ours on the way to an error."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(PACKAGE)]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "in the test"


def cases(what: str) -> Iterator[tuple[int, random.Random]]:
    for seed in range(COUNTS[what]):
        yield seed, random.Random(f"{what} {seed}")


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder with its hash."""
    return {
        path.relative_to(folder).as_posix(): hash_file(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }
