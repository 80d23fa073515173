"""From the parameters of a nonlinear model to static functions and traced arrays."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from dynamax.generalized_gaussian_ssm.models import ParamsGGSSM
from dynamax.nonlinear_gaussian_ssm.models import ParamsNLGSSM
from jax.tree_util import GetAttrKey
from jaxtyping import Array, ArrayLike, PyTree

from elkax.gaussian import Form
from elkax.linearize import (
    Curvature,
    Datum,
    DensityEmission,
    Emission,
    GaussianEmission,
    Linearizer,
    MomentEmission,
    SigmaPoints,
    call,
)
from elkax.linearize.curvature import ClippedHessian
from elkax.linearize.emissions import Residual
from elkax.smoothers.checks import check_symmetric, may_be_exact, real_array


class ParamsDistributionSSM(NamedTuple):
    r"""Parameters of a model with Gaussian dynamics and any emission distribution.

    $z_1 \sim N(m, S)$, $z_t \sim N(f(z_{t-1}, u_t), Q_t)$, $y_t \sim p(y \mid z_t, u_t)$.

    Attributes:
        initial_mean: $m$ (D,).
        initial_covariance: $S$ (D, D).
        dynamics_function: $f$, (z) or (z, u) to (D,).
        dynamics_covariance: $Q$, (D, D) or (T, D, D).
        emission_distribution: (z) or (z, u) to a TFP distribution over the N entries of y: a batch
            of N independent ones, or one over vectors of N.
        curvature: how the log-density is made Gaussian, see `DensityEmission`.

    A pytree of its arrays, and of those in functions that are pytrees (`jax.tree_util.Partial`);
    plain functions and the curvature are static, so it may be an argument of `jit` and `vmap`.
    """

    initial_mean: Any
    initial_covariance: Any
    dynamics_function: Callable
    dynamics_covariance: Any
    emission_distribution: Callable
    curvature: Curvature = ClippedHessian()


def is_plain(value: Any) -> bool:
    """Tell whether a value is a function, or another callable, without arrays in it."""
    return callable(value) and jax.tree.structure(value) == jax.tree.structure(0)


def _flatten(params: ParamsDistributionSSM) -> tuple[list, tuple]:
    fields = params._asdict()
    static = {name: value for name, value in fields.items() if is_plain(value)}
    children = [(GetAttrKey(name), value) for name, value in fields.items() if name not in static]
    return children, tuple(static.items())


def _unflatten(static: tuple, children: Iterable) -> ParamsDistributionSSM:
    known, rest = dict(static), iter(children)
    return ParamsDistributionSSM(
        *(known[name] if name in known else next(rest) for name in ParamsDistributionSSM._fields)
    )


# Functions and the curvature belong to the structure, so that `jit` takes the parameters.
jax.tree_util.register_pytree_with_keys(ParamsDistributionSSM, _flatten, _unflatten)

NonlinearParams = ParamsNLGSSM | ParamsGGSSM | ParamsDistributionSSM


@dataclass(frozen=True)
class System:
    """The functions of a model, a static argument of jitted functions."""

    dynamics: Callable
    emission: Emission

    def advance(self, state: Array, inputs: PyTree | None) -> Array:
        """Evaluate $f(z, u)$, (D,)."""
        return jnp.reshape(call(self.dynamics, state, inputs), state.shape)


class Data(NamedTuple):
    """The arrays of a model and its data.

    Attributes:
        initial_mean: (D,).
        initial_cov: (D, D).
        noise: $Q$, (D, D) or (T, D, D); entry 0 is not used.
        emission_noise: $R$, (N, N), (N,), (T, N, N) or (T, N); None if the emission states its own.
        values: (T, N), one where missing: a possible value of counts and classes.
        observed: (T, N).
        inputs: (T, U), a pytree with leading axis T, or None.
    """

    initial_mean: Array
    initial_cov: Array
    noise: Array
    emission_noise: Array | None
    values: Array
    observed: Array
    inputs: PyTree | None

    def later_inputs(self) -> PyTree | None:
        """Return the inputs of the steps into the states at t = 1, ..., T - 1."""
        return jax.tree.map(lambda leaf: leaf[1:], self.inputs)

    def _constant_noise(self) -> bool:
        size = self.values.shape[1]
        noise = self.emission_noise
        return noise is None or noise.shape in ((size, size), (size,))

    def map_data(self, function: Callable, *arrays: Array | None) -> Any:
        """Map `function(datum, *arrays at t)` over time."""
        axes = Datum(0, 0, None if self._constant_noise() else 0, 0)
        data = Datum(self.values, self.observed, self.emission_noise, self.inputs)
        return jax.vmap(function, in_axes=(axes, *(0 for _ in arrays)))(data, *arrays)

    def each(self) -> Datum:
        """Return the data with a leading time axis in every field, as a scan needs them."""
        noise = self.emission_noise
        if noise is not None and self._constant_noise():
            noise = jnp.broadcast_to(noise, (self.values.shape[0], *noise.shape))
        return Datum(self.values, self.observed, noise, self.inputs)


def check_linearizer(linearizer: Linearizer, data: Data) -> None:
    """Warn where sigma points are too close for the type of the numbers."""
    if isinstance(linearizer, SigmaPoints):
        linearizer.check(len(data.initial_mean), data.initial_mean.dtype)


def for_emissions(form: Form, system: System, data: Data) -> Form:
    """Give the form that carries what rounding leaves only where R may be singular."""
    if isinstance(system.emission, DensityEmission):
        return replace(form, exact_entries=False)
    noise = data.emission_noise
    if noise is None:
        return form
    size = noise.shape[-1]
    full = noise.ndim == 3 or noise.shape == (size, size)
    return replace(form, exact_entries=may_be_exact(noise, full=full))


def prepare_system(
    params: NonlinearParams,
    emissions: ArrayLike,
    inputs: PyTree | None = None,
    *,
    residual: Residual | None = None,
) -> tuple[System, Data]:
    r"""Check parameters and data, and part functions from arrays.

    Args:
        params: dynamax's `ParamsNLGSSM` or `ParamsGGSSM`, or `ParamsDistributionSSM`.
        emissions: (T, N), NaN where missing; integers and bools are taken as numbers.
        inputs: (T, U), or a pytree of arrays with leading axis T, whose integers stay what they
            are.
        residual: $(y, \hat y)$ to their difference, for Gaussian emissions on a circle.

    Raises:
        ValueError: on shapes that do not fit each other, T = 0, covariances that are not symmetric.
        TypeError: on parameters of another type, functions of another signature, arrays that hold
            no real numbers.
    """
    if not isinstance(params, NonlinearParams):
        raise TypeError(
            "params must be ParamsNLGSSM, ParamsGGSSM or ParamsDistributionSSM, got "
            f"{type(params).__name__}"
        )
    emissions = real_array("emissions", emissions, booleans=True)
    if emissions.ndim != 2 or 0 in emissions.shape:
        raise ValueError(
            f"emissions must be (T, N) with T >= 1 and N >= 1, got shape {emissions.shape}"
        )
    arrays = {
        "initial_mean": params.initial_mean,
        "initial_covariance": params.initial_covariance,
        "dynamics_covariance": params.dynamics_covariance,
    }
    if isinstance(params, ParamsNLGSSM):
        arrays["emission_covariance"] = params.emission_covariance
    arrays = {name: real_array(f"params.{name}", value) for name, value in arrays.items()}
    inputs = _check_inputs(inputs, len(emissions))
    _check_arrays(arrays, *emissions.shape)
    numbers = [leaf for leaf in jax.tree.leaves(inputs) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    dtype = jnp.result_type(*arrays.values(), emissions, *numbers)
    dtype = dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.result_type(float)
    single = isinstance(inputs, Array)

    def as_number(leaf: Array) -> Array:
        # Integers and bools in a pytree may be what a function counts or chooses by.
        return leaf.astype(dtype) if single or jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    arrays = {name: value.astype(dtype) for name, value in arrays.items()}
    emissions = emissions.astype(dtype)
    observed = ~jnp.isnan(emissions)
    data = Data(
        arrays["initial_mean"],
        arrays["initial_covariance"],
        arrays["dynamics_covariance"],
        arrays.get("emission_covariance"),
        jnp.where(observed, emissions, 1.0),
        observed,
        jax.tree.map(as_number, inputs),
    )
    system = System(params.dynamics_function, _emission(params, residual))
    _check_functions(system, data)
    return system, data


def _emission(params: NonlinearParams, residual: Residual | None) -> Emission:
    if isinstance(params, ParamsNLGSSM):
        return GaussianEmission(params.emission_function, residual)
    if isinstance(params, ParamsGGSSM):
        return MomentEmission(params.emission_mean_function, residual, params.emission_cov_function)
    if residual is not None:
        raise ValueError("residual belongs to Gaussian emissions, but params has a distribution")
    return DensityEmission(params.emission_distribution, params.curvature)


def _check_inputs(inputs: PyTree | None, length: int) -> PyTree | None:
    """Return inputs as arrays with leading axis T: one, or a pytree of them."""
    if inputs is None:
        return None
    if isinstance(inputs, list) or jax.tree_util.all_leaves([inputs]):
        array = real_array("inputs", inputs)
        if array.ndim != 2 or len(array) != length:
            raise ValueError(
                f"inputs must be (T, U) with T = {length} as the emissions, or a pytree of arrays "
                f"with leading axis T, got shape {array.shape}"
            )
        return array

    def check(path: tuple, leaf: Any) -> Array:
        name = f"inputs{jax.tree_util.keystr(path)}"
        array = real_array(name, leaf, booleans=True)
        if array.shape[:1] != (length,):
            raise ValueError(
                f"{name} must have the leading axis T = {length} as the emissions, got shape "
                f"{array.shape}"
            )
        return array

    return jax.tree_util.tree_map_with_path(check, inputs)


def _check_arrays(arrays: dict[str, Array], length: int, emission_dim: int) -> None:
    mean = arrays["initial_mean"]
    d, n = mean.shape[-1] if mean.ndim else 0, emission_dim
    shapes = {
        "initial_mean": [(d,)],
        "initial_covariance": [(d, d)],
        "dynamics_covariance": [(d, d), (length, d, d)],
        "emission_covariance": [(n, n), (n,), (length, n, n), (length, n)],
    }
    for name, value in arrays.items():
        if value.shape not in shapes[name] or d == 0:
            raise ValueError(
                f"params.{name} must have shape {' or '.join(map(str, shapes[name]))} (T = "
                f"{length}, state dimension D = {d}, emission dimension N = {n}), got {value.shape}"
            )
    noise = arrays["dynamics_covariance"]
    check_symmetric("params.initial_covariance", arrays["initial_covariance"])
    check_symmetric("params.dynamics_covariance", noise, skip_first=noise.ndim == 3)
    cov = arrays.get("emission_covariance")
    if cov is not None and cov.shape in ((n, n), (length, n, n)):
        check_symmetric("params.emission_covariance", cov)


def _check_functions(system: System, data: Data) -> None:
    """Evaluate the shapes of every function once."""
    state = data.initial_mean
    inputs = jax.tree.map(lambda leaf: leaf[0], data.inputs)
    size = data.values.shape[1:]

    def check(name: str, function: Callable, expected: tuple[int, ...]) -> None:
        arguments = f"(z) with z of shape {state.shape}"
        if inputs is not None:
            shapes = jax.tree.map(jnp.shape, inputs)
            arguments = f"(z, u) with z of shape {state.shape} and u of shape {shapes}"
        if not callable(function):
            raise TypeError(f"params.{name} must be a function of {arguments}, got {function!r}")
        try:
            shape = jnp.shape(jax.eval_shape(lambda z: call(function, z, inputs), state))
        except (TypeError, AttributeError) as error:
            raise TypeError(
                f"params.{name} must be a function of {arguments} that returns an array of shape "
                f"{expected}: {error}"
            ) from error
        scalar = shape == () and all(axis == 1 for axis in expected)
        if shape != expected and not scalar:
            raise ValueError(
                f"params.{name} must return shape {expected} for {arguments}, got {shape}"
            )

    check("dynamics_function", system.dynamics, state.shape)
    emission = system.emission
    if isinstance(emission, MomentEmission):
        check("emission_mean_function", emission.function, size)
        check("emission_cov_function", emission.moments, size * 2)
    elif isinstance(emission, GaussianEmission):
        check("emission_function", emission.function, size)
    elif isinstance(emission, DensityEmission):

        def density(state: Array, *inputs: Array) -> Array:
            value = emission.distribution(state, *inputs).log_prob(data.values[0])
            return jnp.zeros(size) if jnp.shape(value) in ((), size) else value

        check("emission_distribution", density, size)
