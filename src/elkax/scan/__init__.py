"""How a sequence is combined: one protocol, several backends, affine recurrences."""

from elkax.scan.affine import Affine, affine_scan
from elkax.scan.associative import Associative
from elkax.scan.blocked import Blocked
from elkax.scan.choice import choose, run
from elkax.scan.protocol import Backend, Scannable
from elkax.scan.sequential import Sequential

__all__ = [
    "Affine",
    "Associative",
    "Backend",
    "Blocked",
    "Scannable",
    "Sequential",
    "affine_scan",
    "choose",
    "run",
]
