"""Stands in for the module that ``vllm serve`` runs: takes its command line, serves nothing.

To be copied to ``vllm/entrypoints/cli/main.py`` of a folder in front of the real vLLM.
"""

from __future__ import annotations

import argparse
import signal
import sys

from tests.unit.launcher.stand_in import serve


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model")
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    args, _ = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    serve(args.host, args.port)


if __name__ == "__main__":
    main()
