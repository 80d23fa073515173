"""From dynamax parameters and emissions to arrays that the kernels run on."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from dynamax.linear_gaussian_ssm import ParamsLGSSM
from dynamax.linear_gaussian_ssm.inference import ParamsLGSSMInitial
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike

from elkax.gaussian import Covariance, Form, Model, SquareRoot
from elkax.gaussian.decorrelation import needs_no_own_factor
from elkax.scan.lanes import is_short
from elkax.smoothers.assembly import assemble
from elkax.smoothers.checks import (
    check_data,
    check_inputs,
    check_symmetric,
    check_variances,
    falls_too_far,
    is_concrete,
    may_be_exact,
    real_array,
    series_array,
)
from elkax.smoothers.diffuse_initial import DiffuseInitial

FORMS: dict[str, Any] = {"covariance": Covariance, "square_root": SquareRoot}


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["model", "weights", "offset", "cov", "emissions", "finite"],
    meta_fields=["diagonal", "diffuse", "exact_entries", "too_far"],
)
@dataclass(frozen=True)
class Problem:
    """A model with its data, as the kernels need it and as the user gave it.

    Attributes:
        model: covariances themselves.
        weights: $H$, (N, D) or (T, N, D).
        offset: $d_t + D_tu_t$, (N,) or (T, N); NaN at times without observation whose inputs are.
        cov: $R$, (N,), (T, N), (N, N) or (T, N, N) as given.
        diagonal: whether `cov` holds variances only.
        emissions: (T, N), NaN where missing.
        finite: whether all is finite that states and observations depend on.
        diffuse: which initial states are exactly diffuse.
        exact_entries: whether a measurement without error may occur.
        too_far: see `falls_too_far`.
    """

    model: Model
    weights: Array
    offset: Array
    cov: Array
    diagonal: bool
    emissions: Array
    finite: Array
    diffuse: tuple[bool, ...] = ()
    exact_entries: bool = True
    too_far: frozenset[str] = frozenset()


def find_form(
    form: str | None, dtype: DTypeLike, *, exact_entries: bool = True, too_far: bool = False
) -> Form:
    """Return the form of that name; if None, factors where digits are few, else covariances.

    Args:
        form: "covariance", "square_root" or None.
        dtype: of the computation.
        exact_entries: whether a measurement without error may occur.
        too_far: whether variances fall too far for covariances, see `falls_too_far`.

    Raises:
        ValueError: on an unknown name.
    """
    if form is None:
        form = "square_root" if too_far or is_short(dtype) else "covariance"
    if form not in FORMS:
        raise ValueError(f"form must be None or one of {sorted(FORMS)}, got {form!r}")
    return FORMS[form](exact_entries=exact_entries)


def check_count(name: str, value: Any) -> None:
    """Raise unless `value` is a positive integer that is known when the program is built."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def check_backend(backend: Any) -> None:
    """Raise TypeError unless `backend` is None or an instance of a backend."""
    if backend is not None and (isinstance(backend, type | str) or not callable(backend)):
        raise TypeError(
            "backend must be None or a backend object such as elkax.Sequential() or "
            f"elkax.Blocked(32), got {backend!r}"
        )


