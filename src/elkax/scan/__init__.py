"""How a sequence is combined: one protocol, several backends, affine recurrences."""

from elkax.scan.affine import Affine, Restarted
from elkax.scan.associative import Associative
from elkax.scan.blocked import Blocked
from elkax.scan.choice import choose, run
from elkax.scan.linear_recurrence import linear_recurrence
from elkax.scan.protocol import Backend, Scannable
from elkax.scan.sequential import Sequential

__all__ = [
    "Affine",
    "Associative",
    "Backend",
    "Blocked",
    "Restarted",
    "Scannable",
    "Sequential",
    "choose",
    "linear_recurrence",
    "run",
]
