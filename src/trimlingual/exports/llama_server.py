"""Run as a script in a fresh process: llama.cpp's server, by the package xllamacpp, until standard input ends.

python -P llama_server.py TEXT.gguf MMPROJ.gguf|"" PORT CONTEXT
"""

import sys

import xllamacpp


def main() -> None:
    """Serve two GGUF files, or a text model alone, on a port of this machine."""
    text, mmproj, port, context = sys.argv[1:]
    params = xllamacpp.CommonParams()
    params.model.path, params.mmproj.path, params.port = text, mmproj, int(port)
    params.n_ctx, params.n_parallel, params.use_jinja, params.warmup = int(context), 1, True, False
    server = xllamacpp.Server(params)
    sys.stdin.read()
    del server


if __name__ == "__main__":
    main()
