"""The command line of what a finished model is used with: parse, call one function. No logic."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from trimlingual.recipe import load_recipe
from trimlingual.run.extras import need
from trimlingual.run.processes import is_main_process, num_processes
from trimlingual.run.progress import say

# How --help groups the verbs.
COMPRESS, USE, LOOK = "Compress a model", "Use a model", "Look at what there is"

app = typer.Typer()
out = Console(width=None if sys.stdout and sys.stdout.isatty() else 160)  # a pipe has no width of its own


@app.command(
    rich_help_panel=USE,
    epilog="Example: trimlingual translate runs/my/exported talk.mp3 --to de --format srt --out-dir subtitles",
)
def translate(
    model: Annotated[str, typer.Argument(help="Model folder, Hub id or builtin:mini.")],
    audio: Annotated[
        list[str], typer.Argument(help="Recordings of any length: files, folders, patterns, or - for standard input.")
    ],
    to: Annotated[list[str], typer.Option("--to", help="Target language; can be repeated.")],
    form: Annotated[
        str, typer.Option("--format", help="json (a line for each recording and language), text, srt or vtt.")
    ] = "json",
    out_dir: Annotated[
        Path | None,
        typer.Option(
            "--out-dir",
            help="Write NAME.LANGUAGE.ENDING there; a run that is stopped goes on. Default: standard output.",
        ),
    ] = None,
    max_seconds: Annotated[
        float | None,
        typer.Option(
            "--max-seconds", min=1.0, help="Longest segment. Default: as the clips that the model was trained on."
        ),
    ] = None,
    pause: Annotated[
        float, typer.Option("--pause", min=0.05, help="Seconds of silence at which a long recording is cut.")
    ] = 0.3,
    recipe: Annotated[
        str | None,
        typer.Option(help="Recipe whose prompt and decoding settings are used; default: those of the folder."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    force: Annotated[
        bool, typer.Option("--force", help="Make files in --out-dir again that this command made from other input.")
    ] = False,
) -> None:
    """Translate recordings of any length: text, JSON with times, or subtitles.

    Exit code 0: all is well; 1: nothing was translated; 3: some could not be read; 4: an answer stayed wrong (docs/translate.md).
    \f
    So many parameters because they are the command's options.
    """
    from trimlingual.app.outputs import translate_to
    from trimlingual.app.segments import Cutting

    if not alone("translate"):
        return
    settings = load_recipe(recipe) if recipe else None
    cutting = Cutting(max_seconds, pause)
    code = translate_to(model, audio, to, settings, device, cutting, form, out_dir, force)
    raise typer.Exit(code)


@app.command(rich_help_panel=USE, epilog="Example: trimlingual serve runs/my/exported --to de")
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


@app.command(rich_help_panel=USE, epilog="Example: trimlingual ui runs/my/teacher runs/my/exported")
def ui(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Model folders, Hub ids or builtin:mini; two stand side by side. Default: the built-in one."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    port: Annotated[int, typer.Option(help="Port on this machine.", min=1, max=65535)] = 7860,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in the browser.")] = False,
) -> None:
    """Show a page on this machine: record or upload, compare two models, download subtitles."""
    from trimlingual.app.page import serve

    serve(models or [], device, port, open_browser)


@app.command(rich_help_panel=USE, epilog="Example: trimlingual push runs/my/exported someone/my-model --dry-run")
def push(
    folder: Annotated[Path, typer.Argument(help="An exported folder.")],
    repo: Annotated[
        str, typer.Argument(help="Model repository on the Hub, as owner/name; it is made if it is not there.")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be sent; send and ask nothing.")] = False,
    private: Annotated[bool, typer.Option("--private", help="A repository that is made is private.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that the repository has already.")] = False,
) -> None:
    """Send an exported folder to the Hub."""
    from trimlingual.app import push as sending

    sending.check_repo(repo)
    files = sending.files_to_send(folder)
    table = Table("file", "bytes", title=f"{folder} to {repo}")
    for file in files:
        table.add_row(file.name, f"{file.num_bytes:,}")
    out.print(table)
    say(f"{len(files)} files, {sum(file.num_bytes for file in files):,} bytes{'; nothing is sent' if dry_run else ''}")
    if not dry_run:
        print(json.dumps({"commit": sending.push(folder, repo, private, force, say)}))


def alone(verb: str) -> bool:
    """Whether this process is to do what one process does; says so where there are more."""
    if is_main_process() and num_processes() > 1:
        say(f"{verb}: the main process works; the other {num_processes() - 1} have nothing to do")
    return is_main_process()
