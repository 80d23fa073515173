"""Many series by `vmap`: the batch goes into the vector lanes."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, PyTree

from elkax.scan.protocol import Backend, Scannable, State, step
from elkax.scan.sequential import Sequential

Leaves = Sequence[Array]
# Evaluates a function for a batch: its size, which leaves have it (leading), and the leaves.
# Returns the results and which of them have the batch (leading).
Rule = Callable[[int, Sequence[bool], Leaves], tuple[PyTree, PyTree]]

# Like `jax.custom_batching.custom_vmap`, which has no derivative in reverse.
_batchable = Primitive("batchable")
_batchable.multiple_results = True


def with_vmap_rule(
    plain: Callable[..., Any], make_rule: Callable[[Callable[[Leaves], PyTree]], Rule], *args: Any
) -> Any:
    """Evaluate `plain(*args)`, under `vmap` by a rule; derivatives are those of `plain`.

    Args:
        plain: must close over no traced array.
        make_rule: takes `plain` as a function of the leaves of `args`; gives the rule.
        *args: arguments, pytrees.
    """
    leaves, tree = jax.tree.flatten(args)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    # Traced once: what is nested would otherwise be traced several times at every level.
    jaxpr, shapes = jax.make_jaxpr(
        lambda *leaves: plain(*tree.unflatten(leaves)), return_shape=True
    )(*leaves)
    results = jax.tree.structure(shapes)

    def function(leaves: Leaves) -> Any:
        return results.unflatten(jaxpr_as_fun(jaxpr)(*leaves))

    return results.unflatten(_batchable.bind(*leaves, jaxpr=jaxpr, rule=make_rule(function)))


@_batchable.def_impl
def _evaluate(*leaves: Array, jaxpr: ClosedJaxpr, rule: Rule) -> Leaves:
    del rule
    return jaxpr_as_fun(jaxpr)(*leaves)


@_batchable.def_abstract_eval
def _shapes(*leaves: Any, jaxpr: ClosedJaxpr, rule: Rule) -> list:
    del leaves, rule
    return jaxpr.out_avals


def _jvp(
    primals: Leaves, tangents: Sequence, *, jaxpr: ClosedJaxpr, rule: Rule
) -> tuple[list, list]:
    del rule
    moving = [not isinstance(tangent, ad.Zero) for tangent in tangents]

    def along(*some: Array) -> Leaves:
        given = iter(some)
        leaves = [next(given) if m else p for m, p in zip(moving, primals, strict=True)]
        return jaxpr_as_fun(jaxpr)(*leaves)

    points = [p for p, m in zip(primals, moving, strict=True) if m]
    values, changes = jax.jvp(
        along, points, [t for t, m in zip(tangents, moving, strict=True) if m]
    )
    real = [jnp.issubdtype(value.dtype, jnp.inexact) for value in values]
    return values, [
        change if r else ad.Zero(ShapedArray(value.shape, jax.dtypes.float0))
        for value, change, r in zip(values, changes, real, strict=True)
    ]


def _batch(leaves: Leaves, axes: Sequence, *, jaxpr: ClosedJaxpr, rule: Rule) -> tuple[list, list]:
    del jaxpr
    flags = [axis is not None for axis in axes]
    leaves = [
        jnp.moveaxis(leaf, axis, 0) if flag else leaf
        for leaf, axis, flag in zip(leaves, axes, flags, strict=True)
    ]
    size = next(len(leaf) for leaf, flag in zip(leaves, flags, strict=True) if flag)
    results, batched = rule(size, flags, leaves)
    axes = [0 if flag else None for flag in jax.tree.leaves(batched)]
    return jax.tree.leaves(results), axes


ad.primitive_jvps[_batchable] = _jvp
batching.primitive_batchers[_batchable] = _batch
mlir.register_lowering(_batchable, mlir.lower_fun(_evaluate, multiple_results=True))


def plain_vmap(
    function: Callable[[Leaves], PyTree], size: int, flags: Sequence[bool], leaves: Leaves
) -> tuple[PyTree, PyTree]:
    """Batch a function as `jax.vmap` does; returns as a `Rule`."""
    axes = [0 if flag else None for flag in flags]
    results = jax.vmap(function, in_axes=(axes,), axis_size=size)(leaves)
    return results, jax.tree.map(lambda _: True, results)


def series_last(flags: Sequence[bool], leaves: Leaves) -> Leaves:
    """Move a leading batch axis to the end of the leaves that have it."""
    return [
        jnp.moveaxis(leaf, 0, -1) if flag else leaf
        for flag, leaf in zip(flags, leaves, strict=True)
    ]


def series_first(results: PyTree, single: PyTree, size: int) -> tuple[PyTree, PyTree]:
    """Move a batch axis from the end to the front, where results have one; returns as a `Rule`.

    Args:
        results: with one axis more than `single` where they depend on the batch; an additional
            axis of length one says that they do not.
        single: arrays or shapes for one series.
        size: how many series there are, perhaps one.
    """

    def has_series(result: Array, one: Any) -> bool:
        return result.ndim > one.ndim and result.shape[-1] == size

    def move(result: Array, one: Any) -> Array:
        if has_series(result, one):
            return jnp.moveaxis(result, -1, 0)
        return result[..., 0] if result.ndim > one.ndim else result

    return jax.tree.map(move, results, single), jax.tree.map(has_series, results, single)


def run_series(
    scannable: Scannable,
    state: State,
    xs: PyTree,
    *,
    backend: Backend,
    fills: Callable[[int], bool],
    reverse: bool,
) -> tuple[State, PyTree]:
    """Run a recurrence for one series, or under `vmap` for many side by side.

    Many series run step by step with the series in lanes, where what they have in common
    (covariances, if they differ in their data alone) is computed once; few of them as
    `jax.vmap` batches the backend.

    Args:
        scannable: the recurrence, a pytree.
        state: state before the first step.
        xs: inputs, leading axis T.
        backend: how to run one series.
        fills: whether that many series fill the lanes without blocks of time.
        reverse: run from the last input to the first.
    """

    def plain(scannable: Scannable, state: State, xs: PyTree) -> tuple[State, PyTree]:
        return backend(scannable, state, xs, reverse=reverse)

    tree = jax.tree.structure((scannable, state, xs))

    def make_rule(function: Callable[[Leaves], PyTree]) -> Rule:
        def rule(size: int, flags: Sequence[bool], leaves: Leaves) -> tuple[PyTree, PyTree]:
            if not (isinstance(backend, Sequential) or fills(size)):
                return plain_vmap(function, size, flags, leaves)
            single = jax.eval_shape(function, one_series(flags, leaves))
            in_lanes = tree.unflatten(series_last(flags, leaves))
            scannable, state, xs = in_lanes
            state = _widen(partial(step, scannable), state, xs, size)
            results = Sequential()(scannable, state, xs, reverse=reverse)
            return series_first(results, single, size)

        return rule

    return with_vmap_rule(plain, make_rule, scannable, state, xs)


def one_series(flags: Sequence[bool], leaves: Leaves) -> list[jax.ShapeDtypeStruct]:
    """Give the shapes of one series."""
    return [
        jax.ShapeDtypeStruct(leaf.shape[1:] if flag else leaf.shape, leaf.dtype)
        for flag, leaf in zip(flags, leaves, strict=True)
    ]


def _widen(advance: Callable, state: State, xs: PyTree, size: int) -> State:
    """Give lanes to the parts of the first state that get them in a step."""
    row = jax.eval_shape(lambda xs: jax.tree.map(lambda leaf: leaf[0], xs), xs)
    while True:
        after, _ = jax.eval_shape(advance, state, row)
        wider = jax.tree.map(lambda new, old: new.ndim > old.ndim, after, state)
        if not any(jax.tree.leaves(wider)):
            return state
        state = jax.tree.map(
            lambda old, grows: (
                jnp.broadcast_to(old[..., None], (*old.shape, size)) if grows else old
            ),
            state,
            wider,
        )
