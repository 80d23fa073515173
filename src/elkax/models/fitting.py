"""What `fit_em` and `fit_sgd` of linear-Gaussian models share: their arguments, made ready."""

from collections.abc import Callable
from copy import copy
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from dynamax.linear_gaussian_ssm import ParamsLGSSM
from dynamax.linear_gaussian_ssm.inference import ParamsLGSSMInitial
from jaxtyping import Array, PyTree

from elkax.smoothers.initial import ExactDiffuse
from elkax.smoothers.prepare import diffuse_mask, is_concrete, prepare, real_array


class StaticModel:
    """A model as a static argument of `jit`: equal to another one of its type and settings.

    Args:
        model: any object; settings that have no hash, as arrays, are compared by identity.
    """

    def __init__(self, model: Any) -> None:
        """Take down the settings, and keep what is compared by identity alive."""
        self.model = model
        self._values = tuple(vars(model).values())
        settings = {name: _hashable(value) for name, value in vars(model).items()}
        self._key = type(model), tuple(sorted(settings.items(), key=lambda item: item[0]))

    def __eq__(self, other: object) -> bool:
        """Compare types and settings."""
        return isinstance(other, StaticModel) and self._key == other._key

    def __hash__(self) -> int:
        """Hash what is compared."""
        return hash(self._key)


def _hashable(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value


class Fit(NamedTuple):
    """A model and its data, ready to be fitted.

    Attributes:
        model: knows which states start diffuse, so that the parameters need not say it.
        params: arrays of one floating type, finite where states are diffuse; entries may be None.
        emissions: (B, T, N), NaN where missing.
        inputs: (B, T, U) or None.
        diffuse: which states start exactly diffuse.
        restore: puts functions of t and the initial moments of diffuse states back.
    """

    model: Any
    params: ParamsLGSSM
    emissions: Array
    inputs: Array | None
    diffuse: tuple[bool, ...]
    restore: Callable[[ParamsLGSSM], ParamsLGSSM]


def arrange(model: Any, params: ParamsLGSSM, emissions: Any, inputs: Any) -> Fit:
    """Check the arguments of a fit and make them ready.

    Raises:
        ValueError: on shapes that do not fit, infinite emissions, inputs that are not finite.
        TypeError: on arrays without real numbers.
    """
    emissions = _batch("emissions", emissions, model.emission_dim)
    inputs = _batch_inputs(model, inputs, emissions)
    for name, value in (("emissions", emissions), ("inputs", inputs)):
        if value is not None and is_concrete(value):
            _check_finite(name, np.asarray(value))
    arrays = _written_out(params, emissions.shape[1])
    dtype = jnp.result_type(*jax.tree.leaves((arrays, emissions, inputs)))
    dtype = dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.result_type(float)
    # Strongly typed, so that an iteration gives back what it took.
    arrays, emissions, inputs = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, dtype), (arrays, emissions, inputs)
    )
    diffuse = diffuse_states(model, params)
    if any(diffuse):
        model = copy(model)
        model.initial = ExactDiffuse(diffuse)
        arrays = arrays._replace(initial=_stand_in(arrays.initial, diffuse))
    prepare(arrays, emissions[0], None if inputs is None else inputs[0])

    def restore(fitted: ParamsLGSSM) -> ParamsLGSSM:
        initial = _put_back(params.initial, fitted.initial, diffuse)
        groups = {
            group: getattr(fitted, group)._replace(
                **{k: v for k, v in getattr(params, group)._asdict().items() if callable(v)}
            )
            for group in ("dynamics", "emissions")
        }
        return fitted._replace(initial=initial, **groups)

    return Fit(model, arrays, emissions, inputs, diffuse, restore)


def diffuse_states(model: Any, params: ParamsLGSSM) -> tuple[bool, ...]:
    """Say which states start exactly diffuse, by the parameters or by the model."""
    mask = diffuse_mask(params.initial)
    named = mask
    if isinstance(model.initial, ExactDiffuse):
        named = model.initial.mask(len(mask))
    return tuple(a or b for a, b in zip(mask, named, strict=True))


def over_series(function: Callable, emissions: Array, inputs: Array | None) -> PyTree:
    """Evaluate `function(y, u)` for every series, results stacked."""
    if len(emissions) > 1:
        return jax.vmap(function)(emissions, inputs)
    # A batch of one needs no batch axis: branches stay branches, and arrays contiguous.
    one = function(emissions[0], None if inputs is None else inputs[0])
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], one)


