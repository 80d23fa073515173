"""One step after the other."""

from dataclasses import dataclass

import jax
from jaxtyping import PyTree

from elkax.scan.protocol import Scannable, State, sequence_length


@dataclass(frozen=True)
class Sequential:
    """Run the recurrence with `jax.lax.scan`: T steps in sequence, least work and memory."""

    def __call__(
        self, scannable: Scannable, state: State, xs: PyTree, *, reverse: bool = False
    ) -> tuple[State, PyTree]:
        """Run the recurrence; see `elkax.scan.Backend`."""
        sequence_length(xs)
        return jax.lax.scan(scannable.step, state, xs, reverse=reverse)
