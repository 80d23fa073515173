"""What a way to store covariances must offer."""

from typing import Protocol, runtime_checkable

from jax.typing import DTypeLike
from jaxtyping import Array


@runtime_checkable
class Form(Protocol):
    """How a covariance is stored; see `Covariance` and `SquareRoot`.

    Attributes:
        exact_entries: whether measurements without error (r = 0) may occur. What rounding left in
            a covariance is then carried beside it, see `KalmanFilter`.
    """

    exact_entries: bool

    def encode(self, covariance: Array) -> Array:
        """Store a covariance."""
        ...

    def exact(self, matrix: Array) -> Array:
        """Let a stored covariance, or a gain, carry what later roundings leave out of it."""
        ...

    def decode(self, stored: Array) -> Array:
        """Return the covariance."""
        ...

    def variances(self, stored: Array) -> Array:
        """Return the diagonal of the covariance."""
        ...

    def rounding(self, dtype: DTypeLike) -> tuple[float, float]:
        """Give the unit that a variance is rounded by, and how many of them tell nothing."""
        ...

    def times(self, stored: Array, x: Array) -> Array:
        """Multiply the covariance with a vector."""
        ...

    def predict(self, weights: Array, stored: Array, noise: Array) -> Array:
        """Propagate through an affine-Gaussian step."""
        ...

    def project(self, stored: Array, row: Array, variance: Array) -> tuple[Array, Array]:
        """Begin a scalar update: the projection on its row, and the innovation variance."""
        ...

    def gain(self, stored: Array, projection: Array) -> Array:
        """Compute the covariance of the state with the scalar."""
        ...

    def update(
        self, stored: Array, row: Array, projection: Array, variance: Array, s: Array, gain: Array
    ) -> Array:
        """End a scalar update: the conditional covariance."""
        ...

    def correct(self, stored: Array, row: Array, variance: Array, gain: Array) -> Array:
        """Compute the covariance after a correction by any gain."""
        ...

    def settle(self, stored: Array) -> Array:
        """Make good what updates leave to be done once."""
        ...

    def accumulate(self, stored: Array, low: Array, columns: Array) -> tuple[Array, Array]:
        """Add the squares of columns to an information matrix that rounding left `low` out of."""
        ...

    def condition(self, stored: Array, information: Array) -> Array:
        """Condition on information about the state itself."""
        ...
