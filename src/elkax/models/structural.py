"""Trends and seasonals as parameters of a linear-Gaussian model.

Every function returns dynamax's `ParamsLGSSM` for one univariate component; `combine` adds
components up. All of them are differentiable in their variances and work under `jit`. Errors are
raised for values that are known when the function is called; a traced variance is not looked at.

Unless `initial_variance` is given the first state is exactly diffuse: nothing is known of it, in
whatever units. Its record is then a `DiffuseInitial`, which every function of elkax takes.
"""

import jax.numpy as jnp
import numpy as np
from dynamax.linear_gaussian_ssm import ParamsLGSSM
from jax.typing import ArrayLike

from elkax.models.component import Numbers, component, floating_dtype, initial_state, variances


def local_level(
    level_variance: ArrayLike,
    emission_variance: ArrayLike,
    initial_mean: ArrayLike | None = None,
    initial_variance: Numbers | None = None,
) -> ParamsLGSSM:
    r"""Build a random walk observed with noise.

    $$\mu_t = \mu_{t-1} + \eta_t,\quad \eta_t \sim N(0, \sigma^2_\eta);\qquad
      y_t = \mu_t + \varepsilon_t,\quad \varepsilon_t \sim N(0, \sigma^2_\varepsilon)$$

    Args:
        level_variance: $\sigma^2_\eta$, scalar, in squared units of y.
        emission_variance: $\sigma^2_\varepsilon$, scalar.
        initial_mean: mean of $\mu_1$, scalar; zero if None. Only with `initial_variance`.
        initial_variance: variance of $\mu_1$, scalar; exactly diffuse if None or infinite.

    Returns:
        Parameters with one state, $\mu_t$.

    Raises:
        ValueError: if an argument is no scalar, a variance is known to be negative, or a mean is
            given for a diffuse start.

    References:
        Durbin & Koopman (2012), "Time Series Analysis by State Space Methods", Ch. 2.
    """
    dtype = floating_dtype(level_variance, emission_variance, initial_mean, initial_variance)
    return component(
        initial=initial_state(initial_mean, initial_variance, dtype, 1),
        weights=np.eye(1),
        cov=variances("level_variance", level_variance, dtype)[None, None],
        emission_weights=np.ones((1, 1)),
        emission_variance=variances("emission_variance", emission_variance, dtype),
    )


def local_linear_trend(
    level_variance: ArrayLike,
    slope_variance: ArrayLike,
    emission_variance: ArrayLike,
    initial_mean: Numbers | None = None,
    initial_variance: Numbers | None = None,
) -> ParamsLGSSM:
    r"""Build a level that moves by a slope, which is itself a random walk.

    $$\mu_t = \mu_{t-1} + \nu_{t-1} + \eta_t,\quad \nu_t = \nu_{t-1} + \zeta_t,\qquad
      y_t = \mu_t + \varepsilon_t$$

    with independent $\eta_t \sim N(0, \sigma^2_\eta)$, $\zeta_t \sim N(0, \sigma^2_\zeta)$,
    $\varepsilon_t \sim N(0, \sigma^2_\varepsilon)$. A level variance of zero gives the smooth
    trend (integrated random walk).

    Args:
        level_variance: $\sigma^2_\eta$, scalar.
        slope_variance: $\sigma^2_\zeta$, scalar, slope in units of y per time step.
        emission_variance: $\sigma^2_\varepsilon$, scalar.
        initial_mean: mean of $(\mu_1, \nu_1)$: None for zero, a scalar for both, or (2,). Only
            with `initial_variance`.
        initial_variance: variances of $(\mu_1, \nu_1)$, scalar or (2,); exactly diffuse if None,
            and where infinite.

    Returns:
        Parameters with two states, $(\mu_t, \nu_t)$.

    Raises:
        ValueError: on wrong shapes, a variance known to be negative, or a mean given for a diffuse
            start.

    References:
        Durbin & Koopman (2012), Sec. 3.2.1; Harvey (1989), "Forecasting, Structural Time Series
        Models and the Kalman Filter", Sec. 2.3.2.
    """
    dtype = floating_dtype(
        level_variance, slope_variance, emission_variance, initial_mean, initial_variance
    )
    steps = [
        variances("level_variance", level_variance, dtype),
        variances("slope_variance", slope_variance, dtype),
    ]
    return component(
        initial=initial_state(initial_mean, initial_variance, dtype, 2),
        weights=np.array([[1.0, 1.0], [0.0, 1.0]]),
        cov=jnp.diag(jnp.stack(steps)),
        emission_weights=np.array([[1.0, 0.0]]),
        emission_variance=variances("emission_variance", emission_variance, dtype),
    )


