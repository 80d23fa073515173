"""Autoregressive moving-average component."""

import jax.numpy as jnp
import numpy as np
from dynamax.linear_gaussian_ssm import ParamsLGSSM
from dynamax.linear_gaussian_ssm.inference import ParamsLGSSMInitial
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from elkax.models.component import Numbers, component, concrete, floating_dtype, variances


def arma(
    ar: Numbers,
    ma: Numbers = (),
    variance: ArrayLike = 1.0,
    emission_variance: ArrayLike = 0.0,
    *,
    mean: ArrayLike = 0.0,
) -> ParamsLGSSM:
    r"""Build a stationary ARMA(p, q) process, started from its stationary distribution.

    $$y_t = c + x_t + \varepsilon_t,\qquad
      x_t = \sum_{i=1}^{p} \phi_i x_{t-i} + \xi_t + \sum_{j=1}^{q} \theta_j \xi_{t-j},\quad
      \xi_t \sim N(0, \sigma^2)$$

    in companion form with $D = \max(p, q + 1)$ states: $F$ has $\phi$ in its first column and ones
    above the diagonal, the noise enters through $g = (1, \theta_1, \dots, \theta_{D-1})^\top$, so
    that $Q = \sigma^2 gg^\top$ has rank one, and $H = (1, 0, \dots, 0)$. The initial covariance
    solves $P = FPF^\top + Q$. A constant $k$ in the recursion instead of the mean is
    $c = k / (1 - \sum_i \phi_i)$.

    Args:
        ar: $\phi_{1:p}$, may be empty.
        ma: $\theta_{1:q}$, may be empty; it need not be invertible.
        variance: $\sigma^2$ of the innovations, scalar.
        emission_variance: $\sigma^2_\varepsilon$ of noise in the measurement, scalar.
        mean: $c$, scalar.

    Returns:
        Parameters with D states, the first of them $x_t$. The initial covariance takes O(D^6) work
        (D^2 linear equations), meant for D up to about 25. Traced coefficients that are not
        stationary make it NaN, and so the log-likelihood.

    Raises:
        ValueError: if coefficients are no vectors, those of the autoregression are known not to be
            stationary, another argument is no scalar, or a variance is known to be negative.

    References:
        Harvey (1989), "Forecasting, Structural Time Series Models and the Kalman Filter", Sec. 3.3;
        Durbin & Koopman (2012), "Time Series Analysis by State Space Methods", Sec. 3.4.
    """
    dtype = floating_dtype(ar, ma, variance, emission_variance, mean)
    phi, theta = _vector("ar", ar, dtype), _vector("ma", ma, dtype)
    offset = jnp.asarray(mean, dtype)
    if offset.ndim:
        raise ValueError(f"mean must be a scalar, got shape {offset.shape}")
    known = concrete(ar)
    with np.errstate(all="ignore"):
        if known is not None and not is_stationary(known):
            raise ValueError(f"ar must be the coefficients of a stationary process, got {known}")
    (p,), (q,) = phi.shape, theta.shape
    size = max(p, q + 1)
    weights = jnp.eye(size, k=1, dtype=dtype).at[:p, 0].set(phi)
    loading = jnp.zeros(size, dtype).at[0].set(1.0).at[1 : q + 1].set(theta)
    cov = variances("variance", variance, dtype) * jnp.outer(loading, loading)
    initial_cov = _stationary_covariance(weights, cov)
    return component(
        initial=ParamsLGSSMInitial(
            mean=jnp.zeros(size, dtype),
            cov=jnp.where(is_stationary(phi), initial_cov, jnp.nan),
        ),
        weights=weights,
        cov=cov,
        emission_weights=np.eye(1, size),
        emission_variance=variances("emission_variance", emission_variance, dtype),
        emission_bias=offset,
    )


def is_stationary(ar: Array | np.ndarray) -> Bool[ArrayLike, ""]:
    r"""Tell whether all roots of $1 - \sum_i \phi_i z^i$ lie outside the unit circle.

    By the Durbin-Levinson recursion run backwards: the process is stationary exactly if every
    partial autocorrelation, the last coefficient of each lower order, is below one in modulus.
    """
    stationary = True
    while ar.shape[0]:
        last = ar[-1]
        stationary = stationary & (abs(last) < 1)
        ar = (ar[:-1] + last * ar[:-1][::-1]) / (1 - last * last)
    return stationary


def _vector(name: str, value: Numbers, dtype: jnp.dtype) -> Float[Array, " n"]:
    array = jnp.asarray(value, dtype)
    if array.ndim != 1:
        raise ValueError(f"{name} must be a vector of coefficients, got shape {array.shape}")
    return array


def _stationary_covariance(weights: Float[Array, "D D"], cov: Float[Array, "D D"]) -> Array:
    r"""Solve $P = FPF^\top + Q$ as $(I - F \otimes F) \mathrm{vec} P = \mathrm{vec} Q$."""
    size = weights.shape[0]
    equations = jnp.eye(size * size, dtype=cov.dtype) - jnp.kron(weights, weights)
    solution = jnp.linalg.solve(equations, cov.reshape(-1)).reshape(size, size)
    return (solution + solution.T) / 2
