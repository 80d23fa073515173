"""The whole Jacobian."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from elkax.gaussian import Covariance, Model
from elkax.gaussian.filtering import filter_model
from elkax.linearize.structure import Scanned, Step, pushforward
from elkax.scan import Backend


@dataclass(frozen=True)
class Full(Scanned):
    """All of it, (T, D, D): DEER and ELK."""

    def linearize(self, step: Step, states: Array, inputs: PyTree) -> tuple[Array, Array]:
        """Evaluate f and the Jacobians (T, D, D); see `Structure`."""
        values, push = pushforward(step, states, inputs)
        units = jnp.eye(states.shape[1], dtype=states.dtype)
        columns = jax.vmap(lambda unit: push(jnp.broadcast_to(unit, states.shape)), out_axes=-1)
        return values, columns(units)

    def times(self, jacobian: Array, vectors: Array) -> Array:
        """Multiply; see `Structure`."""
        return jnp.sum(jacobian * vectors[:, None, :], axis=-1)

    def transpose(self, jacobian: Array) -> Array:
        """Swap the last two axes; see `Structure`."""
        return jnp.swapaxes(jacobian, -1, -2)

    def filter(
        self, jacobian: Array, offset: Array, noise: Array, backend: Backend | None
    ) -> tuple[Array, Array]:
        """Run the Kalman filter, D scalar updates a step; see `Structure`."""
        length, size = offset.shape
        eye = jnp.eye(size, dtype=offset.dtype)
        model = Model(
            initial_mean=offset[0],
            initial_cov=noise[0] * eye,
            weights=jacobian,
            offset=offset,
            noise=noise[:, :, None] * eye,
            rows=eye,
            variances=jnp.ones_like(offset[0]),
            values=jnp.zeros_like(offset),
            observed=jnp.ones(offset.shape, bool),
            first=jnp.zeros(length, offset.dtype).at[0].set(1.0),
        )
        filtered = filter_model(model, Covariance(exact_entries=False), backend)
        return filtered.mean, filtered.cov

    def gap(self, covs: Array, jacobian: Array) -> Array:
        """Multiply; see `Structure`."""
        return jacobian - jnp.matmul(covs, jacobian, precision="highest")
