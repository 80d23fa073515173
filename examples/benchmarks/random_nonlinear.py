"""Print how many random nonlinear models the plain call of the iterated smoother arrives at.

The families of `tests/random_nonlinear.py`, the same models in float32 and in float64. "arrived" is
the share that ended as CONVERGED, "wrong" how many of these are no minimum: Newton's method from
there, dense and in float64, lowers the cost by more than the tolerance promises, or the Hessian is
indefinite. Iterations are those of all models, the others' included.

    python examples/benchmarks/random_nonlinear.py
    python examples/benchmarks/random_nonlinear.py --families counts growth --models 100
"""

import argparse
import sys
from pathlib import Path

import jax
import numpy as np

import elkax

# Before this directory, where a module has this script's name.
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from newton_oracle import run, wrong  # noqa: E402
from random_nonlinear import FAMILIES  # noqa: E402


def print_row(name, dtype, numbers):
    """Print a row of the table."""
    means, info, ends = run(name, np.dtype(dtype), numbers)
    eps = np.finfo(dtype).eps
    bad = sum(wrong(end, means[0].size, eps) is not None for end in ends.values())
    middle, most = np.quantile(info.iterations, (0.5, 0.9))
    status = np.bincount(info.status, minlength=len(elkax.Status))
    others = [f"{n} {kind.name}" for kind, n in zip(elkax.Status, status, strict=True) if n]
    print(
        f"| {name} | {dtype} | {len(ends) / len(numbers):.0%} | {bad} | {middle:.0f} | {most:.0f} "
        f"| {', '.join(others[1:] if status[0] else others)} |",
        flush=True,
    )


def main():
    """Read the arguments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--models", type=int, default=50, help="of each family, in each dtype")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    print(f"JAX {jax.__version__}, {options.models} models of each family\n")
    print("| family | dtype | arrived | wrong | iterations, median | 90 % | the others |")
    print("|---|---|---|---|---|---|---|")
    for name in options.families:
        for dtype in ("float32", "float64"):
            print_row(name, dtype, tuple(range(options.models)))


if __name__ == "__main__":
    main()
