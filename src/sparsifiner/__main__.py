"""The command `sparsifiner`, also as `python -m sparsifiner`."""

import sys


def main() -> int:
    """Runs the command line, or says what it needs."""
    try:
        from sparsifiner.cli import main as run  # noqa: PLC0415, to be able to say what is missing
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "sparsifiner":
            raise
        print(f"sparsifiner: {error}; install it with pip install 'sparsifiner[all]'", file=sys.stderr)
        return 1
    return run()


if __name__ == "__main__":
    sys.exit(main())
