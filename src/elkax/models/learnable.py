"""Parameters with functions in them as pytrees of arrays that an optimizer can move."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from dynamax.parameters import ParameterProperties
from jax.tree_util import Partial

from elkax.smoothers.system import is_plain


def as_learnable(params: Any, props: Any) -> tuple[Any, Any, Callable[[Any], Any]]:
    """Turn parameters and properties into pytrees of the same structure, without other leaves.

    Plain functions become a `Partial` without arguments, which has no leaves.

    Args:
        params: named tuple of arrays, functions, and callable pytrees such as `Partial(f, theta)`.
        props: named tuple of the same type; a `ParameterProperties` in the place of a pytree
            counts for all its arrays, and what is in the place of a plain function is not read.

    Returns:
        Both, and a function that puts the plain functions back into the parameters.

    Raises:
        ValueError: if properties do not have the structure of the parameters.
        TypeError: if props is of another type, or a leaf is no array of floating-point numbers.
    """
    if type(props) is not type(params):
        raise TypeError(f"props must be {type(params).__name__}, got {type(props).__name__}")
    plain = {name: value for name, value in params._asdict().items() if is_plain(value)}
    wrapped = {name: Partial(value) for name, value in plain.items()}
    arrays = {
        name: jax.tree.map(lambda leaf, name=name: _floating(name, leaf), value)
        for name, value in params._asdict().items()
        if name not in plain
    }
    properties = {name: _match(name, value, getattr(props, name)) for name, value in arrays.items()}
    return (
        params._replace(**arrays, **wrapped),
        props._replace(**properties, **wrapped),
        lambda fitted: fitted._replace(**plain),
    )


def _floating(name: str, leaf: Any) -> jax.Array:
    try:
        array = jnp.asarray(leaf)
    except TypeError as error:
        raise TypeError(f"params.{name} must hold arrays only, got {leaf!r}") from error
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"params.{name} must hold floating-point numbers, got {array.dtype}")
    # Without the weak type of a Python number, which one step of an optimizer takes away: all that
    # is compiled for the first step would be compiled once more for the second.
    return jnp.asarray(array, array.dtype)


def _match(name: str, value: Any, prop: Any) -> Any:
    """Return properties in the structure of a value."""

    def is_property(node: Any) -> bool:
        return isinstance(node, ParameterProperties)

    def spread(one: ParameterProperties, part: Any) -> Any:
        return jax.tree.map(lambda _: one, part)

    if all(map(is_property, jax.tree.leaves(prop, is_leaf=is_property))):
        try:
            return jax.tree.map(spread, prop, value, is_leaf=is_property)
        except ValueError:
            pass  # another structure, named below
    raise ValueError(
        f"props.{name} must be ParameterProperties, or have one in the place of each array of "
        f"params.{name}, or of a pytree of them, {jax.tree.structure(value)}, got {prop!r}"
    )
