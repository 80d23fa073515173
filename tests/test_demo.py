import contextlib
import io
import re
import struct
import sys
from typing import NamedTuple

import jax
import pytest

from elkax import demo
from elkax.__main__ import main


class Run(NamedTuple):
    status: int
    printed: str
    picture: bytes
    fit: demo._Fit


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run with everything at its default, in a process that computes in float32."""
    output = tmp_path_factory.mktemp("demo") / "nile.png"
    printed, fits = io.StringIO(), []
    compute_fit = demo._fit

    def recorded_fit(values):
        fits.append(compute_fit(values))
        return fits[0]

    with (
        pytest.MonkeyPatch.context() as patch,
        jax.enable_x64(False),
        contextlib.redirect_stdout(printed),
    ):
        patch.setattr(demo, "_fit", recorded_fit)
        status = main(["demo", "--output", str(output)])
    assert f"Picture saved to {output}" in printed.getvalue()
    return Run(status, printed.getvalue(), output.read_bytes(), fits[0])


@pytest.fixture
def fitted(run, monkeypatch):
    """Spares another search for the maximum, which takes most of the demo's time."""
    monkeypatch.setattr(demo, "_fit", lambda values: run.fit)


def numbers(printed, name):
    (line,) = [line for line in printed.splitlines() if line.startswith(name)]
    return [float(number) for number in re.findall(r"-?\d+\.\d+", line)]


def test_estimates_are_those_of_durbin_and_koopman(run):
    assert run.status == 0
    assert " converged in " in run.printed.replace("(", " ")
    for name, published in (("emission variance", 15099.0), ("level variance", 1469.1)):
        estimate, standard_error, book = numbers(run.printed, name)
        assert book == published
        assert estimate == pytest.approx(published, rel=0.01)
        assert 0 < standard_error < estimate


def test_likelihood_is_at_least_that_of_durbin_and_koopman(run):
    estimate, book = numbers(run.printed, "log-likelihood")
    # The exact diffuse log-likelihood of the series, to the six digits that are printed.
    assert book == pytest.approx(-633.464564, abs=2e-6)
    assert estimate >= book


def test_bands_and_forecasts_are_printed(run):
    rows = [
        [float(number) for number in row]
        for row in re.findall(r"^ +(\d{4}) +(\S+) +\[(\S+), (\S+)\]$", run.printed, re.M)
    ]
    assert all(lower < mean < upper for _, mean, lower, upper in rows)
    forecast = [row for row in rows if row[0] > 1970]
    assert [row[0] for row in forecast] == list(range(1971, 1981))
    widths = [upper - lower for *_, lower, upper in forecast]
    assert widths == sorted(widths)


def test_held_out_flows_are_counted(run):
    inside, removed = map(int, re.search(r"(\d+) of the (\d+) removed", run.printed).groups())
    assert removed == 40
    # Binomial(40, 0.9) is below 30 with probability 0.5 %; the years are not independent.
    assert 30 <= inside <= 40


def test_picture_is_a_png_of_sensible_size(run):
    assert run.picture[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", run.picture[16:24])
    assert 1000 <= width <= 3000
    assert 800 <= height <= 3000
    # An empty page of that size takes a few kilobytes.
    assert len(run.picture) > 40_000


def test_options_reach_the_result(fitted, tmp_path, capsys):
    output = tmp_path / "nile.svg"
    status = main(["demo", "--output", str(output), "--horizon", "2", "--level", "0.5"])
    printed = capsys.readouterr().out
    assert status == 0
    assert "Forecast flow, 50 % band" in printed
    assert re.findall(r"^ +(197[1-9])", printed, re.M) == ["1971", "1972"]
    assert "<svg" in output.read_text("utf-8")


def test_without_matplotlib_the_numbers_are_still_printed(fitted, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    output = tmp_path / "nile.png"
    assert main(["demo", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert len(numbers(printed, "emission variance")) == 3
    assert 'pip install "elkax[plot]"' in printed
    assert not output.exists()


@pytest.mark.parametrize(
    ("path", "reason"),
    [("missing/nile.png", "there is no folder"), (".", "is a folder"), ("nile.xyz", "not supp")],
)
def test_bad_output_is_one_clear_error(path, reason, fitted, tmp_path, capsys):
    assert main(["demo", "--output", str(tmp_path / path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("elkax demo: error: cannot write the picture to ")
    assert reason in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--horizon", "0"], "at least 1, got 0"),
        (["demo", "--level", "90"], "between 0 and 1, got 90"),
        ([], "COMMAND"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("option", "says"), [("--version", "elkax "), ("--help", "demo")])
def test_information_is_printed(option, says, capsys):
    with pytest.raises(SystemExit) as stop:
        main([option])
    assert stop.value.code == 0
    assert says in capsys.readouterr().out
