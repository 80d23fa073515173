"""One covariance recursion for all series of a batch that are observed at the same times."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from elkax.gaussian.model import MEANS_AND_DATA, Model
from elkax.scan.fallback import where_sound
from elkax.scan.series import Leaves, Rule, plain_vmap, with_vmap_rule


def share_mask(function: Callable[[Model], Any], model: Model) -> Any:
    """Evaluate a function of a model, under `vmap` with one mask for all series if they agree.

    Covariances depend on which entries are observed, not on their values. Whether all series miss
    the same ones is known only when the program runs, so both programs are compiled.

    Args:
        function: must close over no array.
        model: a model; covariances themselves.
    """
    tree = jax.tree.structure(model)

    def make_rule(single: Callable[[Leaves], PyTree]) -> Rule:
        def rule(size: int, flags: Sequence[bool], leaves: Leaves) -> tuple[PyTree, PyTree]:
            which = tree.unflatten(flags)._asdict()
            own = {name for name, flag in which.items() if flag} - set(MEANS_AND_DATA)
            if own != {"observed"}:
                return plain_vmap(single, size, flags, leaves)
            batch = tree.unflatten(leaves)

            def shared() -> PyTree:
                one = jax.tree.leaves(batch._replace(observed=batch.observed[0]))
                one_flags = jax.tree.leaves(tree.unflatten(flags)._replace(observed=False))
                return plain_vmap(single, size, one_flags, one)[0]

            results = where_sound(
                jnp.all(batch.observed == batch.observed[:1]),
                shared,
                lambda: plain_vmap(single, size, flags, leaves)[0],
            )
            return results, jax.tree.map(lambda _: True, results)

        return rule

    return with_vmap_rule(function, make_rule, model)
