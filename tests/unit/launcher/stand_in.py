"""A process that stands in for ``vllm serve``; run as a script, knows only the standard library.

stand_in.py PORT [--die-before-ready] [--child FILE] [--note FILE NAME] ...
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import FrameType


class Handler(BaseHTTPRequestHandler):
    """Answers 200 to everything."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def serve(host: str, port: int) -> None:
    """Answer until the process ends."""
    ThreadingHTTPServer((host, port), Handler).serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("--die-before-ready", action="store_true")
    parser.add_argument("--die-again", type=Path, help="die at once if this file exists; make it")
    parser.add_argument("--never-ready", action="store_true")
    parser.add_argument("--ignore-sigterm", action="store_true")
    parser.add_argument("--child", type=Path, help="start a child, write its pid here")
    parser.add_argument("--note", nargs=2, help="on SIGTERM append NAME to FILE")
    args = parser.parse_args()

    def on_sigterm(_number: int, _frame: FrameType | None) -> None:
        if args.note:
            with Path(args.note[0]).open("a") as file:
                file.write(args.note[1] + "\n")
        if not args.ignore_sigterm:
            sys.exit(0)

    signal.signal(signal.SIGTERM, on_sigterm)
    if args.child:
        # The child ignores SIGTERM as well: only its group's SIGKILL ends it.
        code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.pause()"
        child = subprocess.Popen([sys.executable, "-S", "-c", code])
        args.child.write_text(str(child.pid))
    print("stand-in", os.getpid(), "starts", flush=True)  # noqa: T201
    if args.die_before_ready or (args.die_again and args.die_again.exists()):
        sys.exit("cannot allocate memory")
    if args.die_again:
        args.die_again.touch()
    if args.never_ready:
        while True:
            signal.pause()
    serve("127.0.0.1", args.port)


if __name__ == "__main__":
    main()
