import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

import elkax

ROOT = Path(__file__).parents[1]

CONFIGURATION_AROUND_IMPORT = """
import jax
before = dict(jax.config.values)
import elkax
after = dict(jax.config.values)
# dynamax defines flags of its own; those that JAX has must keep their values.
print({name: (before[name], after[name]) for name in before if before[name] != after[name]})
"""


def test_import_leaves_the_configuration_as_it_found_it():
    run = subprocess.run(
        [sys.executable, "-c", CONFIGURATION_AROUND_IMPORT],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "{}"


def test_layers_hold(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert lint_imports(config_filename="pyproject.toml", no_cache=True) == 0


def test_no_path_of_one_machine_is_in_the_tree():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout to tell the project's files from others")
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    names = [name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]
    assert "pyproject.toml" in names
    machine_path = re.compile(rb"(?<![\w.])/(work|tmp|root|farm|home|Users)/")
    found = [name for name in names if machine_path.search((ROOT / name).read_bytes())]
    assert not found


def test_changelog_knows_this_version():
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert headings[0] in ("Unreleased", elkax.__version__)