def seasonal(
    period: int,
    variance: ArrayLike,
    emission_variance: ArrayLike = 0.0,
    initial_mean: Numbers | None = None,
    initial_variance: Numbers | None = None,
) -> ParamsLGSSM:
    r"""Build a seasonal pattern in dummy form: s effects that sum to zero up to noise.

    $$\gamma_t = -\sum_{j=1}^{s-1} \gamma_{t-j} + \omega_t,\quad \omega_t \sim N(0,
      \sigma^2_\omega),\qquad y_t = \gamma_t + \varepsilon_t$$

    Args:
        period: s, time steps per cycle, at least 2.
        variance: $\sigma^2_\omega$, scalar; zero keeps the pattern fixed.
        emission_variance: $\sigma^2_\varepsilon$, scalar.
        initial_mean: mean of the first state: None for zero, a scalar, or (s - 1,). Only with
            `initial_variance`.
        initial_variance: variances of the first state, scalar or (s - 1,); exactly diffuse if
            None, and where infinite.

    Returns:
        Parameters with s - 1 states, $(\gamma_t, \gamma_{t-1}, \dots, \gamma_{t-s+2})$.

    Raises:
        ValueError: if the period is no integer of at least 2, on wrong shapes, a variance known to
            be negative, or a mean given for a diffuse start.

    References:
        Durbin & Koopman (2012), Sec. 3.2.2; Harvey (1989), Sec. 2.3.4.
    """
    size = _checked_period(period) - 1
    dtype = floating_dtype(variance, emission_variance, initial_mean, initial_variance)
    weights = np.eye(size, k=-1)
    weights[0] = -1.0
    return component(
        initial=initial_state(initial_mean, initial_variance, dtype, size),
        weights=weights,
        cov=jnp.zeros((size, size), dtype).at[0, 0].set(variances("variance", variance, dtype)),
        emission_weights=np.eye(1, size),
        emission_variance=variances("emission_variance", emission_variance, dtype),
    )


def trigonometric_seasonal(
    period: int,
    variance: ArrayLike,
    emission_variance: ArrayLike = 0.0,
    initial_mean: Numbers | None = None,
    initial_variance: Numbers | None = None,
    *,
    harmonics: int | None = None,
) -> ParamsLGSSM:
    r"""Build a seasonal pattern as a sum of stochastic harmonics.

    $$\gamma_t = \sum_{j=1}^{h} \gamma_{j,t},\qquad
      \begin{pmatrix}\gamma_{j,t}\\ \gamma^*_{j,t}\end{pmatrix} =
      \begin{pmatrix}\cos\lambda_j & \sin\lambda_j\\ -\sin\lambda_j & \cos\lambda_j\end{pmatrix}
      \begin{pmatrix}\gamma_{j,t-1}\\ \gamma^*_{j,t-1}\end{pmatrix} + \omega_{j,t},\quad
      \lambda_j = \frac{2\pi j}{s},\quad \omega_{j,t} \sim N(0, \sigma^2_\omega I)$$

    and $y_t = \gamma_t + \varepsilon_t$. At $j = s/2$ the second state is never seen and is left
    out. Fewer harmonics than $\lfloor s/2 \rfloor$ give a smoother pattern with fewer states.

    Args:
        period: s, time steps per cycle, at least 2.
        variance: $\sigma^2_\omega$, scalar, shared by all harmonics.
        emission_variance: $\sigma^2_\varepsilon$, scalar.
        initial_mean: mean of the first state: None for zero, a scalar, or (D,). Only with
            `initial_variance`.
        initial_variance: variances of the first state, scalar or (D,); exactly diffuse if None,
            and where infinite.
        harmonics: h, from 1 to $\lfloor s/2 \rfloor$; all of them if None.

    Returns:
        Parameters with D = 2h states, one less if $2h = s$, harmonics in rising order.

    Raises:
        ValueError: if the period is no integer of at least 2, the number of harmonics is not
            possible, on wrong shapes, a variance known to be negative, or a mean given for a
            diffuse start.

    References:
        Durbin & Koopman (2012), Sec. 3.2.2; Harvey (1989), Sec. 2.3.4.
    """
    most = _checked_period(period) // 2
    count = most if harmonics is None else harmonics
    if not isinstance(count, int | np.integer) or not 1 <= count <= most:
        raise ValueError(
            f"harmonics must be an integer from 1 to {most} at period {period}, got {harmonics!r}"
        )
    size = min(2 * count, period - 1)
    dtype = floating_dtype(variance, emission_variance, initial_mean, initial_variance)
    weights = np.zeros((2 * count, 2 * count))
    for j in range(count):
        angle = 2 * np.pi * (j + 1) / period
        c, s = np.cos(angle), np.sin(angle)
        weights[2 * j : 2 * j + 2, 2 * j : 2 * j + 2] = [[c, s], [-s, c]]
    return component(
        initial=initial_state(initial_mean, initial_variance, dtype, size),
        weights=weights[:size, :size],
        cov=jnp.diag(variances("variance", variance, dtype) * jnp.ones(size, dtype)),
        emission_weights=np.arange(size)[None] % 2 == 0,
        emission_variance=variances("emission_variance", emission_variance, dtype),
    )


def _checked_period(period: int) -> int:
    if not isinstance(period, int | np.integer) or period < 2:
        raise ValueError(f"period must be an integer of at least 2, got {period!r}")
    return period
