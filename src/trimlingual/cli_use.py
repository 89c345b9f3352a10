"""The command line of what a finished model is used with: parse, call one function. No logic."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimlingual.recipe import load_recipe
from trimlingual.run.extras import need
from trimlingual.run.processes import is_main_process, num_processes
from trimlingual.run.progress import say

app = typer.Typer()


@app.command(epilog="Example: trimlingual serve runs/my/exported --to de")
def serve(
    model: Annotated[str, typer.Argument(help="Model folder, Hub id or builtin:mini.")],
    to: Annotated[
        list[str] | None, typer.Option("--to", help="Target language; can be repeated. Default: all of the model.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but this machine's own needs a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    token_file: Annotated[
        Path | None,
        typer.Option("--token-file", help="File with the token. Default: TRIMLINGUAL_TOKEN of the environment."),
    ] = None,
    max_mb: Annotated[float, typer.Option("--max-mb", min=0.001, help="Largest upload.")] = 100.0,
    max_minutes: Annotated[float, typer.Option("--max-minutes", min=0.01, help="Longest recording.")] = 120.0,
    at_once: Annotated[
        int, typer.Option("--at-once", min=1, help="Translations under way at a time; more are told to wait.")
    ] = 100,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that a translation may take.")] = 600.0,
    second_tries: Annotated[
        bool,
        typer.Option(
            "--second-tries/--no-second-tries",
            help="Decode faulty answers again, while others wait; or mark them only.",
        ),
    ] = True,
    recipe: Annotated[
        str | None,
        typer.Option(help="Recipe whose prompt and decoding settings are used; default: those of the folder."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
) -> None:
    """Serve a model over HTTP, with the routes of the well-known speech API.

    \f
    So many parameters because they are the command's options.
    """
    need("serve", "serve")
    from trimlingual.app import serve as serving
    from trimlingual.app.server import Limits

    if not alone("serve"):
        return
    token = serving.read_token(token_file)
    limits = Limits(int(max_mb * 1e6), max_minutes * 60, at_once, timeout)
    settings = load_recipe(recipe) if recipe else None
    serving.serve(model, to, settings, device, (host, port), limits, token, second_tries)


def alone(verb: str) -> bool:
    """Whether this process is to do what one process does; says so where there are more."""
    if is_main_process() and num_processes() > 1:
        say(f"{verb}: the main process works; the other {num_processes() - 1} have nothing to do")
    return is_main_process()
