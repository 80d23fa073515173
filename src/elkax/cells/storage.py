"""A cell and its parameters in a file."""

import json
import os
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elkax.cells.protocol import Cell, Params, Sized, check_params

FORMAT = "elkax.cells"
VERSION = 1
# Name of the header among the arrays.
HEADER = "header"


def save(path: str | os.PathLike, cell: Cell, params: Params) -> None:
    """Write a cell and its parameters to a file, which appears complete or not at all.

    The file is an npz archive: a header in JSON (format, version, cell, options, types) and the
    arrays of the parameters under their names.

    Args:
        path: of the file, taken as it is; what stands there is replaced.
        cell: a cell of `elkax.cells`.
        params: its parameters.

    Raises:
        TypeError: on a cell of another kind.
        ValueError: on parameters that are not those of the cell.
    """
    if _kinds().get(type(cell).__name__) is not type(cell):
        raise TypeError(f"cell must be one of elkax.cells, {sorted(_kinds())}, got {cell!r}")
    check_params(cell, params)
    arrays = {name: np.asarray(leaf) for name, leaf in _named(params)}
    header = {
        "format": FORMAT,
        "version": VERSION,
        "cell": type(cell).__name__,
        "options": asdict(cell),
        "types": {name: array.dtype.name for name, array in arrays.items()},
    }
    # NumPy has no names of its own for types such as bfloat16.
    plain = {n: a.view(f"u{a.itemsize}") if a.dtype.kind == "V" else a for n, a in arrays.items()}
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            np.savez(file, **{HEADER: np.array(json.dumps(header))}, **plain)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: str | os.PathLike) -> tuple[Cell, Params]:
    """Read what `save` has written.

    Returns:
        The cell and its parameters, in the types they were saved in.

    Raises:
        ValueError: on a file of another kind or version, a cell or options that are not known,
            arrays that are not those of the cell, and types of 64 bits where JAX has none.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        header = json.loads(str(arrays.pop(HEADER)))
        known = header["format"] == FORMAT
    except (AttributeError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile):
        known, header, arrays = False, {}, {}
    if not known:
        raise ValueError(f"{path} is no file that elkax.cells.save has written")
    if header["version"] != VERSION:
        raise ValueError(f"{path} must be of version {VERSION}, got version {header['version']}")
    kind = _kinds().get(header["cell"])
    if kind is None:
        raise ValueError(f"{path} holds a cell that is not known, {header['cell']!r}")
    try:
        cell = kind(**header["options"])
    except TypeError as error:
        raise ValueError(f"{path} holds a {header['cell']} with options {error}") from None
    like = jax.eval_shape(cell.initialize, jax.random.key(0))
    names = [name for name, _ in _named(like)]
    if set(names) != set(arrays):
        raise ValueError(f"{path} must hold arrays {names} for {cell}, got {list(arrays)}")
    leaves = [_restore(path, name, arrays[name], header["types"][name]) for name in names]
    params = jax.tree.unflatten(jax.tree.structure(like), leaves)
    check_params(cell, params)
    return cell, params


def _restore(path: Any, name: str, array: np.ndarray, dtype: str) -> jax.Array:
    restored = jnp.asarray(array.view(jnp.dtype(dtype)))
    if restored.dtype.name != dtype:
        raise ValueError(
            f"{path} holds {name} in {dtype}, for which JAX must be told "
            'jax.config.update("jax_enable_x64", True)'
        )
    return restored


def _named(params: Params) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree.leaves_with_path(params):
        yield jax.tree_util.keystr(path).lstrip("."), leaf


def _kinds() -> dict[str, type]:
    """Return the classes of cells that the library has, by name."""
    found, rest = {}, [Sized]
    while rest:
        rest += (kind := rest.pop()).__subclasses__()
        if hasattr(kind, "initialize") and kind.__module__.startswith(f"{FORMAT}."):
            found[kind.__name__] = kind
    return found
