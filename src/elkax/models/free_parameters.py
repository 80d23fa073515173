"""The trainable numbers of a model as one unconstrained vector."""

import jax
import jax.numpy as jnp
from dynamax.linear_gaussian_ssm import ParamsLGSSM
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from elkax.smoothers.prepare import diffuse_mask


class FreeParameters:
    """Map between a model's parameters and the vector of its trainable, unconstrained numbers.

    Frozen parameters never pass through a constraint, so they may lie on its boundary (an exact
    zero covariance), and parameters may be None. An initial distribution with a state that is
    exactly diffuse counts as frozen, whatever its properties: there is nothing to learn in it.

    Args:
        params: constrained parameters.
        props: dynamax's properties in the same places.

    Attributes:
        theta: the vector (p,) that belongs to `params`.
        constrainers: place (group, name) and constrainer of each trainable parameter, in the order
            of `theta`.
    """

    def __init__(self, params: ParamsLGSSM, props: ParamsLGSSM) -> None:
        """Flatten the trainable parameters."""
        self._params = params
        diffuse = any(diffuse_mask(params.initial))
        self.constrainers = {
            (group, name): getattr(getattr(props, group), name).constrainer
            for group, values in params._asdict().items()
            for name, value in values._asdict().items()
            if value is not None and getattr(getattr(props, group), name).trainable
            if not (diffuse and group == "initial")
        }
        unconstrained = []
        for (group, name), constrainer in self.constrainers.items():
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
        pairs = zip(self.constrainers.values(), self._unravel(theta), strict=True)
        return [value if constrain is None else constrain(value) for constrain, value in pairs]

    def _put(self, values: list[Array], params: ParamsLGSSM) -> ParamsLGSSM:
        for (group, name), value in zip(self.constrainers, values, strict=True):
            changed = getattr(params, group)._replace(**{name: value})
            params = params._replace(**{group: changed})
        return params
