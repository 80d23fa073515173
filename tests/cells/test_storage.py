"""A cell and its parameters, written and read again."""

import json
import os

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cells.cell_oracles import CELLS
from elkax import cells

GRU = cells.GRU(2, 3)
PARAMS = GRU.initialize(jax.random.key(0))


@pytest.mark.parametrize("name", CELLS)
def test_every_cell_comes_back(name, tmp_path):
    cell = CELLS[name]
    first = cell.initialize(jax.random.key(1))
    for dtype in (jnp.float64, jnp.float32, jnp.bfloat16):
        params = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), first)
        cells.save(tmp_path / "weights", cell, params)
        again, read = cells.load(str(tmp_path / "weights"))
        assert again == cell and type(read) is type(params)
        chex.assert_trees_all_equal(read, params)
        assert {leaf.dtype for leaf in jax.tree.leaves(read)} == {jnp.dtype(dtype)}
    assert os.listdir(tmp_path) == ["weights"]


def changed(path, header=None, **arrays):
    """What was saved, with another header or other arrays."""
    cells.save(path, GRU, PARAMS)
    with np.load(path) as archive:
        content = dict(archive)
    content["header"] = json.dumps(json.loads(str(content["header"])) | (header or {}))
    content = {k: v for k, v in (content | arrays).items() if v is not None}
    with open(path, "wb") as file:
        np.savez(file, **content)
    return path


OPTIONS = {"input_dim": 2, "state_dim": 3, "reset": "after"}
WRONG = {
    "another version": ({"header": {"version": 2}}, "must be of version 1, got version 2"),
    "another format": ({"header": {"format": "x"}}, "no file that elkax.cells.save has written"),
    "another cell": ({"header": {"cell": "Sized"}}, "a cell that is not known, 'Sized'"),
    "another option": ({"header": {"options": OPTIONS | {"bias": 1}}}, "options .*'bias'"),
    "another size": ({"header": {"options": OPTIONS | {"state_dim": 4}}}, r"must be .*\(3, 4, 4\)"),
    "one array less": ({"bias": None}, "must hold arrays .*'bias'"),
    "one array more": ({"mass": np.zeros(1)}, "got .*'mass'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_known_is_refused(name, tmp_path):
    changes, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        cells.load(changed(tmp_path / "weights", **changes))


@pytest.mark.parametrize("content", [b"", b"weights", None], ids=str)
def test_a_file_of_another_kind(content, tmp_path):
    path = tmp_path / "weights"
    if content is None:
        with open(path, "wb") as file:
            np.savez(file, bias=np.zeros(3))
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="no file that elkax.cells.save has written"):
        cells.load(path)
    with pytest.raises(FileNotFoundError):
        cells.load(tmp_path / "none")


def test_digits_are_not_dropped(tmp_path):
    cells.save(tmp_path / "weights", GRU, PARAMS)
    with jax.enable_x64(False), pytest.raises(ValueError, match="float64.*jax_enable_x64"):
        cells.load(tmp_path / "weights")


def test_what_cannot_be_saved_leaves_what_was_there(tmp_path):
    class Own(cells.GRU):
        pass

    path = tmp_path / "weights"
    cells.save(path, GRU, PARAMS)
    with pytest.raises(TypeError, match="cell must be one of elkax.cells"):
        cells.save(path, Own(2, 3), PARAMS)
    with pytest.raises(ValueError, match="params.* must be"):
        cells.save(path, cells.GRU(2, 4), PARAMS)
    assert cells.load(path)[0] == GRU and os.listdir(tmp_path) == ["weights"]
