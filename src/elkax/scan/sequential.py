"""One step after the other."""

from dataclasses import dataclass
from functools import partial

import jax
from jaxtyping import PyTree

from elkax.scan.protocol import Scannable, State, sequence_length, step


@dataclass(frozen=True)
class Sequential:
    """Run the recurrence with `jax.lax.scan`: T steps in sequence, least work and memory.

    Differentiated in reverse it keeps the states alone, and computes each step once more.
    """

    def __call__(
        self, scannable: Scannable, state: State, xs: PyTree, *, reverse: bool = False
    ) -> tuple[State, PyTree]:
        """Run the recurrence; see `elkax.scan.Backend`."""
        sequence_length(xs)
        advance = jax.checkpoint(partial(step, scannable), prevent_cse=False)
        return jax.lax.scan(advance, state, xs, reverse=reverse)
