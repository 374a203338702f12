"""The command `clustr`, and `python -m clustr_core`: Ctrl-C is one line even while PyTorch is being loaded."""

import sys


def main() -> int:
    """As `cli.main`."""
    try:
        from clustr_core.cli import main as run
    except KeyboardInterrupt:
        print("clustr: ended by Ctrl-C; nothing was begun", file=sys.stderr)
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
