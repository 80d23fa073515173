"""Learning the parameters of linear-Gaussian models: EM, and gradient descent."""

from typing import Any

import dynamax.linear_gaussian_ssm as dynamax_models
import jax.numpy as jnp
import numpy as np
import optax
from dynamax.linear_gaussian_ssm import ParamsLGSSM
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Num

from elkax.models.completion import EmissionModel, complete
from elkax.models.em_fit import run_em
from elkax.models.em_maximisation import maximise, trainable, varies
from elkax.models.em_words import say_how_it_ended
from elkax.models.expectation import expected_statistics
from elkax.models.fitting import arrange, diffuse_states
from elkax.models.sgd import ADAM, Schedule, run_sgd
from elkax.smoothers.initial import ExactDiffuse, Stationary
from elkax.smoothers.prepare import check_count, is_concrete, prepare


class LearnedLinearGaussianSSM(dynamax_models.LinearGaussianSSM):
    """dynamax's linear-Gaussian model with an EM and a gradient descent that end well.

    Attributes:
        initial: None, or what takes the place of the initial distribution of the parameters.
    """

    initial: Stationary | ExactDiffuse | None = None

    def e_step(
        self,
        params: ParamsLGSSM,
        emissions: Num[ArrayLike, "T N"],
        inputs: Num[ArrayLike, "T U"] | None = None,
    ) -> tuple[tuple, Float[Array, ""]]:
        r"""Compute the expected sufficient statistics of one sequence, gaps allowed.

        The expectations are over the states and the missing emissions given what was observed, so
        that an M-step on them does not lower the log-likelihood, up to rounding.

        Returns:
            dynamax's statistics, and with them what `params` leaves of states and emissions, which
            `m_step` takes, see `expected_statistics`; and the log-likelihood.
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
            problem,
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
        r"""Maximise the expected log-likelihood of a batch over the trainable parameters.

        Any of them may be frozen, and frozen ones may vary in time; see `maximise`. An emission
        covariance given as variances (N,) stays so. Initial moments of exactly diffuse states stay
        as they are.

        Where all are trainable it is dynamax's M-step but for two terms: nothing is added to the
        diagonal of the normal equations, and the covariance of the initial state is
        $\tfrac1B\sum_b E z_1z_1^\top - mm^\top$ with $m = \tfrac1B\sum_b E z_1$. dynamax 1.0.3
        subtracts $B mm^\top$, which for more than one sequence is no covariance in general.

        Args:
            params: the parameters that `e_step` was called with.
            props: which are trainable.
            batch_stats: statistics with a leading batch axis.
            m_step_state: handed on.

        Raises:
            ValueError: if a trainable parameter varies in time, or depends on a covariance that
                does, or if dynamics are to be learned with a stationary start.
        """
        diffuse = diffuse_states(self, params)
        if isinstance(self.initial, Stationary):
            if any(group == "dynamics" for group, _ in trainable(params, props)):
                raise ValueError(
                    "fit_em cannot learn dynamics that the initial distribution depends on, "
                    "initial=Stationary(): freeze all of props.dynamics, or use fit_sgd"
                )
            diffuse = (True,) * len(diffuse)
        biases = self.has_dynamics_bias, self.has_emissions_bias
        fitted = maximise(params, props, batch_stats, biases=biases, diffuse=diffuse)
        return fitted, m_step_state

    def fit_em(
        self,
        params: ParamsLGSSM,
        props: ParamsLGSSM,
        emissions: Num[ArrayLike, "*shape"],
        inputs: Num[ArrayLike, "*inputs_shape"] | None = None,
        num_iters: int = 50,
        verbose: bool = True,
        print_every: int = 1,
        *,
        variance_floor: Num[ArrayLike, "*channels"] | None = None,
    ) -> tuple[ParamsLGSSM, Float[Array, " num_iters"]]:
        r"""Maximise the log posterior $\log p(y_{1:T}, \theta)$ by expectation-maximisation.

        As dynamax's method, with any parameters frozen (`trainable=False` in the properties) and
        known ones that vary in time, as arrays or functions of t. It never goes on from
        parameters that are not finite. If a variance of the emissions falls to zero, as that of a
        channel which holds one value, or of one that the states explain exactly, the likelihood
        has no maximum: EM then stops and warns, naming what collapsed.

        Args:
            params: start.
            props: which parameters are trainable.
            emissions: (T, N) or a batch (B, T, N), NaN where missing; (T,) if N = 1.
            inputs: (T, U) or (B, T, U).
            num_iters: most iterations.
            verbose: show a progress bar; not under `jit` or `vmap`.
            print_every: iterations between its updates.
            variance_floor: smallest variance of an emission's error, in squared units of the
                data, one for all channels or one for each (N,). EM maximises under
                $R \succeq \mathrm{diag}(f)$, where the likelihood has a maximum.

        Returns:
            The parameters with the highest log posterior of all that were seen, the last ones
            included, and the log posterior at the start of each iteration, `num_iters` of them.
            If EM was stopped these are fewer; under `jit` and `vmap` the rest of them is NaN, and
            nothing is said.

        Raises:
            ValueError: on shapes that do not fit; if a trainable parameter varies in time; if the
                log posterior is not finite at the start; if the data do not determine a state.
            TypeError: on arrays without real numbers.
        """
        if verbose:
            check_count("print_every", print_every)
        if num_iters <= 0:
            return params, jnp.array([])
        fit = arrange(self, params, emissions, inputs)
        floor = self._check_floor(fit.params, props, variance_floor)
        outcome = run_em(fit, props, floor, num_iters, print_every if verbose else None)
        fitted, log_probs = fit.restore(outcome.progress.best), outcome.log_probs
        if is_concrete(outcome.ending):
            say_how_it_ended(fit, props, outcome)
            log_probs = log_probs[: int(np.sum(np.isfinite(log_probs)))]
        return fitted, log_probs

    def fit_sgd(
        self,
        params: ParamsLGSSM,
        props: ParamsLGSSM,
        emissions: Num[ArrayLike, "*shape"],
        inputs: Num[ArrayLike, "*inputs_shape"] | None = None,
        optimizer: optax.GradientTransformation = ADAM,
        batch_size: int = 1,
        num_epochs: int = 50,
        shuffle: bool = False,
        key: Array | None = None,
    ) -> tuple[ParamsLGSSM, Float[Array, " num_epochs"]]:
        r"""Maximise the log posterior $\log p(y_{1:T}, \theta)$ by stochastic gradient descent.

        As dynamax's method. Frozen parameters pass through no constraint, so that they may be
        None, functions of t, or singular covariances. Initial moments of exactly diffuse states
        stay as they are.

        Args:
            params: start.
            props: which parameters are trainable, and how each is constrained; variances (N,) of
                the emissions are kept positive where the constraint is one for a matrix.
            emissions: (T, N) or a batch (B, T, N), NaN where missing; (T,) if N = 1.
            inputs: (T, U) or (B, T, U).
            optimizer: from optax.
            batch_size: number of sequences per minibatch.
            num_epochs: passes through all sequences.
            shuffle: whether to draw the minibatches at random.
            key: random key for that; dynamax's constant one if None.

        Returns:
            The last parameters, or those at which the epoch with the least loss began if these are
            better; and the negative log posterior per observed entry, averaged over each epoch. A
            minibatch whose log posterior or gradient is not finite changes nothing; the loss of
            its epoch is not finite, and a warning says so.

        Raises:
            ValueError: on shapes that do not fit; if a trainable function of t, or a singular
                covariance, is to be learned.
            TypeError: on arrays without real numbers.
        """
        fit = arrange(self, params, emissions, inputs)
        for group, name in sorted(trainable(fit.params, props)):
            if callable(getattr(getattr(params, group), name)):
                raise ValueError(
                    f"params.{group}.{name} is a function of t, which fit_sgd cannot learn: freeze "
                    f"it with props.{group}.{name}.trainable = False, or give an array over time"
                )
        schedule = Schedule(optimizer, batch_size, num_epochs, shuffle, key)
        fitted, losses = run_sgd(fit, props, schedule)
        return fit.restore(fitted), losses

    def _check_floor(
        self, params: ParamsLGSSM, props: ParamsLGSSM, floor: ArrayLike | None
    ) -> Array | None:
        """Return the smallest variances of the emissions (N,)."""
        if floor is None:
            return None
        shape = (self.emission_dim,)
        if np.shape(floor) not in ((), shape):
            raise ValueError(
                f"variance_floor must be one variance, or one for each of the {shape[0]} channels, "
                f"got shape {np.shape(floor)}"
            )
        if is_concrete(floor) and not np.all(np.asarray(floor) > 0):
            raise ValueError(f"variance_floor must be positive, got {floor}")
        free = ("emissions", "cov") in trainable(params, props)
        if not free or varies(params, "emissions", "cov"):
            raise ValueError(
                "variance_floor is for an emission covariance that is learned, but "
                "params.emissions.cov is frozen"
            )
        return jnp.broadcast_to(jnp.asarray(floor, params.emissions.cov.dtype), shape)
