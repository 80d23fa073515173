import jax
import pytest


@pytest.fixture
def gpu(monkeypatch):
    """Programs are traced as for a GPU."""
    jax.clear_caches()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    yield
    jax.clear_caches()
