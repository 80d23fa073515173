"""The Kalman filter as a recurrence whose blocks can be summarised."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from elkax.gaussian.covariance import Covariance
from elkax.gaussian.factor import cho_solve, psd_cholesky
from elkax.gaussian.model import MEANS_AND_DATA, RANKS, Model, merge
from elkax.gaussian.output import FilterOutput, State
from elkax.gaussian.rounding import contradicts, of_correction, of_prediction, tells_nothing
from elkax.gaussian.square_root import Turn
from elkax.gaussian.unknown import determine, propagate, see, tolerance
from elkax.scan import lanes
from elkax.scan.lanes import (
    MAX_UNROLLED,
    dot,
    materialize,
    matmul,
    matvec,
    outer,
    transpose,
    two_sum,
)


class Summary(NamedTuple):
    r"""A block of steps, given the state $z = o + d$ before it.

    After the block the state is $N(Ad + b, C)$, and its observations have the likelihood
    $\propto\exp(\eta^\top d - \tfrac12 d^\top Jd)$. Notation of Särkkä & García-Fernández (2021),
    whose origin $o$ is zero.

    Attributes:
        a: $A$ (D, D), perhaps with what rounding left out of it, see `Form.exact`.
        b: $b$ (D,).
        c: $C$ (D, D), stored in the form in use.
        eta: $\eta$ (D,).
        j: $J$ (D, D), stored in the form in use.
        sound: whether every innovation covariance in the block was nonsingular.
        low: (D,) what rounding left out of $b$.
        j_low: (D, D) what rounding left out of $J$, as far as the form knows.
        origin: $o$ (D,), see `KalmanFilter.recenter`.
        error: $E$ of C (D, D), as in `State`.
    """

    a: Array
    b: Array
    c: Array
    eta: Array
    j: Array
    sound: Array
    low: Array
    j_low: Array
    origin: Array
    error: Array | None = None


@partial(jax.tree_util.register_dataclass, data_fields=["fixed"], meta_fields=["form", "turning"])
@dataclass(frozen=True)
class KalmanFilter:
    r"""The Kalman filter: a step predicts, then conditions on $y_t$ entry by entry.

    The state is $(m_{t|t}, e_t, P_{t|t})$, where $e_t$ is what rounding left out of the mean. A
    large mean that is rounded in every step (the position of an integrator) would otherwise act
    like a disturbance on all states. Entries of $y_t$ have uncorrelated errors, so each is a scalar
    update: no N x N matrix is formed, r = 0 is ordinary and missing entries are skipped.

    Args:
        fixed: the constant part of a `Model`.
        form: how covariances are stored.
        turning: whether to give what a smoother of factors needs, see `Turn`; nothing may then be
            unknown.
    """

    fixed: Model
    form: Any
    turning: bool = False

    def begin(self, dtype: DTypeLike) -> State:
        """Give the state before the first step: exactly zero, since that step brings the start."""
        size = self.fixed.initial_mean.shape[0]
        vector, matrix = jnp.zeros(size, dtype), jnp.zeros((size, size), dtype)
        unknown = self.fixed.unknown
        return State(
            vector,
            vector,
            self.form.exact(matrix),
            matrix if self.form.exact_entries else None,
            None if unknown is None else unknown.at[:size].set(0.0),
        )

    def step(self, state: State, x: Model) -> tuple[State, FilterOutput]:
        """Predict and update."""
        model = merge(self.fixed, x)
        state = _widen(state, model)
        prior, turn, level = self._predict(model, state)
        mean, low, cov, error, unknown = prior
        # Series with covariances in common have lanes in their means alone.
        cov, mean, low, error, unknown, level = materialize(
            (cov, mean, low, error, unknown, level), 2, 1, 1, 2, 2, 2
        )

        def update(carry: tuple, entry: tuple) -> tuple[tuple, tuple[Array, Array, Array]]:
            shift, cov, error, unknown, level, turn = carry
            h, variance, value, used = entry
            projection, s = self.form.project(cov, h, variance)
            residual = value - dot(h, mean) - dot(h, shift)
            projection, s, residual = materialize((projection, s, residual), 1, 0, 0)
            zero = used & tells_nothing(self.form, error, h, variance, s)
            against = contradicts(self.form, error, h, mean + shift, value, residual)
            active = used & ~zero
            # Where R is no covariance there is no density.
            s = jnp.where(active, jnp.where(s < 0, jnp.nan, s), 1.0)
            # Zero times a non-finite entry keeps it visible, where a selection would hide it.
            projection = projection * active
            gain = self.form.gain(cov, projection) / s
            new = jnp.zeros_like(zero)
            if turn is not None:
                after, turn = self.form.update_turned(cov, turn, projection, variance, s, residual)
            elif unknown is None:
                after = self.form.update(cov, h, projection, variance, s, gain)
            else:
                gain, s, unknown, level, new = _determine(unknown, level, h, used, gain, s)
                after = self.form.correct(cov, h, variance, gain)
            if error is not None:
                error = of_correction(self.form, error, cov, h, variance, gain)
            shift = shift + lanes.scale(gain, residual)
            reported = jnp.where(_silent(zero, new, against), 0.0, residual) * used
            s = jnp.where(zero & ~new, 0.0, s)
            return (shift, after, error, unknown, level, turn), (gain, reported, s)

        if turn is not None:
            turn = turn._replace(shift=lanes.give_lanes(turn.shift, 1, (mean, 1)))
        start = (low, cov, error, unknown, level, turn)
        (shift, cov, error, unknown, _, turn), found = fold_rows(update, start, entries(model))
        cov = self.form.settle(cov)
        gain, residual, variance = found
        mean, rest = two_sum(mean, shift)
        after = State(mean, rest, cov, error, unknown)
        if model.valid is not None:
            after = jax.tree.map(lambda a, b: jnp.where(model.valid, a, b), after, state)
            turn = jax.tree.map(lambda a: jnp.where(model.valid, a, 0.0), turn)
        mean, rest, cov, _, unknown = after
        cov, _ = lanes.halves(cov)
        return after, FilterOutput(
            mean, rest, cov, gain, residual, variance, model.observed, unknown, turn
        )

    def identity(self, lane_shape: tuple[int, ...], dtype: DTypeLike) -> Summary:
        """Summarise no step: the state stays and nothing is observed."""
        size = self.fixed.initial_mean.shape[0]
        matrix = jnp.zeros((size, size, *lane_shape), dtype)
        vector = jnp.zeros((size, *lane_shape), dtype)
        eye = lanes.identity(size, lane_shape, dtype)
        sound = jnp.ones(lane_shape, bool)
        eye, cov = self.form.exact(eye), self.form.exact(matrix)
        error = matrix if self.form.exact_entries else None
        return Summary(eye, vector, cov, vector, matrix, sound, vector, matrix, vector, error)

    def absorb(self, summary: Summary, x: Model) -> Summary:
        """Lengthen a block by one step."""
        model = merge(self.fixed, x)
        state = State(summary.b, summary.low, summary.c, summary.error)
        mean, low, cov, error, _ = self.predict(model, state)
        weights = lanes.advance(model.weights, summary.a)
        longer = summary._replace(a=weights, b=mean, low=low, c=cov, error=error)
        longer = self.observe(longer, model)
        if model.valid is None:
            return longer
        return jax.tree.map(lambda new, old: jnp.where(model.valid, new, old), longer, summary)

    def observe(self, summary: Summary, model: Model) -> Summary:
        """Condition the end of a block on the entries of one observation."""
        a, mean, low, cov, error = materialize(
            (summary.a, summary.b, summary.low, summary.c, summary.error)
        )

        def update(carry: tuple, entry: tuple) -> tuple[tuple, Array]:
            a, shift, c, error, eta, sound = carry
            h, variance, value, used = entry
            projection, s = self.form.project(c, h, variance)
            residual = value - dot(h, mean) - dot(h, shift)
            through = matvec(transpose(lanes.halves(a)[0]), h)
            projection, s, residual, through = materialize((projection, s, residual, through), 1)
            zero = used & tells_nothing(self.form, error, h, variance, s)
            active = used & ~zero
            s, projection = jnp.where(active, s, 1.0), projection * active
            gain = self.form.gain(c, projection) / s
            if error is not None:
                error = of_correction(self.form, error, c, h, variance, gain)
            c = self.form.update(c, h, projection, variance, s, gain)
            root = active * jax.lax.rsqrt(s)
            column, scaled = through * root, residual * root
            carry = (
                lanes.subtract(a, outer(gain, through)),
                shift + lanes.scale(gain, residual),
                c,
                error,
                eta + lanes.scale(column, scaled),
                sound & ~zero,
            )
            return carry, column

        start = (a, low, cov, error, summary.eta, summary.sound)
        (a, shift, c, error, eta, sound), columns = fold_rows(update, start, entries(model))
        b, low = two_sum(mean, shift)
        j, j_low = self.form.accumulate(summary.j, summary.j_low, transpose(columns))
        return Summary(a, b, c, eta, j, sound, low, j_low, summary.origin, error)

    def combine(self, left: Summary, right: Summary) -> Summary:
        r"""Join two blocks.

        With $X = (I + C_1J_2)^{-1}C_1$ and $Y = (I + J_2C_1)^{-1}J_2$, both positive
        semi-definite and found without an inverse of $C_1$ or $J_2$:
        $A = A_2(I - XJ_2)A_1$, $b = A_2(d + X(\eta_2 - J_2d)) + b_2$ with $d = b_1 - o_2$,
        $C = A_2XA_2^\top + C_2$, $\eta = \eta_1 + A_1^\top(I - J_2X)(\eta_2 - J_2d)$,
        $J = A_1^\top YA_1 + J_1$.
        """
        a1, b1, c1, eta1, j1, _, low1, *_ = left
        a2, b2, c2, eta2, j2, _, low2, _, origin2, _ = right
        form, rounded1, rounded2 = self.form, lanes.halves(a1)[0], lanes.halves(a2)[0]
        x, y = form.condition(c1, j2), form.condition(j2, c1)
        deviation = (b1 - origin2) + low1
        surprise = eta2 - form.times(j2, deviation)
        moved = form.times(x, surprise)
        b, low = two_sum(b2, matvec(rounded2, deviation + moved) + low2)
        x_full, j2_full = form.decode(x), form.decode(j2)
        between = lanes.subtract(a1, matmul(x_full, matmul(j2_full, rounded1)))
        carried = a1 is not rounded1
        return Summary(
            materialize(lanes.advance(a2, between)) if carried else matmul(a2, between),
            b,
            form.predict(a2, x, c2),
            eta1 + matvec(transpose(rounded1), surprise - form.times(j2, moved)),
            form.predict(transpose(rounded1), y, j1),
            left.sound & right.sound,
            low,
            jnp.zeros_like(j1),
            left.origin,
            self._carry_error(left.error, x, right),
        )

    def apply(self, summary: Summary, state: State) -> State:
        """Jump over a block."""
        mean, low, cov, error, _ = state
        a, b, c, eta, j, _, low_b, _, origin, _ = summary
        form = self.form
        x = form.condition(cov, j)
        deviation = (mean - origin) + low
        moved = form.times(x, eta - form.times(j, deviation))
        mean, low = two_sum(b, matvec(lanes.halves(a)[0], deviation + moved) + low_b)
        error = self._carry_error(error, x, summary)
        return State(mean, low, form.predict(a, x, c), error)

    def _carry_error(self, error: Array | None, x: Array, block: Summary) -> Array | None:
        """Carry what rounding left through a block, conditioned as the state is."""
        if error is None:
            return None
        a, _ = lanes.halves(block.a)
        past = matmul(matmul(a, self.form.decode(x)), self.form.decode(block.j))
        through = jax.lax.stop_gradient(a - past)
        return Covariance().predict(through, error, block.error)

    def locate(self, summary: Summary) -> Array:
        r"""Tell about where the observations of a block say that its state began.

        $o + (J + \kappa I)^{-1}\eta$ with $\kappa = 100\epsilon\,\mathrm{tr}J$.
        """
        eta, origin = summary.eta, summary.origin
        information = self.form.decode(summary.j)
        trace = jnp.sum(lanes.diagonal_of(information), axis=0)
        ridge = jnp.where(trace > 0, 100 * jnp.finfo(eta.dtype).eps * trace, 1.0)
        eye = lanes.identity(eta.shape[0], eta.shape[1:], eta.dtype)
        factor = psd_cholesky(information + ridge * eye)
        return origin + cho_solve(factor, eta[:, None])[:, 0]

    def recenter(self, summary: Summary, origin: Array) -> Summary:
        r"""Move the origin by c: $b$ moves by $Ac$ and $\eta$ by $-Jc$.

        What is large in the means then cancels here, and not in the jump, whose $\eta - Jd$ keeps
        few digits if d is large. The origin is a constant: what is computed does not depend on it.
        """
        origin = jax.lax.stop_gradient(origin)
        move = origin - summary.origin
        b, low = two_sum(summary.b, matvec(lanes.halves(summary.a)[0], move) + summary.low)
        eta = summary.eta - self.form.times(summary.j, move)
        return summary._replace(b=b, low=low, eta=eta, origin=origin)

    def sound(self, summary: Summary) -> Array | bool:
        """Tell whether the block's innovation covariances were nonsingular."""
        return summary.sound if self.form.exact_entries else True

    def determined(self, state: State) -> Array | bool:
        """Tell whether the factor of the covariance is unique, which the turns are told in."""
        if not self.turning:
            return True
        factor = jnp.moveaxis(lanes.halves(state.cov)[0], (0, 1), (-2, -1))
        pivots = jnp.abs(jnp.diagonal(factor, axis1=-2, axis2=-1))
        least = jnp.finfo(factor.dtype).eps ** 0.75 * jnp.linalg.norm(factor, axis=-1)
        return jnp.all(pivots > least, axis=-1)

    def predict(self, model: Model, state: State) -> State:
        """Predict one step; before the first one the state is exactly zero."""
        return self._predict(model, state)[0]

    def _predict(self, model: Model, state: State) -> tuple[State, Turn | None, Array | None]:
        """Predict; besides, how the noise turned, and what of U is taken for rounding."""
        mean, low, cov, error, unknown = state
        offset = lanes.blend(model.first, model.initial_mean, model.offset, 1)
        near, rest = lanes.split_identity(model.weights)
        change = lanes.add(matvec(rest, mean) + matvec(model.weights, low), offset)
        near, mean = lanes.align(near, 1, mean, 1)
        noise = lanes.blend(model.first, model.initial_cov, model.noise, 2)
        if error is not None:
            error = of_prediction(self.form, model.weights, error, cov, noise)
        level = None
        if unknown is not None:
            first = lanes.scale_by(jnp.asarray(model.unknown)[: len(near)], model.first)
            unknown, terms = propagate(model.weights, unknown, first)
            level = lanes.scale_rows(terms, tolerance(jnp.asarray(model.age)))
        turn = None
        if self.turning:
            cov, turn = self.form.predict_turned(model.weights, cov, noise)
        else:
            cov = self.form.predict(model.weights, cov, noise)
        return State(*two_sum(near * mean, change), cov, error, unknown), turn, level