def all_finite(tree: PyTree) -> Array:
    """Tell whether every entry of every leaf is finite."""
    return jnp.all(jnp.asarray([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _batch(name: str, value: Any, width: int) -> Array:
    """Return an array (B, T, width) of one given as (B, T, width), (T, width), or (T,)."""
    shapes = f"(T, {width}) or a batch (B, T, {width})"
    if isinstance(value, list | tuple):
        try:
            value = np.asarray(value)
        except ValueError as error:
            raise ValueError(
                f"{name} must be one array, {shapes}, got a {type(value).__name__} of arrays of "
                "different shapes: pad shorter series with rows of NaN"
            ) from error
    array = real_array(name, value)
    if array.ndim == 1 and width == 1:
        array = array[:, None]
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3 or array.shape[-1] != width or 0 in array.shape:
        raise ValueError(
            f"{name} must have shape {shapes}, with at least one series and one time step, got "
            f"{np.shape(value)}"
        )
    return array


def _batch_inputs(model: Any, inputs: Any, emissions: Array) -> Array | None:
    """Return the inputs as (B, T, U), one series of them for each series of emissions."""
    if model.input_dim == 0:
        if inputs is not None and np.shape(inputs)[-1:] != (0,):
            raise ValueError(
                "inputs must be None for a model made with input_dim = 0, got shape "
                f"{np.shape(inputs)}"
            )
        return None
    if inputs is None:
        raise ValueError(f"inputs must be given for a model with input_dim = {model.input_dim}")
    array = _batch("inputs", inputs, model.input_dim)
    if array.shape[:2] != emissions.shape[:2]:
        raise ValueError(
            f"inputs must be there for the {emissions.shape[0]} series of {emissions.shape[1]} "
            f"time steps of the emissions, got shape {np.shape(inputs)}"
        )
    return array


def _check_finite(name: str, value: np.ndarray) -> None:
    """Raise on numbers that nothing can be computed from; NaN in emissions is missing."""
    bad = np.isinf(value) if name == "emissions" else ~np.isfinite(value)
    if np.any(bad):
        series, time, column = map(int, np.argwhere(bad)[0])
        remedy = "NaN marks what is missing" if name == "emissions" else "fill it"
        raise ValueError(
            f"{name} must be finite, got {value[series, time, column]} in series {series} at time "
            f"{time}, column {column}: {remedy}"
        )


def _written_out(params: ParamsLGSSM, length: int) -> ParamsLGSSM:
    """Turn functions of t into arrays over time."""

    def write(name: str, value: Any) -> Any:
        if callable(value):
            value = jax.vmap(lambda t: jnp.asarray(value(t)))(jnp.arange(length))
        return None if value is None else real_array(name, value)

    groups = {
        group: values._replace(
            **{k: write(f"params.{group}.{k}", v) for k, v in values._asdict().items()}
        )
        for group, values in params._asdict().items()
    }
    return ParamsLGSSM(**groups)


def _stand_in(initial: ParamsLGSSMInitial, diffuse: tuple[bool, ...]) -> ParamsLGSSMInitial:
    """Give diffuse states the moments 0 and 1, which nothing depends on."""
    mask = np.asarray(diffuse)
    proper = ~mask[:, None] & ~mask
    return ParamsLGSSMInitial(
        mean=jnp.where(mask, 0.0, initial.mean),
        cov=jnp.where(proper, initial.cov, jnp.eye(len(mask), dtype=initial.cov.dtype)),
    )


def _put_back(old: Any, fitted: ParamsLGSSMInitial, diffuse: tuple[bool, ...]) -> Any:
    """Return the old record, with the fitted moments of the states that are not diffuse."""
    if not any(diffuse):
        return old._replace(mean=fitted.mean, cov=fitted.cov)
    mask = np.asarray(diffuse)
    proper = ~mask[:, None] & ~mask
    dtype = fitted.mean.dtype
    return old._replace(
        mean=jnp.where(mask, jnp.asarray(old.mean, dtype), fitted.mean),
        cov=jnp.where(proper, fitted.cov, jnp.asarray(old.cov, dtype)),
    )
