"""Linear-Gaussian model with conjugate priors."""

from typing import Any

import dynamax.linear_gaussian_ssm as dynamax_models
from dynamax.linear_gaussian_ssm import ParamsLGSSM

from elkax.models.linear_gaussian import LinearGaussianSSM
from elkax.scan import Backend
from elkax.smoothers.linear import Initial


class LinearGaussianConjugateSSM(LinearGaussianSSM, dynamax_models.LinearGaussianConjugateSSM):
    """Linear-Gaussian model with conjugate priors, fitted by EM to the posterior mode.

    Priors, M-step and Gibbs sampler are dynamax's; inference and missing data as in
    `LinearGaussianSSM`. The exception is `fit_blocked_gibbs`, which draws its state paths with
    dynamax's own sampler, sequentially and without missing data.

    Args:
        state_dim: D.
        emission_dim: N.
        input_dim: U.
        has_dynamics_bias: whether there is $b$.
        has_emissions_bias: whether there is $d$.
        backend: how sequences are run; chosen from T and D if None.
        form: as `LinearGaussianSSM`.
        initial: `Stationary()` or `ExactDiffuse()` in place of the initial distribution.
        priors: dynamax's `initial_prior` (normal-inverse-Wishart), `dynamics_prior` and
            `emission_prior` (matrix-normal-inverse-Wishart).
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
        **priors: Any,
    ) -> None:
        """Set dimensions, strategy and priors; see the class."""
        dynamax_models.LinearGaussianConjugateSSM.__init__(
            self,
            state_dim,
            emission_dim,
            input_dim,
            has_dynamics_bias,
            has_emissions_bias,
            **priors,
        )
        self.backend = backend
        self.form = form
        self.initial = initial

    def m_step(
        self,
        params: ParamsLGSSM,
        props: ParamsLGSSM,
        batch_stats: tuple,
        m_step_state: Any,
    ) -> tuple[ParamsLGSSM, Any]:
        """Find the mode of the posterior that the priors and the expected statistics give."""
        return dynamax_models.LinearGaussianConjugateSSM.m_step(
            self, params, props, batch_stats, m_step_state
        )