def prepare(
    params: ParamsLGSSM,
    emissions: ArrayLike,
    inputs: ArrayLike | None = None,
    *,
    length: ArrayLike | None = None,
    continues: bool = False,
) -> Problem:
    """Check parameters and data and bring them to the form that the kernels take.

    Args:
        params: dynamax parameters; entries may be None (biases, input weights), arrays, arrays
            with a leading time axis, or callables of t. Of diffuse states, those of a
            `DiffuseInitial` and concrete infinite variances, the model has mean and covariance
            zero.
        emissions: (T, N), or (T,) where N = 1; NaN is missing, integers are promoted.
        inputs: (T, U).
        length: number of time steps that exist, the rest being padding; all if None.
        continues: whether there are steps before the first of these, so that entry 0 of the
            dynamics is used.

    Raises:
        ValueError: on shapes that do not fit each other, T = 0, several series, inputs missing
            where the model has input weights; and on concrete values that cannot be: matrices that
            are no covariances, infinite emissions, inputs that are not finite where they are used,
            no observation at all of a model whose every state is diffuse.
        TypeError: on arrays that hold no real numbers.
    """
    emissions = series_array(emissions, params.emissions.weights)
    num_timesteps, emission_dim = emissions.shape
    arrays = _evaluate(params, num_timesteps)
    _check_shapes(arrays, num_timesteps, emission_dim)
    diffuse = diffuse_mask(params.initial)
    arrays = arrays._replace(initial=_without_diffuse(arrays.initial, diffuse))
    _check_covariances(arrays, emission_dim)
    inputs = _check_inputs(arrays, inputs, num_timesteps)
    valid = valid_steps(length, num_timesteps)
    _check_values(arrays, emissions, inputs, valid, continues=continues)
    dtype = jnp.result_type(*(leaf for leaf in jax.tree.leaves((arrays, emissions, inputs))))
    dtype = dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.result_type(float)
    arrays, emissions, inputs = jax.tree.map(
        lambda leaf: leaf.astype(dtype), (arrays, emissions, inputs)
    )
    r = arrays.emissions.cov
    full = r.ndim == 3 or r.shape == (emission_dim,) * 2
    # Known now, R needs but one factor.
    alike = (
        full
        and r.ndim == 2
        and is_concrete(emissions)
        and bool(needs_no_own_factor(~np.isnan(np.asarray(emissions))).all())
    )
    model, offset, emissions, finite = assemble(
        arrays,
        emissions,
        inputs,
        valid,
        continues=continues,
        full=full,
        alike=alike,
    )
    return Problem(
        model,
        arrays.emissions.weights,
        offset,
        r,
        not full,
        emissions,
        finite,
        diffuse,
        may_be_exact(params.emissions.cov, full=full),
        falls_too_far(arrays.initial.cov, arrays.dynamics, arrays.emissions.weights, r, full=full),
    )


def diffuse_mask(initial: ParamsLGSSMInitial) -> tuple[bool, ...]:
    """Tell which states are exactly diffuse: those marked, and concrete infinite variances.

    Args:
        initial: dynamax's record, or a `DiffuseInitial`.

    Raises:
        ValueError: if the mask of the record does not fit its mean.
    """
    size = jnp.shape(jnp.asarray(initial.mean))[-1]
    mask = np.zeros(size, bool)
    if isinstance(initial, DiffuseInitial):
        if len(initial.diffuse) != size:
            raise ValueError(
                f"params.initial.diffuse must be {size} bools, one for each state, got "
                f"{len(initial.diffuse)}: {initial.diffuse}"
            )
        mask |= initial.diffuse
    if is_concrete(initial.cov):
        mask |= np.isposinf(np.diagonal(np.asarray(initial.cov, float)))
    return tuple(mask.tolist())


def _without_diffuse(initial: ParamsLGSSMInitial, diffuse: tuple[bool, ...]) -> ParamsLGSSMInitial:
    """Put zeros where diffuse states have their mean and covariances."""
    if not any(diffuse):
        return ParamsLGSSMInitial(mean=initial.mean, cov=initial.cov)
    mask = np.array(diffuse)
    return ParamsLGSSMInitial(
        mean=jnp.where(mask, 0, initial.mean),
        cov=jnp.where(mask[:, None] | mask, 0, initial.cov),
    )


def _evaluate(params: ParamsLGSSM, length: int) -> ParamsLGSSM:
    """Turn every entry into an array, callables of t into arrays over time."""

    def to_array(name: str, value: Any) -> Any:
        if value is None:
            return None
        if callable(value):
            function: Callable = value
            value = jax.vmap(lambda t: jnp.asarray(function(t)))(jnp.arange(length))
        return real_array(name, value)

    groups = {}
    for group in ("initial", "dynamics", "emissions"):
        fields = getattr(params, group)
        groups[group] = fields._replace(
            **{k: to_array(f"params.{group}.{k}", v) for k, v in fields._asdict().items()}
        )
    for group, field in (
        ("initial", "mean"),
        ("initial", "cov"),
        ("dynamics", "weights"),
        ("dynamics", "cov"),
        ("emissions", "weights"),
        ("emissions", "cov"),
    ):
        if getattr(groups[group], field) is None:
            raise ValueError(f"params.{group}.{field} must be given, got None")
    return ParamsLGSSM(**groups)


