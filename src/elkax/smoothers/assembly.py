"""The model that the kernels run on, computed in one program from checked arrays."""

from functools import partial

import jax
import jax.numpy as jnp
from dynamax.linear_gaussian_ssm import ParamsLGSSM
from dynamax.linear_gaussian_ssm.inference import ParamsLGSSMEmissions
from jaxtyping import Array

from elkax.gaussian import Model
from elkax.gaussian.decorrelation import uncorrelate


@partial(jax.jit, static_argnames=("continues", "full", "alike"))
def assemble(
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
    observed = ~jnp.isnan(emissions)
    if valid is not None:
        observed = observed & valid[:, None]
    # Entry 0 belongs to no step, whatever it holds.
    stepping = inputs if continues else inputs.at[0].set(0.0)
    offset = _affine_offset(dynamics.bias, dynamics.input_weights, stepping, state_dim)
    varying = {
        "weights": (dynamics.weights, 2),
        "offset": (offset, 1),
        "noise": (dynamics.cov, 2),
    }
    moving = {
        name: array.at[0].set(0.0) if array.ndim > rank and not continues else array
        for name, (array, rank) in varying.items()
    }
    shift, shown = _emission_offset(emission, inputs, observed)
    h, r = _of_observations(emission.weights, emission.cov, observed, full=full)
    residual = jnp.where(observed, emissions - shift, 0.0)
    parts = (initial.mean, initial.cov, *moving.values(), h, shift, r, residual)
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
    return model, shown, jnp.where(observed, emissions, jnp.nan), finite


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


def _emission_offset(
    emission: ParamsLGSSMEmissions, inputs: Array, observed: Array
) -> tuple[Array, Array]:
    """Compute the offset of emissions, as observations need it and as it is shown.

    Inputs that are not finite matter at no time without an observation: there they are left out,
    of derivatives too, and NaN is shown.
    """
    size = observed.shape[1]
    if emission.input_weights is None or inputs.shape[1] == 0:
        shift = shown = _affine_offset(emission.bias, None, inputs, size)
    else:
        unused = ~jnp.any(observed, axis=1)[:, None] & ~jnp.isfinite(inputs)
        known = jnp.where(unused, 0.0, inputs)
        shift = _affine_offset(emission.bias, emission.input_weights, known, size)
        shown = jnp.where(jnp.any(unused, axis=1)[:, None], jnp.nan, shift)
    if shift.ndim == 2:
        shift = jnp.where(observed | jnp.isfinite(shift), shift, 0.0)
    return shift, shown


def _of_observations(h: Array, r: Array, observed: Array, *, full: bool) -> tuple[Array, Array]:
    """Replace what is not finite in rows of H and R that belong to no observation."""
    if h.ndim == 3:
        h = jnp.where(observed[:, :, None] | jnp.isfinite(h), h, 0.0)
    if r.ndim > 1 + full:
        needed = observed[:, :, None] & observed[:, None] if full else observed
        r = jnp.where(needed | jnp.isfinite(r), r, 0.0)
    return h, r