def _determine(
    unknown: Array, level: Array, row: Array, used: Array, gain: Array, s: Array
) -> tuple[Array, Array, Array, Array, Array]:
    r"""Let an entry that sees something unknown determine it.

    Returns:
        The gain $Uf/f^\top f$ and $-f^\top f$ there, elsewhere what was given; U and its level
        after it; and where that is.
    """
    f = see(unknown, row, level)
    square = dot(f, f)
    new = used & (square > 0)
    safe = jnp.where(new, square, 1.0)
    towards = matvec(unknown[: len(row)], f) / safe
    return (
        jnp.where(new, towards, gain),
        jnp.where(new, -square, s),
        *determine(unknown, level, f, new),
        new,
    )


def _silent(zero: Array, new: Array, against: Array) -> Array:
    """Tell whose residual is none: of no variance, unless against what is known, or what is new."""
    zero, against = lanes.align(zero & ~new, 0, against, 0)
    new, _ = lanes.align(new, 0, against, 0)
    return (zero & ~against) | new


def entries(model: Model) -> tuple:
    """Give what the scalar updates of one observation run over, leading axis N."""
    return model.rows, model.variances, model.values, model.observed


def fold_rows(
    update: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]], carry: PyTree, rows: PyTree
) -> tuple[PyTree, PyTree]:
    """Fold over the entries of an observation, written out if they are few."""
    count = jax.tree.leaves(rows)[0].shape[0]
    if count > MAX_UNROLLED:
        return jax.lax.scan(update, carry, rows)
    outputs = []
    for i in range(count):
        updated = update(carry, jax.tree.map(lambda leaf, i=i: leaf[i], rows))
        carry, output = materialize(updated, 1)
        outputs.append(output)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


def _widen(state: State, model: Model) -> State:
    """Give a state the lanes of the model: covariances those of all but means and data.

    Series that differ in their data alone have their covariances in common, without lanes.
    """
    shapes = {
        name: field.shape[rank:]
        for name, field, rank in zip(model._fields, model, RANKS, strict=True)
        if field is not None
    }
    every = max(shapes.values(), key=len)
    common = max(
        (s for name, s in shapes.items() if name not in MEANS_AND_DATA),
        key=len,
    )

    def widen(array: Array | None, rank: int, shape: tuple[int, ...]) -> Array | None:
        if array is None or array.ndim > rank or not shape:
            return array
        array = array.reshape(array.shape + (1,) * len(shape))
        return jnp.broadcast_to(array, array.shape[:rank] + shape)

    mean, low, *covs = state
    return State(
        widen(mean, 1, every), widen(low, 1, every), *(widen(cov, 2, common) for cov in covs)
    )
