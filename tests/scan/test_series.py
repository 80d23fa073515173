"""`run` under `vmap`: the batch in lanes."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elkax.scan import Blocked, Sequential, choice, choose, linear_recurrence

T, D, SERIES = 5, 3, 4
AXES = {
    "states": (None, None, 0),
    "offsets": (None, 0, None),
    "transitions": (0, None, None),
    "all": (0, 1, -1),
}


def arguments(axes, *, diagonal):
    rng = np.random.default_rng(0)
    shapes = [(T, D) if diagonal else (T, D, D), (T, D), (D,)]
    return [
        jnp.asarray(
            rng.normal(size=shape)
            if axis is None
            else np.moveaxis(rng.normal(size=(SERIES, *shape)), 0, axis)
        )
        for shape, axis in zip(shapes, axes, strict=True)
    ]


def one(x, axis, i):
    return x if axis is None else jnp.take(x, i, axis)


@pytest.mark.parametrize(
    "backend, reverse, diagonal",
    # Every pair of the three once.
    [
        (Sequential(), False, False),
        (Sequential(), True, True),
        (Blocked(2), False, True),
        (Blocked(2), True, False),
    ],
)
@pytest.mark.parametrize("which", AXES)
def test_batch_equals_one_at_a_time(which, diagonal, reverse, backend):
    axes = AXES[which]
    given = arguments(axes, diagonal=diagonal)
    scan = partial(linear_recurrence, reverse=reverse, backend=backend)
    together = jax.jit(jax.vmap(scan, in_axes=axes))(*given)
    for i in range(SERIES):
        alone = scan(*(one(x, axis, i) for x, axis in zip(given, axes, strict=True)))
        chex.assert_trees_all_close(together[i], alone, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("which", ["offsets", "all"])
def test_derivatives_of_a_batch(which):
    """Reverse of the batch, batch of the reverse, and forward."""
    axes = AXES[which]
    given = arguments(axes, diagonal=False)

    def loss(*args):
        return jnp.sum(jnp.sin(linear_recurrence(*args)))

    everyone = jax.vmap(loss, in_axes=axes)
    every = range(SERIES)
    parts = [[one(x, axis, i) for x, axis in zip(given, axes, strict=True)] for i in every]
    expected = [jax.grad(loss)(*args) for args in parts]
    each = jax.jit(jax.vmap(jax.grad(loss), in_axes=axes))(*given)
    chex.assert_trees_all_close(each, jnp.stack(expected), rtol=1e-12, atol=1e-13)
    total = jax.jit(jax.grad(lambda *args: jnp.sum(everyone(*args))))(*given)
    summed = sum(expected) if axes[0] is None else jnp.stack(expected)
    chex.assert_trees_all_close(total, summed, rtol=1e-12, atol=1e-13)
    _, along = jax.jvp(everyone, given, given)
    forward = jnp.stack([jax.jvp(loss, args, args)[1] for args in parts])
    chex.assert_trees_all_close(along, forward, rtol=1e-12, atol=1e-13)


def test_many_series_need_no_blocks_of_time(monkeypatch):
    monkeypatch.setattr(choice, "LOOPS_ARE_KERNELS", False)
    one = partial(choose, num_timesteps=4096, state_dim=4, platform="cpu")
    assert isinstance(one(), Blocked)
    assert isinstance(one(num_series=2), Blocked)
    assert one(num_series=256) == Sequential()
