"""What a linearizer makes of one time step."""

from collections.abc import Callable
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array

Function = Callable[[Array], Array]


class Affine(NamedTuple):
    r"""An affine-Gaussian map $z \mapsto N(Az + b, \Omega)$ of one time step.

    Attributes:
        weights: $A$ (n, D).
        offset: $b$ (n,).
        cov: $\Omega$ (n, n), what the affine map leaves out; None where that is zero by definition.
    """

    weights: Array
    offset: Array
    cov: Array | None


@runtime_checkable
class Linearizer(Protocol):
    """How a function of the state becomes an affine-Gaussian map, given where the state lies.

    Both methods belong to one time step, without a time axis; the caller maps them over time. A
    linearizer is hashable, so that it can be a static argument of a jitted function.
    """

    uses_covariance: ClassVar[bool]

    def __call__(self, function: Function, mean: Array, cov: Array | None) -> Affine:
        """Linearize `function`, (D,) to (n,), about $N(m, P)$.

        Args:
            function: of the state.
            mean: $m$ (D,).
            cov: $P$ (D, D), possibly singular; not read, and None, unless `uses_covariance`.
        """
        ...

    def expect(
        self,
        function: Function,
        mean: Array,
        cov: Array | None,
        *,
        semidefinite: bool = False,
    ) -> Array:
        """Approximate the expectation of a function, of any output shape, over $N(m, P)$.

        For a function (D,) to (n,) it equals $Am + b$ of its linearization.

        Args:
            function: of the state.
            mean: $m$ (D,).
            cov: $P$ (D, D), possibly singular; not read, and None, unless `uses_covariance`.
            semidefinite: whether semi-definite matrices must have a semi-definite expectation.
        """
        ...
