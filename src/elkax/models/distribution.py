"""Nonlinear model with Gaussian dynamics and any emission distribution."""

import tensorflow_probability.substrates.jax.distributions as tfd
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Num

from elkax.linearize.emissions import call
from elkax.models.nonlinear import NonlinearSSM
from elkax.smoothers import ParamsDistributionSSM


class DistributionSSM(NonlinearSSM):
    r"""State-space model with Gaussian dynamics and emissions from a TFP distribution.

    $$z_1 \sim N(m, S),\quad z_t \sim N(f(z_{t-1}, u_t), Q_t),\quad y_t \sim p(y \mid z_t, u_t)$$

    on `ParamsDistributionSSM`. Everything else is as in `NonlinearGaussianSSM`: Poisson, Bernoulli,
    categorical, Student t and other emissions, of independent entries or of vectors. With
    `Taylor()` the smoother finds the MAP trajectory, and `marginal_log_prob` is Laplace's.

    Args:
        state_dim: D.
        emission_dim: N.
        input_dim: U, 0 if the functions take no inputs.
        linearizer: as `NonlinearGaussianSSM`.
        damping: as `NonlinearGaussianSSM`.
        max_iters: as `NonlinearGaussianSSM`.
        tolerance: as `NonlinearGaussianSSM`.
        start: as `NonlinearGaussianSSM`.
        backend: as `NonlinearGaussianSSM`.
        form: as `NonlinearGaussianSSM`.

    Raises:
        ValueError: as `NonlinearGaussianSSM`.
        TypeError: as `NonlinearGaussianSSM`.
    """

    params_type = ParamsDistributionSSM

    def emission_distribution(
        self,
        params: ParamsDistributionSSM,
        state: Float[Array, " D"],
        inputs: Num[ArrayLike, " U"] | None = None,
    ) -> tfd.Distribution:
        """Return the distribution of $y$ (N,), its entries independent if it was a batch."""
        distribution = call(params.emission_distribution, state, inputs)
        if distribution.event_shape.rank:
            return distribution
        return tfd.Independent(tfd.BatchBroadcast(distribution, self.emission_shape), 1)
