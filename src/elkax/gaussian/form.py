"""What a way to store covariances must offer."""

from typing import Protocol, runtime_checkable

from jaxtyping import Array


@runtime_checkable
class Form(Protocol):
    """How a covariance is stored; see `Covariance` and `SquareRoot`."""

    def encode(self, covariance: Array) -> Array:
        """Store a covariance."""
        ...

    def exact(self, matrix: Array) -> Array:
        """Let a stored covariance, or a gain, carry what later roundings leave out of it."""
        ...

    def decode(self, stored: Array) -> Array:
        """Return the covariance."""
        ...

    def cholesky(self, stored: Array, *, written_out: bool = False) -> Array:
        """Return a lower factor, possibly singular."""
        ...

    def times(self, stored: Array, x: Array) -> Array:
        """Multiply the covariance with a vector."""
        ...

    def predict(self, weights: Array, stored: Array, noise: Array) -> Array:
        """Propagate through an affine-Gaussian step."""
        ...

    def carry(self, weights: Array, stored: Array, noise: Array) -> tuple[Array, Array]:
        """Propagate, and give the covariance of what was with what comes."""
        ...

    def reverse(self, weights: Array, stored: Array, noise: Array) -> tuple[Array, Array, Array]:
        """Turn an affine-Gaussian step around."""
        ...

    def smooth(
        self, weights: Array, stored: Array, noise: Array, after: Array
    ) -> tuple[Array, Array, Array]:
        """Turn it around, and carry a covariance back."""
        ...

    def project(self, stored: Array, row: Array, variance: Array) -> tuple[Array, Array]:
        """Begin a scalar update: the projection on its row, and the innovation variance."""
        ...

    def rounding(self, floor: Array) -> Array:
        """Return the rounding level of an innovation variance."""
        ...

    def update(
        self, stored: Array, projection: Array, variance: Array, s: Array, active: Array
    ) -> tuple[Array, Array]:
        """End a scalar update: the gain and the conditional covariance."""
        ...

    def accumulate(self, stored: Array, low: Array, columns: Array) -> tuple[Array, Array]:
        """Add the squares of columns to an information matrix that rounding left `low` out of."""
        ...

    def condition(self, stored: Array, information: Array) -> Array:
        """Condition on information about the state itself."""
        ...
