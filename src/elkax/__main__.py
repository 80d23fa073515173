"""The command line: `python -m elkax`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import elkax
from elkax.demo import run_demo


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: what stands after the name of the program; by default that of this process.

    Returns:
        The exit status.

    Raises:
        SystemExit: after `--help` or `--version`, and with status 2 if the arguments are wrong.
    """
    options = _parser().parse_args(arguments)
    return run_demo(options.output, horizon=options.horizon, level=options.level)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="elkax", description="State-space models in JAX.")
    parser.add_argument("--version", action="version", version=f"elkax {elkax.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="fit, smooth and forecast the Nile, and draw the result",
        description="Fit a local level to the annual flow of the Nile by maximum likelihood, "
        "smooth it, forecast it, hold out two stretches as missing, and save one picture.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument(
        "--output", type=Path, default=Path("nile.png"), metavar="FILE", help="the picture"
    )
    demo.add_argument(
        "--horizon", type=_positive, default=10, metavar="YEARS", help="how far to forecast"
    )
    demo.add_argument(
        "--level", type=_probability, default=0.9, metavar="P", help="probability in the bands"
    )
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _probability(text: str) -> float:
    number = float(text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {number:g}")
    return number


if __name__ == "__main__":
    sys.exit(main())
