import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")


def blocks(section, language):
    """The fenced blocks of one language under one heading, as .ci/run finds them."""
    (body,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", README, re.M | re.S)
    return re.findall(rf"^```{language}\n(.*?)^```$", body, re.M | re.S)


@pytest.mark.parametrize("section", ["Example", "Nonlinear models", "Recurrences"])
def test_example_prints_what_the_readme_shows(section, tmp_path):
    (example,) = blocks(section, "python")
    (printed,) = blocks(section, "text")
    run = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == printed


def test_two_commands_install_and_run_the_main_job_and_the_tests():
    main_job, tests = blocks("Two commands", "bash")
    assert re.fullmatch(r'pip install -e "\.\[plot\]" && python -m elkax demo\n', main_job)
    assert re.fullmatch(r'pip install -e "\.\[test\]" && python -m pytest\n', tests)
