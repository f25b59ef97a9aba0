"""Starts Nabla: everything (`up`), one service in the foreground (`scheduler`), or the demo (`demo`)."""

from __future__ import annotations

import argparse
import sys

from services import SERVICES

EXAMPLE = "Examples: nabla up, nabla down, python -m services scheduler"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m services", description=__doc__, epilog=EXAMPLE)
    actions = ["up", "down", "supervise", "demo", "rotate-secrets-key"]
    parser.add_argument("what", nargs="?", default="up", choices=[*actions, *SERVICES], metavar="WHAT")
    parser.add_argument("--json", action="store_true", help="up, down: answer in JSON, for programs")
    arguments = parser.parse_args()
    if arguments.what in SERVICES:
        from libs.common.runner import run

        run(arguments.what)
        return 0
    from infra.local import console

    return console.main(arguments.what, as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
