"""Deterministic recurrences as the zero-noise limit: evaluated in parallel over time."""

from elkax.recurrences.choice import Choice, choose_method, explain
from elkax.recurrences.damping import ConstantDamping, PrefixDamping
from elkax.recurrences.diagnostics import check_structure, lyapunov_exponent
from elkax.recurrences.evaluate import evaluate_recurrence
from elkax.recurrences.method import DEER, ELK, Jacobi, Method, Picard, QuasiDEER, QuasiELK
from elkax.recurrences.solution import RecurrenceInfo, RecurrenceSolution
from elkax.recurrences.tangent import Gradient, Implicit, MatrixFree, Unrolled

__all__ = [
    "DEER",
    "ELK",
    "Choice",
    "ConstantDamping",
    "Gradient",
    "Implicit",
    "Jacobi",
    "MatrixFree",
    "Method",
    "Picard",
    "PrefixDamping",
    "QuasiDEER",
    "QuasiELK",
    "RecurrenceInfo",
    "RecurrenceSolution",
    "Unrolled",
    "check_structure",
    "choose_method",
    "evaluate_recurrence",
    "explain",
    "lyapunov_exponent",
]
