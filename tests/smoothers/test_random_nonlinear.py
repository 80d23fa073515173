"""Random nonlinear models by the plain call: nothing is called converged that is not a minimum."""

import numpy as np
import pytest

from newton_oracle import newton, run, wrong
from random_nonlinear import FAMILIES, batch

# How many of fifty arrived where they say, in float32 and in float64, when this was written.
ARRIVE = {
    "counts": (50, 50),
    "tanh network": (48, 50),
    "kink": (29, 28),
    "relu network": (13, 13),
    "turn": (50, 50),
    "classes": (50, 50),
    "pendulum": (50, 50),
    "bearings": (46, 46),
    "growth": (49, 50),
    "oscillator": (49, 50),
}
DTYPES = ("float32", "float64")


def check(name, dtype, numbers, least=0):
    """No wrong CONVERGED, and at least so many that are right."""
    means, info, ends = run(name, np.dtype(dtype), numbers)
    eps = np.finfo(dtype).eps
    found = {number: wrong(end, means[0].size, eps) for number, end in ends.items()}
    found = {number: word for number, word in found.items() if word is not None}
    iterations = np.asarray(info.iterations)
    print(f"{name}, {dtype}: {len(ends)} of {len(numbers)} in {np.median(iterations)} iterations")
    if found:
        lines = [
            f"{number}: {word}; {iterations[numbers.index(number)]} iterations"
            for number, word in found.items()
        ]
        pytest.fail("\n  ".join([f"{name}, {dtype}: wrong CONVERGED", *lines]), pytrace=False)
    # Two less where another version rounds differently.
    assert len(ends) >= least - 2, f"{name}, {dtype}: {len(ends)} arrive, {least} did"


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("counts", "float32"),
        ("kink", "float32"),
        ("bearings", "float32"),
        ("growth", "float64"),
        ("oscillator", "float64"),
    ],
)
def test_nothing_is_wrongly_called_converged(name, dtype):
    check(name, dtype, tuple(range(12)))


def test_what_is_not_a_minimum_is_found():
    """Beside a minimum, and at a saddle: a state seen by its square, and the mirror of that."""
    models = batch("oscillator", (0,))
    model = (
        {key: leaf[0] for key, leaf in models.numbers.items()},
        models.emissions[0],
        models.inputs,
    )
    eps, zero = np.finfo(np.float64).eps, np.zeros((60, 2))
    minimum = newton("oscillator", model, zero + 0.1, eps)
    assert "falls" in wrong(minimum, 120, eps)
    model[0]["m0"] = np.zeros(2)
    saddle = newton("oscillator", model, zero, eps)
    assert "indefinite" in wrong(saddle, 120, eps)


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_wrongly_called_converged_in_a_thousand(name, dtype):
    check(name, dtype, tuple(range(50)), ARRIVE[name][DTYPES.index(dtype)])
