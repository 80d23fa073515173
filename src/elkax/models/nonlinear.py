"""What nonlinear models share: inference by iterated smoothing, and learning by gradients."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import tensorflow_probability.substrates.jax.distributions as tfd
from dynamax.linear_gaussian_ssm import PosteriorGSSMFiltered, PosteriorGSSMSmoothed
from dynamax.ssm import SSM
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Num

from elkax.gaussian.factor import psd_cholesky
from elkax.linearize import Linearizer, Taylor
from elkax.linearize.emissions import Residual, call
from elkax.models.nonlinear_sgd import fit_each
from elkax.models.sgd import ADAM, Schedule
from elkax.scan import Backend
from elkax.smoothers import (
    Solution,
    Status,
    gaussian_filter,
    iterated_posterior_sample,
    iterated_smoother,
    laplace_log_prob,
)
from elkax.smoothers.damping import Damping, LevenbergMarquardt
from elkax.smoothers.iterated import MAX_ITERS, check_strategy
from elkax.smoothers.prepare import check_backend, check_count, find_form
from elkax.smoothers.system import NonlinearParams


class NonlinearSSM(SSM):
    r"""Gaussian dynamics $z_1 \sim N(m, S)$, $z_t \sim N(f(z_{t-1}, u_t), Q_t)$, any emissions.

    The base of `NonlinearGaussianSSM` and `DistributionSSM`, which say what each method computes.

    Args:
        state_dim: D.
        emission_dim: N.
        input_dim: U, 0 if the functions take no inputs.
        linearizer: `Taylor()` or `SigmaPoints(rule)`.
        damping: as `iterated_smoother`.
        max_iters: most iterations of the smoother.
        tolerance: as `iterated_smoother`.
        start: as `iterated_smoother`.
        residual: as `iterated_smoother`.
        backend: as `iterated_smoother`.
        form: as `iterated_smoother`.

    Raises:
        ValueError: on a dimension below 1 (inputs: below 0), an unknown form.
        TypeError: on a linearizer, damping or backend that is none.
    """

    params_type: type[NonlinearParams]

    def __init__(
        self,
        state_dim: int,
        emission_dim: int,
        input_dim: int = 0,
        *,
        linearizer: Linearizer = Taylor(),
        damping: Damping = LevenbergMarquardt(),
        max_iters: int = MAX_ITERS,
        tolerance: float | None = None,
        start: Any = None,
        residual: Residual | None = None,
        backend: Backend | None = None,
        form: str = "covariance",
    ) -> None:
        """Set the dimensions and the strategy; see the class."""
        check_count("state_dim", state_dim)
        check_count("emission_dim", emission_dim)
        if input_dim != 0:
            check_count("input_dim", input_dim)
        check_strategy(linearizer, damping, max_iters)
        check_backend(backend)
        find_form(form, float)
        self.state_dim = state_dim
        self.emission_dim = emission_dim
        self.input_dim = input_dim
        self.linearizer = linearizer
        self.damping = damping
        self.max_iters = max_iters
        self.tolerance = tolerance
        self.start = start
        self.residual = residual
        self.backend = backend
        self.form = form

    @property
    def emission_shape(self) -> tuple[int]:
        """Shape of the emission of one time step, (N,)."""
        return (self.emission_dim,)

    @property
    def inputs_shape(self) -> tuple[int] | None:
        """Shape of the inputs of one time step, (U,), or None."""
        return (self.input_dim,) if self.input_dim > 0 else None

    def initial_distribution(
        self, params: Any, inputs: Num[ArrayLike, " U"] | None = None
    ) -> tfd.Distribution:
        """Return $N(m, S)$; singular S is allowed, and then has draws but no density."""
        del inputs
        return gaussian(params.initial_mean, "initial_covariance", params.initial_covariance)

    def transition_distribution(
        self, params: Any, state: Float[Array, " D"], inputs: Num[ArrayLike, " U"] | None = None
    ) -> tfd.Distribution:
        """Return $N(f(z, u), Q)$ of the next state; inputs are those of its time.

        Raises:
            ValueError: if Q varies in time.
        """
        mean = jnp.reshape(call(params.dynamics_function, state, inputs), (self.state_dim,))
        return gaussian(mean, "dynamics_covariance", params.dynamics_covariance)

    def solve(
        self,
        params: Any,
        emissions: Num[ArrayLike, "T N"],
        inputs: Num[ArrayLike, "T U"] | None = None,
    ) -> Solution:
        """Smooth, and say how the iteration ended; see `iterated_smoother`.

        `solution.info` tells why a log-likelihood or a draw of the other methods is NaN.
        """
        self._check(params, emissions, inputs)
        return iterated_smoother(
            params,
            emissions,
            inputs,
            damping=self.damping,
            max_iters=self.max_iters,
            tolerance=self.tolerance,
            start=self.start,
            **self._strategy,
        )

    def filter(
        self,
        params: Any,
        emissions: Num[ArrayLike, "T N"],
        inputs: Num[ArrayLike, "T U"] | None = None,
    ) -> PosteriorGSSMFiltered:
        """Compute moments of each state given the emissions up to its time; see `gaussian_filter`.

        Linearized where the filter is, sequential in time.
        """
        self._check(params, emissions, inputs)
        return gaussian_filter(
            params,
            emissions,
            inputs,
            linearizer=self.linearizer,
            residual=self.residual,
            form=self.form,
        )

    def smoother(
        self,
        params: Any,
        emissions: Num[ArrayLike, "T N"],
        inputs: Num[ArrayLike, "T U"] | None = None,
    ) -> PosteriorGSSMSmoothed:
        """Compute moments of each state given all emissions, linearized where the smoother is.

        Its log-likelihood is that of the linear model there, and NaN if the iteration did not
        converge; the moments are then those about the last finite trajectory.
        """
        solution = self.solve(params, emissions, inputs)
        value = solution.posterior.marginal_loglik * _one_if_converged(solution)
        return solution.posterior._replace(marginal_loglik=value)

    def marginal_log_prob(
        self,
        params: Any,
        emissions: Num[ArrayLike, "T N"],
        inputs: Num[ArrayLike, "T U"] | None = None,
    ) -> Float[Array, ""]:
        r"""Approximate the log-likelihood of the entries that are not missing, in nats.

        With `Taylor()` by Laplace's method about the MAP trajectory (see `laplace_log_prob`), with
        exact gradients, the trajectory moving with the parameters. With a linearizer that uses
        covariances, whose fixed point has no derivative, by the filter: the sum of the densities of
        its innovations. Both are exact for a linear model.

        Returns:
            A scalar. By Laplace's method it is NaN, with a gradient of NaN, if the iteration did
            not converge, or not to a minimum of the MAP cost.
        """
        if self.linearizer.uses_covariance:
            return jnp.asarray(self.filter(params, emissions, inputs).marginal_loglik)
        solution = self.solve(params, emissions, inputs)
        value = laplace_log_prob(
            params,
            emissions,
            inputs,
            trajectory=solution.trajectory,
            residual=self.residual,
        )
        return value * _one_if_converged(solution)

    def posterior_sample(
        self,
        key: Array,
        params: Any,
        emissions: Num[ArrayLike, "T N"],
        inputs: Num[ArrayLike, "T U"] | None = None,
        *,
        num_samples: int | None = None,
    ) -> Float[Array, "... T D"]:
        """Draw state paths given all emissions: (T, D), or (num_samples, T, D) if that is given.

        From the Gaussian posterior that `smoother` has the moments of; see
        `iterated_posterior_sample`. NaN if the iteration did not converge.
        """
        solution = self.solve(params, emissions, inputs)
        draws = iterated_posterior_sample(
            key,
            params,
            emissions,
            inputs,
            solution=solution,
            num_samples=num_samples,
            **self._strategy,
        )
        return draws * _one_if_converged(solution)

    def fit_sgd(
        self,
        params: Any,
        props: Any,
        emissions: Num[ArrayLike, "*batch T N"],
        inputs: Num[ArrayLike, "*batch T U"] | None = None,
        optimizer: optax.GradientTransformation = ADAM,
        batch_size: int = 1,
        num_epochs: int = 50,
        shuffle: bool = False,
        key: Array | None = None,
    ) -> tuple[Any, Float[Array, " num_epochs"]]:
        r"""Maximise `marginal_log_prob` plus `log_prior` by stochastic gradient descent.

        As dynamax's method, and parameters inside the functions are learned as well, those of a
        `jax.tree_util.Partial`, or of any other callable pytree:

            f = Partial(lambda theta, z: theta * jnp.sin(z), jnp.array(0.5))

        Args:
            params: start; a plain function stays as it is.
            props: dynamax's `ParameterProperties` in the place of each array, for a function one
                for all its arrays or a pytree of them, `Partial(f, ParameterProperties())`. What
                stands in the place of a plain function is not read.
            emissions: (T, N) or a batch (B, T, N), NaN where missing.
            inputs: (T, U) or (B, T, U).
            optimizer: from optax.
            batch_size: number of sequences per minibatch.
            num_epochs: passes through all sequences.
            shuffle: whether to draw the minibatches at random.
            key: random key for that; dynamax's constant one if None.

        Returns:
            The last parameters, or those at which the best epoch began if these are better: more
            sequences with a value, then the smaller loss. And the negative objective per observed
            entry, averaged over each epoch. A sequence without a finite value or gradient, as one
            whose iteration did not converge, is left out where that happens, of gradient and
            loss; a warning says which, how often and why. A minibatch of none but such changes
            nothing, and the loss of an epoch of none but such is NaN.

        Raises:
            ValueError: on shapes that do not fit the model, or properties that do not fit the
                parameters.
            TypeError: on parameters of another type, or arrays that are not floating-point.
        """
        self._check(params, emissions, inputs, batch=True)
        return fit_each(
            self,
            params,
            props,
            jnp.asarray(emissions),
            None if inputs is None else jnp.asarray(inputs),
            Schedule(optimizer, batch_size, num_epochs, shuffle, key),
        )

    @property
    def _strategy(self) -> dict[str, Any]:
        return {
            "linearizer": self.linearizer,
            "residual": self.residual,
            "backend": self.backend,
            "form": self.form,
        }

    def _check(self, params: Any, emissions: Any, inputs: Any, *, batch: bool = False) -> None:
        """Raise unless parameters and data fit the dimensions of the model."""
        if not isinstance(params, self.params_type):
            raise TypeError(
                f"params must be {self.params_type.__name__}, got {type(params).__name__}"
            )
        if np.shape(params.initial_mean) != (self.state_dim,):
            raise ValueError(
                f"params.initial_mean must have shape ({self.state_dim},), the state_dim of the "
                f"model, got {np.shape(params.initial_mean)}"
            )
        ranks = (2, 3) if batch else (2,)
        expected = "(T, {0}) or (B, T, {0})" if batch else "(T, {0})"
        shape = np.shape(emissions)
        if len(shape) not in ranks or shape[-1] != self.emission_dim:
            raise ValueError(
                f"emissions must be {expected.format(self.emission_dim)}, the emission_dim of the "
                f"model, got shape {shape}"
            )
        if self.input_dim == 0 and inputs is not None:
            raise ValueError(
                "inputs must be None for a model made with input_dim = 0, got shape "
                f"{np.shape(inputs)}"
            )
        if self.input_dim and (inputs is None or np.shape(inputs) != (*shape[:-1], self.input_dim)):
            raise ValueError(
                f"inputs must have shape {(*shape[:-1], self.input_dim)}, T as the emissions and "
                f"the input_dim of the model, got {None if inputs is None else np.shape(inputs)}"
            )


def gaussian(mean: ArrayLike, name: str, cov: ArrayLike) -> tfd.Distribution:
    """Return a Gaussian whose covariance, (n, n), or (n,) if diagonal, may be singular.

    Raises:
        ValueError: on another shape, as of a covariance that varies in time.
    """
    cov = jnp.asarray(cov)
    size = np.shape(mean)[-1]
    if cov.shape == (size,):
        return tfd.MultivariateNormalDiag(mean, jnp.sqrt(cov))
    if cov.shape != (size, size):
        raise ValueError(
            f"the distribution of one time step needs params.{name} of shape {(size, size)}, the "
            f"same at all times, got {cov.shape}"
        )
    return tfd.MultivariateNormalTriL(mean, psd_cholesky(cov))


def _one_if_converged(solution: Solution) -> Array:
    """Return a factor that makes NaN what belongs to no solution, and its derivatives too."""
    return jnp.where(solution.info.status == Status.CONVERGED, 1.0, jnp.nan)
