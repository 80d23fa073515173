import gc
import os
import tempfile

import jax
import pytest
from jaxtyping import config, install_import_hook

from fast_compilation import xla_flags

# The processes of pytest-xdist inherit it.
os.environ.setdefault("XLA_FLAGS", xla_flags())

# Tracing makes millions of objects that live on.
gc.set_threshold(200_000, 50, 100)

jax.config.update("jax_enable_x64", True)
# Where an operation was traced is not written into the programs: XLA would carry it through them.
jax.config.update("jax_traceback_in_locations_limit", 0)

# Shapes and types of every call are checked while the tests run; users do not pay for it.
# Stays installed, so that it meets the modules that elkax itself does not import, too.
install_import_hook("elkax", "type_checks.check_outermost")


def pytest_configure(config):
    """Keep compiled programs on disk until the end, for the files that compile the same again."""
    # Of this process alone: JAX does not write them atomically.
    directory = tempfile.TemporaryDirectory(prefix="elkax-programs-")
    config.add_cleanup(directory.cleanup)
    jax.config.update("jax_compilation_cache_dir", directory.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Drop what a file compiled: thousands of programs at once exceed a process's memory maps."""
    yield
    jax.clear_caches()


@pytest.fixture
def key():
    """A random key, the same in every test; split it for more."""
    return jax.random.key(20240719)


@pytest.fixture
def unchecked():
    """Turn the checks of shapes and types off: a wrong call then meets the error a user sees."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
