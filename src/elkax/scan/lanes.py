"""Products of small matrices laid side by side in vector lanes.

Every kernel takes its matrix axes first and any number of trailing lane axes, so that one
kernel serves a single step (no lanes), K blocks side by side, or all T steps at once. An operand
without lanes is the same for every lane.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree, Shaped

# Up to this inner dimension a product is written out over lanes: XLA's batched matmul calls
# BLAS once per lane, which costs far more than the arithmetic (measured on CPU).
MAX_UNROLLED = 8
# From JAX 0.12 on, XLA makes a loop over small steps one kernel on a CPU.
LOOPS_ARE_KERNELS = jax.__version_info__ >= (0, 12)
# Up to this one a single A'B is written out as well, where XLA's dot takes 1.5 to 2 times longer.
MAX_SINGLE = 24


def align(
    a: Shaped[Array, "..."], rank_a: int, b: Shaped[Array, "..."], rank_b: int
) -> tuple[Array, Array]:
    """Give two operands the same number of lane axes.

    Args:
        a: first operand, its first `rank_a` axes are matrix axes, the others lanes.
        rank_a: number of matrix axes of `a`.
        b: second operand.
        rank_b: number of matrix axes of `b`.

    Returns:
        Both operands; the one with fewer lane axes gets trailing axes of length one.
    """
    lanes_a, lanes_b = a.ndim - rank_a, b.ndim - rank_b
    if lanes_a < lanes_b:
        a = a.reshape(a.shape + (1,) * (lanes_b - lanes_a))
    elif lanes_b < lanes_a:
        b = b.reshape(b.shape + (1,) * (lanes_a - lanes_b))
    return a, b


def transpose(a: Shaped[Array, "n m *lanes"]) -> Shaped[Array, "m n *lanes"]:
    """Swap the two matrix axes."""
    return jnp.swapaxes(a, 0, 1)


def materialize(tree: PyTree, *ranks: int) -> PyTree:
    """Return the arguments unchanged, but computed once.

    XLA fuses a chain of small written-out products into one loop on CPU and then computes every
    intermediate anew for each element that needs it: two products in a row cost D times what they
    should. It never fuses across the call of a function that it was told not to inline. Elsewhere,
    for one by one matrices, and without lanes where nothing is written out by `inner`, this does
    nothing.

    Args:
        tree: arrays.
        *ranks: number of matrix axes of the first of them, two if not given, and of others that
            may have lanes where the first has none.
    """
    leaves, ranks = jax.tree.leaves(tree), ranks or (2,)
    first = leaves[0]
    alone = all(leaf.ndim <= rank for leaf, rank in zip(leaves, ranks, strict=False))
    written = ranks[0] == 2 and _is_written_alone(first)
    scalar = set(first.shape[: ranks[0]]) == {1}
    if alone and not written or scalar or first.size == 0 or jax.default_backend() != "cpu":
        return tree
    with set_xla_metadata(inlineable="false"):
        return _unchanged(tree)


@jax.jit
def _unchanged(tree: PyTree) -> PyTree:
    return tree


def _contract(terms: Callable[[int], Array], count: int) -> Array:
    """Add up the terms of a short contraction, written out."""
    total = terms(0)
    for j in range(1, count):
        total = total + terms(j)
    return total


def matmul(a: Shaped[Array, "n k *lanes_a"], b: Shaped[Array, "k m *lanes_b"]) -> Array:
    r"""Compute $AB$ in every lane, shape (n, m, lanes), and see that it is computed once."""
    return materialize(product(a, b)) if a.shape[1] <= MAX_UNROLLED else product(a, b)


def product(a: Shaped[Array, "n k *lanes_a"], b: Shaped[Array, "k m *lanes_b"]) -> Array:
    r"""Compute $AB$ in every lane, to be materialized together with something else."""
    if a.ndim == 2 and b.ndim == 2 and a.shape[1] > MAX_UNROLLED:
        return jnp.matmul(a, b, precision="highest")
    a, b = align(a, 2, b, 2)
    if a.shape[1] <= MAX_UNROLLED:
        return _contract(lambda j: a[:, j, None] * b[None, j], a.shape[1])
    front = jnp.matmul(
        jnp.moveaxis(a, (0, 1), (-2, -1)), jnp.moveaxis(b, (0, 1), (-2, -1)), precision="highest"
    )
    return jnp.moveaxis(front, (-2, -1), (0, 1))


def inner(a: Shaped[Array, "k n *lanes_a"], b: Shaped[Array, "k m *lanes_b"]) -> Array:
    r"""Compute $A^\top B$ in every lane, to be materialized together with something else.

    Of two matrices without lanes both are read along their rows, so that the CPU's vector units
    work on a row: the fastest product of single matrices.
    """
    if _is_written_alone(a) and _is_written_alone(b):
        return _inner_alone(a, b)
    return product(transpose(a), b)


def _is_written_alone(a: Array) -> bool:
    """Tell whether `inner` writes out a product of such matrices without lanes."""
    return (
        a.ndim == 2 and MAX_UNROLLED < a.shape[0] <= MAX_SINGLE and jax.default_backend() == "cpu"
    )


@jax.custom_jvp
def _inner_alone(a: Array, b: Array) -> Array:
    return _contract(lambda j: a[j, :, None] * b[j, None], a.shape[0])


@_inner_alone.defjvp
def _inner_alone_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    # The derivative of a sum of slices would be a sum of padded ones.
    (a, b), (da, db) = primals, tangents
    change = product(transpose(da), b) + product(transpose(a), db)
    return _inner_alone(a, b), change


def diagonal_of(a: Shaped[Array, "n n *lanes"]) -> Array:
    r"""Return the diagonal in every lane, shape (n, lanes)."""
    size = a.shape[0]
    return a.reshape((size * size, *a.shape[2:]))[:: size + 1]


def with_rest(a: Shaped[Array, "n n *lanes"], low: Shaped[Array, "n n *lanes"]) -> Array:
    """Put what rounding left out of a matrix to its right, shape (n, 2n, lanes)."""
    return jnp.concatenate((a, low), axis=1)


def halves(a: Shaped[Array, "n k *lanes"]) -> tuple[Array, Array | None]:
    """Give a matrix, and what rounding left out of it if k = 2n and that stands to its right."""
    size, columns = a.shape[:2]
    return (a[:, :size], a[:, size:]) if columns == 2 * size else (a, None)


def split_identity(a: Shaped[Array, "n k *lanes"]) -> tuple[Array, Array]:
    r"""Write $A = \mathrm{diag}(e) + B$ with $e_i = 1$ where $1/2 \le a_{ii} \le 2$, else 0.

    $B$ is exact, and $Ax = e \circ x + Bx$ rounds what dominates once: a recurrence that changes
    its state little in a step then commits no relative error of its own in every step, which would
    add up over as many steps as it remembers. What rounding left out of A, if it stands to its
    right, is in $B$.

    Returns:
        $e$ (n, lanes) and $B$.
    """
    a, low = halves(a)
    diagonal = diagonal_of(a)
    near = ((diagonal >= 0.5) & (diagonal <= 2.0)).astype(a.dtype)
    eye = jnp.eye(a.shape[0], dtype=a.dtype).reshape(a.shape[:2] + (1,) * (a.ndim - 2))
    rest = a - eye * near[:, None]
    return near, rest if low is None else rest + low


def advance_apart(
    a: Shaped[Array, "n k *lanes_a"], b: Shaped[Array, "n m *lanes_b"]
) -> tuple[Array, Array]:
    r"""Compute two terms of $AB$, $e \circ B$ and the rest, by `split_identity` of A.

    The rest holds what rounding left out of B, if it stands to its right.
    """
    near, rest = split_identity(a)
    b, low = halves(b)
    kept, change = scale_rows(b, near), product(rest, b)
    return kept, change if low is None else scale_rows(low, near) + change


def advance(a: Shaped[Array, "n k *lanes_a"], b: Shaped[Array, "n m *lanes_b"]) -> Array:
    r"""Compute $AB$ in every lane, to be materialized by the caller; see `advance_apart`.

    If what rounding left out of B stands to its right, so does what it leaves out of the product.
    """
    kept, change = advance_apart(a, b)
    return kept + change if halves(b)[1] is None else with_rest(*two_sum(kept, change))


def congruence(
    a: Shaped[Array, "n m *lanes_a"], p: Shaped[Array, "n n *lanes_b"]
) -> tuple[Array, Array]:
    r"""Compute $PA$ and $A^\top PA$ of a symmetric P in every lane, by `split_identity` of A.

    The caller materializes the second one.
    """
    # Split as its transpose, which is what callers have, so that it is computed once.
    near, rest = split_identity(transpose(a))
    rest = transpose(rest)
    some, p = align(near, 1, p, 2)
    half = materialize(some[None] * p + inner(p, rest))
    near, half = align(near, 1, half, 2)
    return half, near[:, None] * half + inner(rest, half)


def is_short(dtype: DTypeLike) -> bool:
    """Tell whether a type has so few digits that compensation for rounding is worth its time."""
    return jnp.finfo(dtype).bits < 64


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    r"""Compute $s = \mathrm{fl}(a + b)$ and what rounding left out, $a + b = s + e$ exactly.

    References:
        Knuth (1997), The Art of Computer Programming, vol. 2, Sec. 4.2.2.
    """
    total = a + b
    part = total - a
    rest = (a - (total - part)) + (b - part)
    return total, jax.lax.stop_gradient(rest)


def add_identity(near: Shaped[Array, "n *lanes_e"], a: Shaped[Array, "n n *lanes_a"]) -> Array:
    r"""Compute $\mathrm{diag}(e) + A$ and what rounding leaves out of it, to its right."""
    eye = identity(near.shape[0], near.shape[1:], a.dtype)
    return with_rest(*two_sum(*align(scale_rows(eye, near), 2, a, 2)))


def subtract(a: Shaped[Array, "n k *lanes_a"], b: Shaped[Array, "n n *lanes_b"]) -> Array:
    r"""Compute $A - B$, and what rounding leaves out of it if that of A stands to its right."""
    a, b = align(a, 2, b, 2)
    high, low = halves(a)
    return a - b if low is None else with_rest(*two_sum(high, low - b))


def matvec(a: Shaped[Array, "n k *lanes_a"], x: Shaped[Array, "k *lanes_x"]) -> Array:
    r"""Compute $Ax$ in every lane, shape (n, lanes)."""
    a, x = align(a, 2, x, 1)
    if a.shape[1] <= MAX_UNROLLED:
        return _contract(lambda j: a[:, j] * x[j], a.shape[1])
    return jnp.sum(a * x[None], axis=1)


def dot(x: Shaped[Array, "n *lanes_x"], y: Shaped[Array, "n *lanes_y"]) -> Array:
    r"""Compute $x^\top y$ in every lane, shape (lanes)."""
    x, y = align(x, 1, y, 1)
    if x.shape[0] <= MAX_UNROLLED:
        return _contract(lambda j: x[j] * y[j], x.shape[0])
    return jnp.sum(x * y, axis=0)


def add(x: Shaped[Array, "n *lanes_x"], y: Shaped[Array, "n *lanes_y"]) -> Array:
    r"""Compute $x + y$ in every lane, shape (n, lanes)."""
    x, y = align(x, 1, y, 1)
    return x + y


def add_matrix(a: Shaped[Array, "n m *lanes_a"], b: Shaped[Array, "n m *lanes_b"]) -> Array:
    r"""Compute $A + B$ in every lane, shape (n, m, lanes)."""
    a, b = align(a, 2, b, 2)
    return a + b


def multiply(x: Shaped[Array, "n *lanes_x"], y: Shaped[Array, "n *lanes_y"]) -> Array:
    r"""Compute $x \circ y$ in every lane, shape (n, lanes)."""
    x, y = align(x, 1, y, 1)
    return x * y


def multiply_numbers(a: Shaped[Array, "*lanes_a"], b: Shaped[Array, "*lanes_b"]) -> Array:
    r"""Multiply two numbers in every lane."""
    a, b = align(a, 0, b, 0)
    return a * b


def scale(x: Shaped[Array, "n *lanes_x"], factor: Shaped[Array, "*lanes_f"]) -> Array:
    r"""Multiply a vector with a number in every lane, shape (n, lanes)."""
    x, factor = align(x, 1, factor, 0)
    return x * factor


def give_lanes(a: Shaped[Array, "..."], rank: int, *others: tuple[Array, int]) -> Array:
    """Give an operand the lanes of others, as a loop needs what it carries.

    Args:
        a: the operand, its first `rank` axes are matrix axes.
        rank: number of matrix axes of `a`.
        *others: arrays and the number of their matrix axes.
    """
    shapes = [a.shape[rank:], *(other.shape[count:] for other, count in others)]
    most = max(map(len, shapes))
    shape = jnp.broadcast_shapes(*(each + (1,) * (most - len(each)) for each in shapes))
    a = a.reshape(a.shape + (1,) * (most - a.ndim + rank))
    return jnp.broadcast_to(a, a.shape[:rank] + shape)


def scale_by(a: Shaped[Array, "n m *lanes_a"], factor: Shaped[Array, "*lanes_f"]) -> Array:
    r"""Multiply a matrix with a number in every lane, shape (n, m, lanes)."""
    a, factor = align(a, 2, factor, 0)
    return a * factor


def scale_rows(a: Shaped[Array, "n m *lanes_a"], x: Shaped[Array, "n *lanes_x"]) -> Array:
    r"""Compute $\mathrm{diag}(x)A$ in every lane, shape (n, m, lanes)."""
    x, a = align(x, 1, a, 2)
    return x[:, None] * a


def outer(x: Shaped[Array, "n *lanes_x"], y: Shaped[Array, "m *lanes_y"]) -> Array:
    r"""Compute $xy^\top$ in every lane, shape (n, m, lanes)."""
    x, y = align(x, 1, y, 1)
    return x[:, None] * y[None]


def blend(one: Array, a: Array, b: Array, rank: int) -> Array:
    """Take `a` in the lanes where `one` is 1 and `b` where it is 0, by multiplication.

    Exact for finite operands, and vectorised where a selection is not.

    Args:
        one: 0 or 1, lane axes only.
        a: operand with `rank` matrix axes.
        b: operand with `rank` matrix axes.
        rank: number of matrix axes.
    """
    a, b = align(a, rank, b, rank)
    if a.ndim - rank < one.ndim:
        widen = (1,) * (one.ndim - a.ndim + rank)
        a, b = a.reshape(a.shape + widen), b.reshape(b.shape + widen)
    return one * a + (1.0 - one) * b


def identity(size: int, lanes: tuple[int, ...], dtype) -> Array:
    """Return the identity matrix in every lane, shape (size, size, lanes)."""
    eye = jnp.eye(size, dtype=dtype)
    return jnp.broadcast_to(eye.reshape((size, size) + (1,) * len(lanes)), (size, size, *lanes))


def to_lanes(tree_leaf: Array) -> Array:
    """Move the leading time axis to the end, where it is a lane axis."""
    return jnp.moveaxis(tree_leaf, 0, -1)


def from_lanes(tree_leaf: Array) -> Array:
    """Move the last lane axis to the front, where it is the time axis."""
    return jnp.moveaxis(tree_leaf, -1, 0)
