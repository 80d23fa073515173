"""Nonlinear model with Gaussian noise."""

import dynamax.nonlinear_gaussian_ssm.models as dynamax_models
import jax.numpy as jnp
import tensorflow_probability.substrates.jax.distributions as tfd
from dynamax.nonlinear_gaussian_ssm.models import ParamsNLGSSM
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Num

from elkax.linearize.emissions import call
from elkax.models.nonlinear import NonlinearSSM, gaussian


class NonlinearGaussianSSM(NonlinearSSM, dynamax_models.NonlinearGaussianSSM):
    r"""Nonlinear state-space model with Gaussian noise.

    $$z_1 \sim N(m, S),\quad z_t \sim N(f(z_{t-1}, u_t), Q_t),\quad y_t \sim N(h(z_t, u_t), R_t)$$

    dynamax's class of the same name, on its `ParamsNLGSSM`, with `filter`, `smoother`,
    `marginal_log_prob`, `posterior_sample` and `fit_sgd`, which dynamax leaves unimplemented.
    Emissions are (T, N), NaN where missing, and inputs (T, U); index t of the inputs enters the
    step into $z_t$ and the emission at t. Covariances may be singular and may vary in time, R may
    be (N,) or (T, N). Functions take (z), or (z, u) where `input_dim` > 0.

    `filter` linearizes about the filtered states, `smoother` about the smoothed ones, until they
    stay where they are. What `marginal_log_prob` approximates depends on the linearizer: see there.

    Args:
        state_dim: D.
        emission_dim: N.
        input_dim: U, 0 if the functions take no inputs.
        linearizer: `Taylor()`, for the MAP trajectory, or `SigmaPoints(rule)`.
        damping: `LevenbergMarquardt()`, `TrustRegion()`, `LineSearch()`, or none: `GaussNewton()`.
        max_iters: most iterations of the smoother. More than `iterated_smoother` takes, since
            there is no log-likelihood without convergence; only hard sequences need many.
        tolerance: as `iterated_smoother`.
        start: as `iterated_smoother`.
        residual: $(y, \hat y)$ to their difference, for emissions on a circle.
        backend: how the smoother runs over time; chosen by `elkax.scan.choose` if None.
        form: "covariance" or "square_root".

    Raises:
        ValueError: on a dimension below 1 (inputs: below 0), an unknown form.
        TypeError: on a linearizer, damping or backend that is none.
    """

    params_type = ParamsNLGSSM

    def emission_distribution(
        self,
        params: ParamsNLGSSM,
        state: Float[Array, " D"],
        inputs: Num[ArrayLike, " U"] | None = None,
    ) -> tfd.Distribution:
        """Return $N(h(z, u), R)$.

        Raises:
            ValueError: if R varies in time.
        """
        mean = jnp.reshape(call(params.emission_function, state, inputs), (self.emission_dim,))
        return gaussian(mean, "emission_covariance", params.emission_covariance)
