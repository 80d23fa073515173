"""The initial distribution of a state of which something is not known at all."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from dynamax.linear_gaussian_ssm.inference import ParamsLGSSMInitial
from jaxtyping import ArrayLike


@jax.tree_util.register_pytree_with_keys_class
class DiffuseInitial(ParamsLGSSMInitial):
    r"""dynamax's record of the initial distribution, with the states that are exactly diffuse.

    Taken wherever dynamax's record is. It is a pytree of mean and covariance; which states are
    diffuse is part of its structure, so that a proper start pays nothing for it.

    Args:
        mean: (D,); entries of diffuse states do not matter.
        cov: (D, D); rows and columns of diffuse states do not matter. `of` writes an infinite
            variance there, so that a function which does not know this record gives NaN and not a
            wrong number.
        diffuse: which states are diffuse, one bool each.
    """

    diffuse: tuple[bool, ...]

    def __new__(cls, mean: Any, cov: Any, diffuse: Any = ()) -> "DiffuseInitial":
        """Make the record; nothing is checked, since JAX puts placeholders into pytrees."""
        self = super().__new__(cls, mean, cov)
        self.diffuse = tuple(bool(each) for each in diffuse)
        return self

    @classmethod
    def of(cls, mean: ArrayLike, cov: ArrayLike, diffuse: Any) -> "DiffuseInitial":
        """Make the record with mean zero and an infinite variance for diffuse states.

        Args:
            mean: (D,).
            cov: (D, D).
            diffuse: D bools.
        """
        mean, cov, mask = jnp.asarray(mean), jnp.asarray(cov), np.asarray(diffuse, bool)
        proper = ~mask[:, None] & ~mask[None]
        cov = jnp.where(proper, cov, jnp.where(np.diag(mask), jnp.inf, 0.0))
        return cls(jnp.where(mask, 0.0, mean), cov.astype(mean.dtype), mask)

    def _replace(self, **changes: Any) -> "DiffuseInitial":
        """Return a copy with other fields; `diffuse` is kept unless it is named."""
        fields = {"mean": self.mean, "cov": self.cov, "diffuse": self.diffuse, **changes}
        return type(self)(**fields)

    def __repr__(self) -> str:
        """Show the arrays and the mask."""
        return f"DiffuseInitial(mean={self.mean!r}, cov={self.cov!r}, diffuse={self.diffuse})"

    def __eq__(self, other: object) -> bool:
        """Compare as tuples do, and the mask."""
        same = super().__eq__(other)
        return same and self.diffuse == getattr(other, "diffuse", self.diffuse)

    __hash__ = ParamsLGSSMInitial.__hash__

    def tree_flatten_with_keys(self) -> tuple[tuple, tuple[bool, ...]]:
        """Give the arrays with their names, and the mask as structure."""
        key = jax.tree_util.GetAttrKey
        return ((key("mean"), self.mean), (key("cov"), self.cov)), self.diffuse

    def tree_flatten(self) -> tuple[tuple, tuple[bool, ...]]:
        """Give the arrays, and the mask as structure."""
        return (self.mean, self.cov), self.diffuse

    @classmethod
    def tree_unflatten(cls, diffuse: tuple[bool, ...], children: tuple) -> "DiffuseInitial":
        """Put a record together."""
        mean, cov = children
        return cls(mean, cov, diffuse)
