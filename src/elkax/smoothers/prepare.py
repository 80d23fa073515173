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
from elkax.gaussian.decorrelation import needs_no_own_factor, uncorrelate
from elkax.scan.lanes import is_short

FORMS: dict[str, Any] = {"covariance": Covariance, "square_root": SquareRoot}


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["model", "weights", "offset", "cov", "emissions", "finite"],
    meta_fields=["diagonal", "diffuse", "exact_entries"],
)
@dataclass(frozen=True)
class Problem:
    """A model with its data, as the kernels need it and as the user gave it.

    Attributes:
        model: covariances themselves.
        weights: $H$, (N, D) or (T, N, D).
        offset: $d_t + D_tu_t$, (N,) or (T, N).
        cov: $R$, (N,), (T, N), (N, N) or (T, N, N) as given.
        diagonal: whether `cov` holds variances only.
        emissions: (T, N), NaN where missing.
        finite: whether every parameter is finite.
        diffuse: which initial states are exactly diffuse; empty if none is.
        exact_entries: whether a measurement without error may occur.
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


def find_form(form: str | None, dtype: DTypeLike, *, exact_entries: bool = True) -> Form:
    """Return the form of that name; if None, factors in types of few digits, else covariances.

    Args:
        form: "covariance", "square_root" or None.
        dtype: of the computation.
        exact_entries: whether a measurement without error may occur.

    Raises:
        ValueError: on an unknown name.
    """
    if form is None:
        form = "square_root" if is_short(dtype) else "covariance"
    if form not in FORMS:
        raise ValueError(f"form must be None or one of {sorted(FORMS)}, got {form!r}")
    return FORMS[form](exact_entries=exact_entries)


def diffuse_mask(initial: Any) -> tuple[bool, ...]:
    """Tell which initial states are exactly diffuse; empty if none is."""
    return getattr(initial, "diffuse", ())


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


def is_concrete(*values: Any) -> bool:
    """Tell whether the values can be looked at now, not only when the program runs."""
    return not any(isinstance(value, jax.core.Tracer) for value in values)


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
            with a leading time axis, or callables of t.
        emissions: (T, N); NaN is missing, integers are promoted.
        inputs: (T, U).
        length: number of time steps that exist, the rest being padding; all if None.
        continues: whether there are steps before the first of these, so that entry 0 of the
            dynamics is used.

    Raises:
        ValueError: on shapes that do not fit each other, T = 0, covariances that are not
            symmetric, inputs missing where the model has input weights.
        TypeError: on arrays that hold no real numbers.
    """
    emissions = real_array("emissions", emissions)
    if emissions.ndim != 2 or emissions.shape[0] == 0 or emissions.shape[1] == 0:
        raise ValueError(
            "emissions must be (T, N) with T >= 1 and N >= 1, one row per time step, got shape "
            f"{emissions.shape}"
        )
    num_timesteps, emission_dim = emissions.shape
    diffuse = getattr(params.initial, "diffuse", ())
    if diffuse:
        mask = np.array(diffuse)
        cov = jnp.where(mask[:, None] | mask, 0.0, params.initial.cov)
        mean = jnp.where(mask, 0.0, params.initial.mean)
        params = params._replace(initial=ParamsLGSSMInitial(mean, cov))
    arrays = _evaluate(params, num_timesteps)
    _check_shapes(arrays, num_timesteps, emission_dim)
    inputs = _check_inputs(arrays, inputs, num_timesteps)
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
    model, offset, emissions, finite = _assemble(
        arrays,
        emissions,
        inputs,
        valid_steps(length, num_timesteps),
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
        _may_be_exact(params.emissions.cov, full=full),
    )


def _may_be_exact(cov: Any, *, full: bool) -> bool:
    """Tell whether a measurement may be without error; it may where that cannot be looked at."""
    if callable(cov) or not is_concrete(cov):
        return True
    known = np.asarray(cov, float)
    if not full:
        return not np.all(known > 0)
    if known.ndim == 3 and known.shape[-1] > 1:
        return True
    sizes = np.sqrt(np.abs(np.diagonal(known, axis1=-2, axis2=-1)))
    if not np.all(sizes > 0) or not np.all(np.isfinite(sizes)):
        return True
    correlations = known / (sizes[..., :, None] * sizes[..., None, :])
    # Far above the level at which a pivot of R is taken for zero, in float32 as well.
    return bool(np.min(np.linalg.eigvalsh(correlations)) < 1e-3)