def _check_shapes(arrays: ParamsLGSSM, length: int, emission_dim: int) -> None:
    """Compare every shape with T, D and N."""
    initial, dynamics, emission = arrays
    # The dimension that most of the four agree on, so that the odd one out is the one named.
    sizes = [
        value.shape[-1] if value.ndim else 0
        for value in (initial.mean, initial.cov, dynamics.weights, dynamics.cov)
    ]
    d, n = max(sizes, key=sizes.count), emission_dim
    if d == 0:
        raise ValueError(f"params.initial.mean must be (D,), got shape {initial.mean.shape}")
    r_shapes = [(n, n), (n,), (length, n, n), (length, n)]

    def check(name: str, value: Array | None, *shapes: tuple) -> None:
        if value is None:
            return
        if not any(
            len(s) == value.ndim
            and all(w in (None, g) for w, g in zip(s, value.shape, strict=True))
            for s in shapes
        ):
            expected = " or ".join(str(s).replace("None", "U") for s in shapes)
            raise ValueError(
                f"{name} must have shape {expected} (T = {length}, state dimension D = {d}, "
                f"emission dimension N = {n}), got {value.shape}"
            )

    check("params.initial.mean", initial.mean, (d,))
    check("params.initial.cov", initial.cov, (d, d))
    check("params.dynamics.weights", dynamics.weights, (d, d), (length, d, d))
    check("params.dynamics.bias", dynamics.bias, (d,), (length, d))
    check("params.dynamics.cov", dynamics.cov, (d, d), (length, d, d))
    check("params.dynamics.input_weights", dynamics.input_weights, (d, None), (length, d, None))
    check("params.emissions.weights", emission.weights, (n, d), (length, n, d))
    check("params.emissions.bias", emission.bias, (n,), (length, n))
    check("params.emissions.cov", emission.cov, *r_shapes)
    check("params.emissions.input_weights", emission.input_weights, (n, None), (length, n, None))


def _check_covariances(arrays: ParamsLGSSM, emission_dim: int) -> None:
    """Look at the covariances that are known now."""
    q, r = arrays.dynamics.cov, arrays.emissions.cov
    check_symmetric("params.initial.cov", arrays.initial.cov)
    check_symmetric("params.dynamics.cov", q, skip_first=q.ndim == 3)
    if r.ndim == 3 or r.shape == (emission_dim,) * 2:
        check_symmetric("params.emissions.cov", r)
    else:
        check_variances("params.emissions.cov", r)


def _check_inputs(arrays: ParamsLGSSM, inputs: Any, length: int) -> Array:
    """Return the inputs as (T, U), U = 0 if there are none."""
    widths = {
        name: weights.shape[-1]
        for name, weights in (
            ("params.dynamics.input_weights", arrays.dynamics.input_weights),
            ("params.emissions.input_weights", arrays.emissions.input_weights),
        )
        if weights is not None
    }
    if inputs is None:
        used = [name for name, width in widths.items() if width > 0]
        if used:
            raise ValueError(
                f"inputs must be given, because the model has {used[0]} for "
                f"{widths[used[0]]} inputs; got None"
            )
        return jnp.zeros((length, 0), arrays.initial.mean.dtype)
    inputs = real_array("inputs", inputs)
    if inputs.ndim != 2 or inputs.shape[0] != length:
        raise ValueError(
            f"inputs must be (T, U) with T = {length} as the emissions, got shape {inputs.shape}"
        )
    for name, width in widths.items():
        if width != inputs.shape[1]:
            raise ValueError(f"{name} is for {width} inputs, but inputs has shape {inputs.shape}")
    return inputs


def _check_values(
    arrays: ParamsLGSSM, emissions: Array, inputs: Array, valid: Array | None, *, continues: bool
) -> None:
    """Look at the emissions and inputs that are known now."""
    check_data(emissions, valid)
    if not is_concrete(inputs, valid) or inputs.shape[1] == 0:
        return
    exists = np.ones(len(inputs), bool) if valid is None else np.asarray(valid)
    if arrays.dynamics.input_weights is not None:
        # Entry 0 belongs to no step.
        steps = exists if continues else exists & (np.arange(len(inputs)) > 0)
        check_inputs(inputs, steps, "the step into the state")
    if arrays.emissions.input_weights is not None and is_concrete(emissions):
        observed = ~np.isnan(np.asarray(emissions)).all(1)
        check_inputs(inputs, exists & observed, "an observation")


def valid_steps(length: ArrayLike | None, num_timesteps: int) -> Array | None:
    """Mark the time steps that exist, None if all do.

    Raises:
        ValueError: if the length is not one integer in 1, ..., T.
    """
    if length is None:
        return None
    length = jnp.asarray(length)
    if length.ndim != 0 or not jnp.issubdtype(length.dtype, jnp.integer):
        raise ValueError(
            f"length must be one integer (use vmap for a batch), got shape {length.shape} and "
            f"dtype {length.dtype}"
        )
    if is_concrete(length) and not 1 <= int(length) <= num_timesteps:
        raise ValueError(f"length must lie in 1, ..., T = {num_timesteps}, got {int(length)}")
    return jnp.arange(num_timesteps) < length
