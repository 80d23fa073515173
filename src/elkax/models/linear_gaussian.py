"""dynamax's linear-Gaussian models with parallel inference, missing data and standard errors."""

from typing import Any

import dynamax.linear_gaussian_ssm as dynamax_models
import jax
import jax.numpy as jnp
from dynamax.linear_gaussian_ssm import (
    ParamsLGSSM,
    PosteriorGSSMFiltered,
    PosteriorGSSMSmoothed,
)
from dynamax.utils.utils import ensure_array_has_batch_dim
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Num

from elkax.models.free_parameters import FreeParameters
from elkax.models.identification import refuse_undetermined, refuse_unidentified
from elkax.models.information import parameter_errors
from elkax.models.learning import LearnedLinearGaussianSSM
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
from elkax.smoothers.forecasting import smoothed_emissions
from elkax.smoothers.linear import Initial
from elkax.smoothers.prepare import diffuse_mask


class LinearGaussianSSM(LearnedLinearGaussianSSM):
    r"""Linear-Gaussian state-space model.

    $$z_1 \sim N(m, S),\quad z_t \sim N(F_t z_{t-1} + B_t u_t + b_t, Q_t),\quad
      y_t \sim N(H_t z_t + D_t u_t + d_t, R_t)$$

    This is dynamax's class of the same name: `initialize`, `fit_em`, `fit_sgd`, priors, parameter
    properties and the distributions are inherited. Inference runs in parallel over time, takes
    NaN as missing, and singular covariances. Emissions are (T, N), or (T,) where N = 1, and inputs
    (T, U); index t of the inputs enters the step into $z_t$ and the emission at t, index 0 only the
    emission. Methods with a `length` take only so many of the time steps for data: what follows is
    padding, for ragged batches under `vmap`.

    Args:
        state_dim: D.
        emission_dim: N.
        input_dim: U.
        has_dynamics_bias: whether there is $b$.
        has_emissions_bias: whether there is $d$.
        backend: how sequences are run; chosen from T and D if None.
        form: "covariance" or "square_root", how covariances are stored; if None, square roots in
            types of few digits, such as float32.
        initial: `Stationary()` or `ExactDiffuse()` in place of the initial distribution of the
            parameters. Those with a `DiffuseInitial` start as it says without it.
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
        form: str | None = None,
        initial: Initial = None,
    ) -> None:
        """Set the dimensions and the strategy; see the class."""
        super().__init__(state_dim, emission_dim, input_dim, has_dynamics_bias, has_emissions_bias)
        self.backend = backend
        self.form = form
        self.initial = initial

    @property
    def _strategy(self) -> dict[str, Any]:
        return {"backend": self.backend, "form": self.form, "initial": self.initial}

    def sample(
        self,
        params: ParamsLGSSM,
        key: Array,
        num_timesteps: int,
        inputs: Num[ArrayLike, "T U"] | None = None,
    ) -> tuple[Float[Array, "T D"], Float[Array, "T N"]]:
        """Draw states (T, D) and emissions (T, N) from the model."""
        return lgssm_joint_sample(
            params, key, num_timesteps, inputs, backend=self.backend, initial=self.initial
        )

    def marginal_log_prob(
        self,
        params: ParamsLGSSM,
        emissions: ArrayLike,
        inputs: Num[ArrayLike, "T U"] | None = None,
        *,
        length: ArrayLike | None = None,
    ) -> Float[Array, ""]:
        """Compute the log-likelihood of the entries that are not missing, in nats."""
        return lgssm_marginal_log_prob(params, emissions, inputs, length=length, **self._strategy)

    def filter(
        self,
        params: ParamsLGSSM,
        emissions: ArrayLike,
        inputs: Num[ArrayLike, "T U"] | None = None,
        *,
        length: ArrayLike | None = None,
    ) -> PosteriorGSSMFiltered:
        """Compute the moments of each state given the emissions up to its time."""
        return lgssm_filter(params, emissions, inputs, length=length, **self._strategy)

    def smoother(
        self,
        params: ParamsLGSSM,
        emissions: ArrayLike,
        inputs: Num[ArrayLike, "T U"] | None = None,
        *,
        length: ArrayLike | None = None,
    ) -> PosteriorGSSMSmoothed:
        """Compute the moments of each state given all emissions."""
        return lgssm_smoother(params, emissions, inputs, length=length, **self._strategy)

    def posterior_sample(
        self,
        key: Array,
        params: ParamsLGSSM,
        emissions: ArrayLike,
        inputs: Num[ArrayLike, "T U"] | None = None,
        *,
        num_samples: int | None = None,
        length: ArrayLike | None = None,
    ) -> Float[Array, "... T D"]:
        """Draw state paths given all emissions: (T, D), or (num_samples, T, D) if that is given."""
        return lgssm_posterior_sample(
            key,
            params,
            emissions,
            inputs,
            num_samples=num_samples,
            length=length,
            **self._strategy,
        )

    def posterior_predictive(
        self,
        params: ParamsLGSSM,
        emissions: ArrayLike,
        inputs: Num[ArrayLike, "T U"] | None = None,
        *,
        length: ArrayLike | None = None,
    ) -> tuple[Float[Array, "T N"], Float[Array, "T N"]]:
        r"""Compute mean and standard deviation of a fresh emission at each time, given all data.

        $$H_t E[z_t \mid y] + D_t u_t + d_t,\qquad
          \sqrt{\mathrm{diag}(H_t \mathrm{Cov}[z_t \mid y] H_t^\top + R_t)}$$

        At missing entries this is the distribution of the missing value.

        Returns:
            Means and standard deviations, (T, N) each.
        """
        means, covs = smoothed_emissions(params, emissions, inputs, length=length, **self._strategy)
        return means, jnp.sqrt(jnp.diagonal(covs, axis1=-2, axis2=-1))

    def forecast(
        self,
        params: ParamsLGSSM,
        emissions: ArrayLike,
        num_forecast_timesteps: int,
        inputs: Num[ArrayLike, "T U"] | None = None,
        forecast_inputs: Num[ArrayLike, "h U"] | None = None,
        *,
        length: ArrayLike | None = None,
    ) -> Forecast:
        """Compute the moments of future states and emissions; see `lgssm_forecast`.

        Returns:
            State means (h, D) and covariances (h, D, D), emission means (h, N) and covariances
            (h, N, N), in this order; time-varying parameters need T + h rows.
        """
        return lgssm_forecast(
            params,
            emissions,
            num_forecast_timesteps,
            inputs,
            forecast_inputs,
            length=length,
            **self._strategy,
        )

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
        if any(diffuse_mask(params.initial)):
            smooth = jax.vmap(lambda y, u: self.smoother(params, y, u).smoothed_covariances)
            refuse_undetermined(smooth(batch, batch_inputs))

        def log_posterior(theta: Array) -> Array:
            here = free.constrain(theta)
            each = jax.vmap(lambda y, u: self.marginal_log_prob(here, y, u))(batch, batch_inputs)
            return self.log_prior(here) + jnp.sum(each)

        return free.place(
            jax.jit(lambda theta: parameter_errors(log_posterior, free.values, theta))(free.theta)
        )
