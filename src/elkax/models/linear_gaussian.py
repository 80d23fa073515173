"""dynamax's linear-Gaussian models with parallel inference, missing data and standard errors."""

from typing import Any

import dynamax.linear_gaussian_ssm as dynamax_models
import jax
import jax.numpy as jnp
import numpy as np
from dynamax.linear_gaussian_ssm import (
    ParamsLGSSM,
    PosteriorGSSMFiltered,
    PosteriorGSSMSmoothed,
)
from dynamax.parameters import ensure_all_or_none_trainable
from dynamax.utils.utils import ensure_array_has_batch_dim
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Num

from elkax.models.completion import EmissionModel, complete
from elkax.models.expectation import expected_statistics
from elkax.models.free_parameters import FreeParameters, diffuse_states
from elkax.models.identification import refuse_undetermined, refuse_unidentified
from elkax.models.information import parameter_errors
from elkax.scan import Backend
from elkax.smoothers import (
    Forecast,
    lgssm_filter,
    lgssm_forecast,
    lgssm_joint_sample,
    lgssm_marginal_log_prob,
    lgssm_posterior_sample,
    lgssm_smoother,
)
from elkax.smoothers.prepare import prepare


class LinearGaussianSSM(dynamax_models.LinearGaussianSSM):
    r"""Linear-Gaussian state-space model.

    $$z_1 \sim N(m, S),\quad z_t \sim N(F_t z_{t-1} + B_t u_t + b_t, Q_t),\quad
      y_t \sim N(H_t z_t + D_t u_t + d_t, R_t)$$

    This is dynamax's class of the same name: `initialize`, `fit_em`, `fit_sgd`, priors, parameter
    properties and the distributions are inherited. Inference runs in parallel over time, takes
    NaN as missing, and singular covariances. Emissions are (T, N) and inputs (T, U); index t of the
    inputs enters the step into $z_t$ and the emission at t, index 0 only the emission.

    Args:
        state_dim: D.
        emission_dim: N.
        input_dim: U.
        has_dynamics_bias: whether there is $b$.
        has_emissions_bias: whether there is $d$.
        backend: how sequences are run; chosen from T and D if None.
        form: "covariance" or "square_root", how covariances are stored while filtering.
    """

    def __init__(
        self,
        state_dim: int,
        emission_dim: int,
        input_dim: int = 0,
        has_dynamics_bias: bool = True,
        has_emissions_bias: bool = True,
        *,
        backend: Backend | None = None,
        form: str = "covariance",
    ) -> None:
        """Set the dimensions and the strategy; see the class."""
        super().__init__(state_dim, emission_dim, input_dim, has_dynamics_bias, has_emissions_bias)
        self.backend = backend
        self.form = form

    @property
    def _strategy(self) -> dict[str, Any]:
        return {"backend": self.backend, "form": self.form}

    def sample(
        self,
        params: ParamsLGSSM,
        key: Array,
        num_timesteps: int,
        inputs: Num[ArrayLike, "T U"] | None = None,
    ) -> tuple[Float[Array, "T D"], Float[Array, "T N"]]:
        """Draw states (T, D) and emissions (T, N) from the model."""
        return lgssm_joint_sample(params, key, num_timesteps, inputs, backend=self.backend)

    def marginal_log_prob(
        self,
        params: ParamsLGSSM,
        emissions: Num[ArrayLike, "T N"],
        inputs: Num[ArrayLike, "T U"] | None = None,
    ) -> Float[Array, ""]:
        """Compute the log-likelihood of the entries that are not missing, in nats."""
        return lgssm_marginal_log_prob(params, emissions, inputs, **self._strategy)

    def filter(
        self,
        params: ParamsLGSSM,
        emissions: Num[ArrayLike, "T N"],
        inputs: Num[ArrayLike, "T U"] | None = None,
    ) -> PosteriorGSSMFiltered:
        """Compute the moments of each state given the emissions up to its time."""
        return lgssm_filter(params, emissions, inputs, **self._strategy)

    def smoother(
        self,
        params: ParamsLGSSM,
        emissions: Num[ArrayLike, "T N"],
        inputs: Num[ArrayLike, "T U"] | None = None,
    ) -> PosteriorGSSMSmoothed:
        """Compute the moments of each state given all emissions."""
        return lgssm_smoother(params, emissions, inputs, **self._strategy)

    def posterior_sample(
        self,
        key: Array,
        params: ParamsLGSSM,
        emissions: Num[ArrayLike, "T N"],
        inputs: Num[ArrayLike, "T U"] | None = None,
        *,
        num_samples: int | None = None,
    ) -> Float[Array, "... T D"]:
        """Draw state paths given all emissions: (T, D), or (num_samples, T, D) if that is given."""
        return lgssm_posterior_sample(
            key, params, emissions, inputs, num_samples=num_samples, **self._strategy
        )

    def posterior_predictive(
        self,
        params: ParamsLGSSM,
        emissions: Num[ArrayLike, "T N"],
        inputs: Num[ArrayLike, "T U"] | None = None,
    ) -> tuple[Float[Array, "T N"], Float[Array, "T N"]]:
        r"""Compute mean and standard deviation of a fresh emission at each time, given all data.

        $$H_t E[z_t \mid y] + D_t u_t + d_t,\qquad
          \sqrt{\mathrm{diag}(H_t \mathrm{Cov}[z_t \mid y] H_t^\top + R_t)}$$

        At missing entries this is the distribution of the missing value.

        Returns:
            Means and standard deviations, (T, N) each.
        """
        posterior = self.smoother(params, emissions, inputs)
        problem = prepare(params, emissions, inputs)
        H, R = problem.weights, problem.cov
        noise = R if problem.diagonal else jnp.diagonal(R, axis1=-2, axis2=-1)
        means = jnp.einsum("...nd,...d->...n", H, posterior.smoothed_means, precision="highest")
        carried = jnp.matmul(H, posterior.smoothed_covariances, precision="highest")
        return means + problem.offset, jnp.sqrt(jnp.sum(carried * H, -1) + noise)

    def forecast(
        self,
        params: ParamsLGSSM,
        emissions: Num[ArrayLike, "T N"],
        num_forecast_timesteps: int,
        inputs: Num[ArrayLike, "T U"] | None = None,
        forecast_inputs: Num[ArrayLike, "h U"] | None = None,
    ) -> Forecast:
        """Compute the moments of future states and emissions; see `lgssm_forecast`.

        Returns:
            State means (h, D) and covariances (h, D, D), emission means (h, N) and covariances
            (h, N, N), in this order; time-varying parameters need T + h rows.
        """
        return lgssm_forecast(
            params, emissions, num_forecast_timesteps, inputs, forecast_inputs, **self._strategy
        )

    def e_step(
        self,
        params: ParamsLGSSM,
        emissions: Num[ArrayLike, "T N"],
        inputs: Num[ArrayLike, "T U"] | None = None,
    ) -> tuple[tuple, Float[Array, ""]]:
        r"""Compute the expected sufficient statistics of one sequence, gaps allowed.

        The expectations are over the states and the missing emissions given what was observed, so
        that an M-step on them does not lower the log-likelihood (up to rounding, and to the 1e-9
        that dynamax's M-step adds to the diagonal of its normal equations).

        Returns:
            Statistics as `m_step` takes them, see `expected_statistics`, and the log-likelihood.
        """
        posterior = self.smoother(params, emissions, inputs)
        problem = prepare(params, emissions, inputs)
        completed = complete(
            problem.emissions,
            EmissionModel(problem.weights, problem.offset, problem.cov),
            posterior.smoothed_means,
            posterior.smoothed_covariances,
            diagonal=problem.diagonal,
        )
        length, dtype = problem.emissions.shape[0], problem.emissions.dtype
        u = jnp.zeros((length, 0), dtype) if inputs is None else jnp.asarray(inputs, dtype)
        statistics = expected_statistics(
            posterior,
            completed,
            u,
            has_dynamics_bias=self.has_dynamics_bias,
            has_emissions_bias=self.has_emissions_bias,
        )
        return statistics, jnp.asarray(posterior.marginal_loglik)

    def m_step(
        self,
        params: ParamsLGSSM,
        props: ParamsLGSSM,
        batch_stats: tuple,
        m_step_state: Any,
    ) -> tuple[ParamsLGSSM, Any]:
        r"""Maximise the expected log-likelihood of a batch, as dynamax does but for one term.

        The covariance of the initial state is $\tfrac1B\sum_b E z_1z_1^\top - mm^\top$ with
        $m = \tfrac1B\sum_b E z_1$. dynamax 1.0.3 subtracts $B mm^\top$, which is the same for one
        sequence, and for more of them is no covariance in general.
        """
        fitted, state = super().m_step(params, props, batch_stats, m_step_state)
        if not ensure_all_or_none_trainable(props, what="parameters"):
            return fitted, state
        total, second, count = (jnp.sum(each, axis=0) for each in batch_stats[0])
        cov = second / count - jnp.outer(total / count, total / count)
        return fitted._replace(initial=fitted.initial._replace(cov=cov)), state

    def standard_errors(
        self,
        params: ParamsLGSSM,
        props: ParamsLGSSM,
        emissions: Num[ArrayLike, "*batch T N"],
        inputs: Num[ArrayLike, "*batch T U"] | None = None,
    ) -> ParamsLGSSM:
        r"""Compute asymptotic standard errors of fitted parameters.

        The observed information $-\partial^2\ell/\partial\theta\partial\theta^\top$ of the
        trainable parameters in their unconstrained form, inverted, and carried over to the
        parameters themselves by the delta method. Call it at a maximum of the log-likelihood (of
        log-likelihood plus log-prior, where the model has one): elsewhere the numbers depend on how
        the parameters are constrained.

        A linear-Gaussian model with all its parameters free is not identified: a change of basis
        of the states changes F, H, Q, ... and leaves the likelihood as it is. Freeze what fixes the
        basis (`trainable=False`); what does not depend on it, such as R, has the same error however
        it is fixed. Nothing is estimated of an initial distribution with exactly diffuse states.

        Args:
            params: the estimate.
            props: which parameters are trainable, and how each is constrained.
            emissions: (T, N) or a batch (B, T, N), NaN where missing.
            inputs: (T, U) or (B, T, U).

        Returns:
            Standard errors in the place and the units of the parameters: zero for frozen ones, NaN
            for those that depend on a direction in which the log-likelihood is flat, or curved the
            wrong way, or curved less than its remaining gradient. The Hessian costs as many
            gradients as there are trainable numbers.

        Raises:
            ValueError: before anything is computed, if the basis of the states is free and the
                model has no prior, naming what to freeze; if a trainable covariance is singular,
                for it has no unconstrained form; if the data do not determine a diffuse state.

        References:
            Durbin & Koopman (2012), "Time Series Analysis by State Space Methods", Sec. 7.3.6.
        """
        batch = ensure_array_has_batch_dim(jnp.asarray(emissions), self.emission_shape)
        batch_inputs = None
        if inputs is not None:
            batch_inputs = ensure_array_has_batch_dim(jnp.asarray(inputs), self.inputs_shape)
        free = FreeParameters(params, props)
        if free.theta.size == 0:
            return free.place(free.theta)
        has_prior = type(self).log_prior is not dynamax_models.LinearGaussianSSM.log_prior
        refuse_unidentified(params, free, has_prior=has_prior)
        if np.any(diffuse_states(params.initial)):
            smooth = jax.vmap(lambda y, u: self.smoother(params, y, u).smoothed_covariances)
            refuse_undetermined(smooth(batch, batch_inputs))

        def log_posterior(theta: Array) -> Array:
            here = free.constrain(theta)
            each = jax.vmap(lambda y, u: self.marginal_log_prob(here, y, u))(batch, batch_inputs)
            return self.log_prior(here) + jnp.sum(each)

        return free.place(
            jax.jit(lambda theta: parameter_errors(log_posterior, free.values, theta))(free.theta)
        )
