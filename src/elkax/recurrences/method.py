r"""The methods: what is kept of the Jacobian, how steps are damped, and in which form.

| Jacobian kept | no damping | damped |
|---|---|---|
| zero | `Jacobi` | |
| identity | `Picard` | |
| diagonal, block-diagonal | `QuasiDEER` | `QuasiELK` |
| full | `DEER` | `ELK` |
"""

from dataclasses import dataclass
from typing import Any

from elkax.linearize import (
    BlockDiagonal,
    Dampable,
    Diagonal,
    Full,
    Identity,
    Structure,
    Zero,
)
from elkax.recurrences.damping import ConstantDamping, PrefixDamping
from elkax.smoothers.damping import Damping


@dataclass(frozen=True)
class Method:
    r"""How a recurrence is evaluated in parallel; see `evaluate_recurrence`.

    Every iteration solves $\delta_t = A_t\delta_{t-1} + r_t$ for the change of the trajectory,
    $r_t = f(s_{t-1}, x_t) - s_t$, A being what is kept of the Jacobian. Damped, it is estimated by
    a Kalman filter or smoother with process noise $\lambda I$ from observations $\delta_t = 0$ of
    variance one. The first state is exact from the start and is not estimated.

    Args:
        jacobian: a structure.
        damping: how $\lambda$ is chosen; none if None.
        form: "filter", the filtered means, as published for ELK, or "smoother", the
            Levenberg-Marquardt step $\arg\min \sum_t|\delta_t - A_t\delta_{t-1} - r_t|^2 +
            \lambda|\delta_t|^2$.

    Raises:
        TypeError: if `jacobian` or `damping` is none.
        ValueError: on another form, or damping where no Jacobian is kept.
    """

    jacobian: Structure
    damping: Damping | None = None
    form: str = "filter"

    def __post_init__(self) -> None:
        """Reject what does not fit together."""
        _require("jacobian", self.jacobian, Structure, "Full()")
        if self.damping is not None:
            _require("damping", self.damping, Damping, "ConstantDamping()")
            if not isinstance(self.jacobian, Dampable):
                raise ValueError(f"{self.jacobian} leaves nothing to damp, got {self.damping}")
        if self.form not in ("filter", "smoother"):
            raise ValueError(f'form must be "filter" or "smoother", got {self.form!r}')


def _require(name: str, value: Any, kind: type, example: str) -> None:
    if isinstance(value, type) or not isinstance(value, kind):
        raise TypeError(f"{name} must be an object such as elkax.{example}, got {value!r}")


def Jacobi() -> Method:
    """Return the method that keeps no Jacobian: every sweep makes one more state exact.

    References:
        Song et al. (2021), arXiv:2002.03629.
    """
    return Method(Zero())


def Picard() -> Method:
    """Return the method that puts the identity in place of the Jacobian."""
    return Method(Identity())


def QuasiDEER(jacobian: Diagonal | BlockDiagonal = Diagonal()) -> Method:
    """Return the quasi-Newton method with a diagonal or block-diagonal Jacobian.

    References:
        Gonzalez et al. (2024), arXiv:2407.19115.
    """
    return Method(jacobian)


def DEER() -> Method:
    """Return Newton's method on the whole trajectory.

    References:
        Lim et al. (2024), arXiv:2309.12252.
    """
    return Method(Full())


def QuasiELK(
    damping: Damping = PrefixDamping(),
    *,
    form: str = "filter",
    jacobian: Diagonal | BlockDiagonal = Diagonal(),
) -> Method:
    """Return damped quasi-DEER; see `Method`.

    References:
        Gonzalez et al. (2024), arXiv:2407.19115.
    """
    return Method(jacobian, damping, form)


def ELK(damping: Damping = PrefixDamping(), *, form: str = "filter") -> Method:
    """Return damped DEER; see `Method`.

    References:
        Gonzalez et al. (2024), arXiv:2407.19115.
    """
    return Method(Full(), damping, form)


__all__ = [
    "DEER",
    "ELK",
    "ConstantDamping",
    "Jacobi",
    "Method",
    "Picard",
    "PrefixDamping",
    "QuasiDEER",
    "QuasiELK",
]