def real_array(name: str, value: Any) -> Array:
    """Return `value` as an array of real numbers, or raise TypeError that names it."""
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be an array of real numbers, got {type(value)}") from error
    if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
        raise TypeError(f"{name} must hold real numbers, got dtype {array.dtype}")
    return array


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
        groups[group] = type(fields)(
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
    check_symmetric("params.initial.cov", initial.cov)
    check_symmetric("params.dynamics.cov", dynamics.cov, skip_first=dynamics.cov.ndim == 3)
    if emission.cov.shape in ((n, n), (length, n, n)):
        check_symmetric("params.emissions.cov", emission.cov)


def check_symmetric(name: str, value: Array, *, skip_first: bool = False) -> None:
    """Raise ValueError if a concrete covariance is not symmetric or has a negative variance."""
    if not is_concrete(value):
        return
    cov = np.asarray(value)[1:] if skip_first else np.asarray(value)
    gap = np.abs(cov - np.swapaxes(cov, -1, -2))
    with np.errstate(invalid="ignore"):
        scale = np.max(np.abs(cov), initial=0.0)
        wrong = np.max(gap, initial=0.0) > np.sqrt(np.finfo(gap.dtype).eps) * scale
        negative = np.any(np.diagonal(cov, axis1=-2, axis2=-1) < 0)
    if wrong:
        raise ValueError(
            f"{name} must be symmetric, got entries that differ from their mirror images by "
            f"{np.nanmax(gap):.3g}"
        )
    if negative:
        raise ValueError(f"{name} must have variances >= 0 on its diagonal, got a negative one")


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


@partial(jax.jit, static_argnames=("continues", "full", "alike"))
def _assemble(
    arrays: ParamsLGSSM,
    emissions: Array,
    inputs: Array,
    valid: Array | None,
    *,
    continues: bool,
    full: bool,
    alike: bool,
) -> tuple[Model, Array, Array, Array]:
    """Compute the model, and of a `Problem` offset, emissions and whether all is finite."""
    length, emission_dim = emissions.shape
    if valid is not None:
        arrays, inputs = _without_padding(arrays, inputs, valid, 2 if full else 1)
    initial, dynamics, emission = arrays
    state_dim = initial.mean.shape[0]
    offset = _affine_offset(dynamics.bias, dynamics.input_weights, inputs, state_dim)
    shift = _affine_offset(emission.bias, emission.input_weights, inputs, emission_dim)
    varying = {
        "weights": (dynamics.weights, 2),
        "offset": (offset, 1),
        "noise": (dynamics.cov, 2),
    }
    # Entry 0 belongs to no step, whatever it holds.
    moving = {
        name: array.at[0].set(0.0) if array.ndim > rank and not continues else array
        for name, (array, rank) in varying.items()
    }
    h, r = emission.weights, emission.cov
    observed = ~jnp.isnan(emissions)
    if valid is not None:
        observed = observed & valid[:, None]
    residual = jnp.where(observed, emissions - shift, 0.0)
    parts = (initial.mean, initial.cov, *moving.values(), h, shift, r)
    finite = jnp.all(jnp.isfinite(jnp.concatenate([jnp.ravel(part) for part in parts])))
    model = Model(
        initial_mean=initial.mean,
        initial_cov=initial.cov,
        **moving,
        rows=h,
        variances=None if full else r,
        values=residual,
        observed=observed,
        first=(jnp.arange(length) == 0).astype(emissions.dtype),
        valid=valid,
        correlated=r if full else None,
    )
    if alike:
        model = uncorrelate(model, alike=True)
    return model, shift, jnp.where(observed, emissions, jnp.nan), finite


def _without_padding(
    arrays: ParamsLGSSM, inputs: Array, valid: Array, cov_rank: int
) -> tuple[ParamsLGSSM, Array]:
    """Replace what stands in padding, so that it spreads neither forward nor in a derivative."""

    def clean(array: Array | None, rank: int) -> Array | None:
        if array is None or array.ndim == rank:
            return array
        return jnp.where(valid.reshape((-1,) + (1,) * rank), array, 0.0)

    _, dynamics, emission = arrays
    dynamics = type(dynamics)(
        weights=clean(dynamics.weights, 2),
        bias=clean(dynamics.bias, 1),
        input_weights=clean(dynamics.input_weights, 2),
        cov=clean(dynamics.cov, 2),
    )
    emission = type(emission)(
        weights=clean(emission.weights, 2),
        bias=clean(emission.bias, 1),
        input_weights=clean(emission.input_weights, 2),
        cov=clean(emission.cov, cov_rank),
    )
    inputs = jnp.where(valid[:, None], inputs, 0.0)
    return arrays._replace(dynamics=dynamics, emissions=emission), inputs


def _affine_offset(bias: Array | None, weights: Array | None, inputs: Array, size: int) -> Array:
    """Compute bias + weights u, without a time axis if it is the same at all times."""
    offset = jnp.zeros(size, inputs.dtype) if bias is None else bias
    if weights is None or weights.shape[-1] == 0:
        return offset
    return offset + jnp.einsum("...ij,...j->...i", weights, inputs, precision="highest")
