"""The trainable numbers of a model as one unconstrained vector."""

import jax
import jax.numpy as jnp
from dynamax.linear_gaussian_ssm import ParamsLGSSM
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float


class FreeParameters:
    """Map between a model's parameters and the vector of its trainable, unconstrained numbers.

    Frozen parameters never pass through a constraint, so they may lie on its boundary (an exact
    zero covariance), and parameters may be None.

    Args:
        params: constrained parameters.
        props: dynamax's properties in the same places.

    Attributes:
        theta: the vector (p,) that belongs to `params`.
    """

    def __init__(self, params: ParamsLGSSM, props: ParamsLGSSM) -> None:
        """Flatten the trainable parameters."""
        self._params = params
        self._free = [
            (group, name, getattr(getattr(props, group), name).constrainer)
            for group, values in params._asdict().items()
            for name, value in values._asdict().items()
            if value is not None and getattr(getattr(props, group), name).trainable
        ]
        unconstrained = []
        for group, name, constrainer in self._free:
            value = getattr(getattr(params, group), name)
            unconstrained.append(value if constrainer is None else constrainer.inverse(value))
        self.theta, self._unravel = ravel_pytree(unconstrained)

    def values(self, theta: Float[Array, " p"]) -> Float[Array, " m"]:
        """Flatten the constrained values of the trainable parameters."""
        return ravel_pytree(self._constrained(theta))[0]

    def constrain(self, theta: Float[Array, " p"]) -> ParamsLGSSM:
        """Give all parameters for a vector."""
        return self._put(self._constrained(theta), self._params)

    def place(self, values: Float[Array, " m"]) -> ParamsLGSSM:
        """Put flat numbers in the places of the trainable values, and zeros in the frozen ones."""
        _, restore = ravel_pytree(self._constrained(self.theta))
        return self._put(restore(values), jax.tree.map(jnp.zeros_like, self._params))

    def _constrained(self, theta: Array) -> list[Array]:
        pairs = zip(self._free, self._unravel(theta), strict=True)
        return [value if free[2] is None else free[2](value) for free, value in pairs]

    def _put(self, values: list[Array], params: ParamsLGSSM) -> ParamsLGSSM:
        for (group, name, _), value in zip(self._free, values, strict=True):
            changed = getattr(params, group)._replace(**{name: value})
            params = params._replace(**{group: changed})
        return params
