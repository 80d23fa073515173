"""EM of linear-Gaussian models: frozen and time-varying parameters, and how it ends."""

import warnings
from functools import cache, partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy.optimize import minimize

import elkax
from elkax.models import LinearGaussianConjugateSSM, LinearGaussianSSM
from elkax.models.fitting import over_series
from elkax.smoothers import lgssm_marginal_log_prob
from elkax.smoothers.diffuse_initial import DiffuseInitial
from models.em_checks import joint_moments, objective
from problems import covariance, simulate, stable, with_inputs, with_missing
from smoothers.test_compilation import count_compilations

T = 12
GAPS = ((0, 0), (3, 1), (5, 0), (5, 1), (9, 1))
FIELDS = {
    "initial": ("mean", "cov"),
    "dynamics": ("weights", "bias", "input_weights", "cov"),
    "emissions": ("weights", "bias", "input_weights", "cov"),
}
ALL = frozenset(f"{group}.{name}" for group, names in FIELDS.items() for name in names)


def make_props(trainable=ALL):
    _, props = LinearGaussianSSM(2, 2, 1).initialize(jr.key(0))
    for group, names in FIELDS.items():
        for name in names:
            getattr(getattr(props, group), name).trainable = f"{group}.{name}" in trainable
    return props


def change(params, **values):
    """Replace entries, named as emissions_weights=."""
    for name, value in values.items():
        group, field = name.split("_", 1)
        params = params._replace(**{group: getattr(params, group)._replace(**{field: value})})
    return params


def two_series(kind="constant"):
    """Parameters, and two series with gaps of a model with inputs and biases."""
    rng = np.random.default_rng(3)
    problems = [with_missing(with_inputs(2, 2, T, seed=s), entries=GAPS) for s in (2, 5)]
    params = problems[0].params
    if kind == "diagonal R":
        params = change(params, emissions_cov=jnp.array([0.4, 0.9]))
    if kind == "varying H":
        params = change(params, emissions_weights=jnp.asarray(rng.standard_normal((T, 2, 2))))
    if kind == "varying F":
        params = change(params, dynamics_weights=jnp.asarray(stable(rng, 2, T)))
    if kind == "varying R":
        params = change(params, emissions_cov=jnp.asarray(covariance(rng, 2, T)))
    return params, *(jnp.stack([getattr(p, k) for p in problems]) for k in ("emissions", "inputs"))


COVARIANCES = frozenset({"initial.cov", "dynamics.cov", "emissions.cov"})
DYNAMICS = frozenset(f"dynamics.{name}" for name in FIELDS["dynamics"])
H_KNOWN, F_KNOWN = ALL - {"emissions.weights"}, ALL - {"dynamics.weights"}
PATTERNS = {  # kind of model, trainable parameters
    "all": ("constant", ALL),
    "all, diagonal R": ("diagonal R", ALL),
    "weights known": ("constant", ALL - {"dynamics.weights", "emissions.weights"}),
    "biases known": ("constant", ALL - {"dynamics.bias", "emissions.bias"}),
    "inputs known": ("constant", ALL - {"dynamics.input_weights", "emissions.input_weights"}),
    "covariances alone": ("constant", COVARIANCES),
    "covariances known": ("constant", ALL - COVARIANCES),
    "initial mean known": ("constant", ALL - {"initial.mean"}),
    "dynamics alone": ("constant", DYNAMICS),
    "one bias": ("constant", frozenset({"emissions.bias"})),
    "none": ("constant", frozenset()),
    "known H over time": ("varying H", H_KNOWN),
    "known F over time": ("varying F", F_KNOWN),
    "known R over time": ("varying R", DYNAMICS),
}


statistics_of = jax.jit(jax.vmap(LinearGaussianSSM(2, 2, 1).e_step, (None, 0, 0)))


@cache
def statistics(kind):
    return statistics_of(*two_series(kind))[0]


@pytest.mark.parametrize("name", PATTERNS)
def test_m_step_is_the_numerical_maximum(name):
    """Of the expected log-likelihood under one dense Gaussian of all states and emissions."""
    kind, free = PATTERNS[name]
    params, emissions, inputs = two_series(kind)
    fitted, _ = LinearGaussianSSM(2, 2, 1).m_step(params, make_props(free), statistics(kind), None)
    for group, names in FIELDS.items():
        for field in names:
            old, new = (getattr(getattr(p, group), field) for p in (params, fitted))
            assert old.shape == new.shape
            if f"{group}.{field}" not in free:
                np.testing.assert_array_equal(old, new)
    series = [joint_moments(params, y, u) for y, u in zip(emissions, inputs, strict=True)]
    moments = jax.tree.map(lambda *each: np.stack(each), *series)
    evaluate, place = objective(params, moments, inputs, free)
    ours, gradient = evaluate(place(fitted))
    # Rounding of sums of about 1e2.
    np.testing.assert_allclose(gradient, 0.0, atol=1e-8)
    start = place(params)
    if start.size:
        search = minimize(
            lambda theta: [-x for x in evaluate(theta)], start, jac=True, options={"gtol": 1e-7}
        )
        # What the search leaves undone is quadratic in its last gradient.
        np.testing.assert_allclose(ours, -search.fun, rtol=1e-10)


MONOTONE = ["weights known", "all, diagonal R", "known H over time", "known F over time"]


@pytest.mark.parametrize("name", MONOTONE)
def test_em_is_monotone_with_known_parameters(name):
    kind, free = PATTERNS[name]
    params, emissions, inputs = two_series(kind)
    if name == "known H over time":  # as a function of t
        weights = params.emissions.weights
        params = change(params, emissions_weights=lambda t: weights[t])
    fitted, values = LinearGaussianSSM(2, 2, 1).fit_em(
        params, make_props(free), emissions, inputs, num_iters=15, verbose=False
    )

    def log_likelihood(params):
        pairs = zip(emissions, inputs, strict=True)
        return sum(lgssm_marginal_log_prob(params, y, u) for y, u in pairs)

    assert len(values) == 15
    np.testing.assert_allclose(values[0], log_likelihood(params), rtol=1e-10)
    # Rounding of a value near 1e2.
    assert np.all(np.diff(values) > -1e-10) and values[-1] > values[0] + 0.5
    assert log_likelihood(fitted) >= values[-1]
    assert fitted.emissions.cov.shape == params.emissions.cov.shape
    assert fitted.emissions.weights is params.emissions.weights or name != "known H over time"


def test_statistics_of_dynamax_are_taken_too():
    """Moments about zero give the same step as those about what the parameters explain."""
    params, _, _ = two_series()
    model, props = LinearGaussianSSM(2, 2, 1), make_props(PATTERNS["weights known"][1])
    ours, _ = model.m_step(params, props, statistics("constant"), None)
    theirs, _ = model.m_step(params, props, tuple(statistics("constant")), None)
    # Moments about zero cancel where these do not.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), ours, theirs)


def test_m_step_in_float32_far_from_zero():
    """An emission of about 3e4 with an error of about one: its square has no digits left."""
    rng = np.random.default_rng(0)
    emissions = jnp.asarray(3e4 + rng.standard_normal((1, 200, 1)), jnp.float32)
    model = LinearGaussianSSM(1, 1)
    params, props = model.initialize(jr.key(0), emission_bias=jnp.array([3e4]))
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)

    def step(params, emissions):
        stats, _ = over_series(partial(model.e_step, params), emissions, None)
        return model.m_step(params, props, stats, None)[0]

    ours = jax.jit(step)(params, emissions)
    exact = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (params, emissions))
    expected = jax.jit(step)(*exact)
    np.testing.assert_allclose(ours.emissions.cov, expected.emissions.cov, rtol=1e-2)


def test_a_variance_of_exactly_zero_stays():
    """A companion form: the second state is the first one a step before, without noise."""
    params, _, _ = two_series()
    params = change(
        params,
        dynamics_weights=jnp.array([[0.5, 0.3], [1.0, 0.0]]),
        dynamics_cov=jnp.diag(jnp.array([1.0, 0.0])),
        dynamics_bias=jnp.zeros(2),
        dynamics_input_weights=jnp.zeros((2, 1)),
    )
    emissions = simulate(params, T, 0, jnp.zeros((T, 1)))
    model = LinearGaussianSSM(2, 2, 1)
    both = jnp.stack([emissions, 2.0 * emissions])
    stats, _ = statistics_of(params, both, jnp.zeros((2, T, 1)))
    fitted, _ = model.m_step(params, make_props(), stats, None)
    np.testing.assert_array_equal(fitted.dynamics.cov[1], [0.0, 0.0])
    np.testing.assert_array_equal(fitted.dynamics.weights[1], [1.0, 0.0])
    # Inputs that are always zero have no weight to be learned.
    np.testing.assert_array_equal(fitted.dynamics.input_weights, np.zeros((2, 1)))


def walks(dtype=jnp.float64, series=2, length=20):
    steps = np.random.default_rng(1).standard_normal((series, length, 2))
    return jnp.asarray(np.cumsum(steps, axis=1), dtype)


BROKEN = {
    "stuck": (lambda y: y.at[:, :, 1].set(5.0), "variance of channel 1 .it holds one value, 5."),
    "zeros": (lambda y: 0.0 * y, "variance of channel 0 .it holds one value, 0."),
    "twice": (lambda y: y.at[:, :, 1].set(y[:, :, 0]), "singular, channels 0, 1 determine"),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", BROKEN)
def test_em_stops_in_words_at_a_collapse_and_a_floor_prevents_it(name, dtype):
    breaks, words = BROKEN[name]
    emissions = breaks(walks(dtype))
    model = LinearGaussianSSM(1, 2)
    params, props = model.initialize(jr.key(0))
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
    with pytest.warns(UserWarning, match=f"stopped at iteration .* of 40: .*{words}"):
        fitted, values = model.fit_em(params, props, emissions, num_iters=40, verbose=False)
    assert 1 <= len(values) < 40 and np.all(np.isfinite(values))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(fitted))
    best = sum(lgssm_marginal_log_prob(fitted, y) for y in emissions)
    np.testing.assert_allclose(best, np.max(values), rtol=1e-4)

    floor = jnp.full(2, 1e-2, dtype)
    fitted, values = model.fit_em(
        params, props, emissions, num_iters=40, verbose=False, variance_floor=floor
    )
    assert len(values) == 40 and np.all(np.isfinite(values))
    # Rounding of sums of 80 terms in float32.
    assert np.min(np.diff(values)) > (-1e-9 if dtype == jnp.float64 else -1e-3)
    lowest = np.linalg.eigvalsh(np.asarray(fitted.emissions.cov, np.float64))[0]
    np.testing.assert_allclose(lowest, 1e-2, rtol=1e-4)


def test_units_of_the_data_change_nothing():
    """Of two channels, by powers of two, with the parameters in the same units."""
    model = LinearGaussianSSM(1, 2)
    params, props = model.initialize(jr.key(0))
    unit = jnp.array([2.0**30, 2.0**-30])
    scaled = change(
        params,
        emissions_weights=params.emissions.weights * unit[:, None],
        emissions_cov=params.emissions.cov * unit[:, None] * unit,
    )
    fitted, values = model.fit_em(params, props, walks(), num_iters=8, verbose=False)
    other, moved = model.fit_em(scaled, props, walks() * unit, num_iters=8, verbose=False)
    # The density of each observed number is in inverse units, of which the product here is one.
    np.testing.assert_allclose(moved, values, rtol=1e-12)
    np.testing.assert_allclose(
        other.emissions.cov, fitted.emissions.cov * unit[:, None] * unit, rtol=1e-9
    )
    np.testing.assert_allclose(other.dynamics.cov, fitted.dynamics.cov, rtol=1e-9)


def test_under_jit_and_vmap_the_best_is_kept_without_words():
    """A fit of its own for each of two series, of which one has a stuck channel."""
    model = LinearGaussianSSM(1, 2)
    params, props = model.initialize(jr.key(0))
    good = walks()[0]
    both = jnp.stack([good, good.at[:, 1].set(5.0)])

    @jax.jit
    @jax.vmap
    def fit(emissions):
        return model.fit_em(params, props, emissions, num_iters=8)

    fitted, values = fit(both)
    expected, expected_values = model.fit_em(params, props, good, num_iters=8, verbose=False)
    assert values.shape == (2, 8) and np.all(np.isfinite(values[0]))
    np.testing.assert_allclose(values[0], expected_values, rtol=1e-9)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-7, atol=1e-9), fitted, expected
    )
    assert np.isfinite(values[1, 0]) and np.isnan(values[1, -1])
    assert all(np.all(np.isfinite(leaf[1])) for leaf in jax.tree.leaves(fitted))


def test_progress_is_shown_and_changes_nothing(capsys):
    model = LinearGaussianSSM(1, 2)
    params, props = model.initialize(jr.key(0))
    quiet, values = model.fit_em(params, props, walks(), num_iters=7, verbose=False)
    assert capsys.readouterr().out == ""
    shown, seen = model.fit_em(params, props, walks(), num_iters=7, print_every=4)
    assert "7" in capsys.readouterr().out
    np.testing.assert_allclose(values, seen, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), quiet, shown)
    same, none = model.fit_em(params, props, walks(), num_iters=0)
    assert same is params and none.shape == (0,)
    with pytest.raises(ValueError, match="print_every must be an integer of at least 1, got 0"):
        model.fit_em(params, props, walks(), print_every=0)


def test_lines_are_printed_where_there_is_no_progress_bar(capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "fastprogress.fastprogress", None)
    model = LinearGaussianSSM(1, 2)
    params, props = model.initialize(jr.key(0))
    model.fit_em(params, props, walks(), num_iters=2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("iteration 1 of 2  log posterior -")


def test_a_second_fit_compiles_nothing():
    def fit(emissions):
        model = LinearGaussianSSM(1, 2)
        params, props = model.initialize(jr.key(0))
        return model.fit_em(params, props, emissions, num_iters=3, verbose=False)

    first, second = walks(), walks() + 1.0
    fit(first)
    assert count_compilations(lambda: fit(second)) == 0


SIZES = [(1, 1, 1), (1, 1, 2), (2, 1, 5), (1, 2, 5), (2, 1, 1)]


@pytest.mark.parametrize("D, N, length", SIZES)
def test_one_short_series_in_float32(D, N, length):
    """The default call; what few numbers explain exactly ends in words."""
    model = LinearGaussianSSM(D, N)
    params, props = model.initialize(jr.key(3))
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    emissions = jr.normal(jr.key(4), (length, N), jnp.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        fitted, values = model.fit_em(params, props, emissions, num_iters=6, verbose=False)
    assert len(values) >= 1 and np.all(np.isfinite(values))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(fitted))
    assert fitted.dynamics.cov.dtype == jnp.float32
    best = lgssm_marginal_log_prob(fitted, emissions)
    assert best >= np.max(values) - 1e-4
    if length == 1:
        jax.tree.map(np.testing.assert_array_equal, fitted.dynamics, params.dynamics)
    if N == 1:
        _, flat = model.fit_em(
            params, props, emissions[:, 0], num_iters=6, verbose=False, variance_floor=1e-9
        )
        np.testing.assert_allclose(flat[0], values[0], rtol=1e-6)


def trends(series=2):
    """Local linear trends, started anywhere."""
    rng = np.random.default_rng(4)
    slope = 0.3 + np.cumsum(0.1 * rng.standard_normal((series, 30)), axis=1)
    level = 50.0 + np.cumsum(slope + 0.5 * rng.standard_normal((series, 30)), axis=1)
    return jnp.asarray(level + rng.standard_normal((series, 30)))[..., None]


def trend_model(initial):
    model = LinearGaussianSSM(2, 1, 0, False, False, initial=initial)
    params, props = model.initialize(
        jr.key(0),
        initial_covariance=jnp.diag(jnp.array([4.0, 0.5])),
        dynamics_weights=jnp.array([[1.0, 1.0], [0.0, 1.0]]),
        emission_weights=jnp.array([[1.0, 0.0]]),
    )
    props.dynamics.weights.trainable = False
    props.emissions.weights.trainable = False
    return model, params, props


def test_diffuse_states_keep_their_initial_moments_and_the_others_learn():
    initial = elkax.ExactDiffuse((True, False))
    model, params, props = trend_model(initial)
    emissions = trends()
    fitted, values = model.fit_em(params, props, emissions, num_iters=10, verbose=False)
    first = sum(lgssm_marginal_log_prob(params, y, initial=initial) for y in emissions)
    np.testing.assert_allclose(values[0], first, rtol=1e-10)
    assert np.all(np.diff(values) > -1e-9) and values[-1] > values[0] + 0.5
    np.testing.assert_array_equal(fitted.initial.mean[0], params.initial.mean[0])
    np.testing.assert_array_equal(fitted.initial.cov[0], params.initial.cov[0])
    assert fitted.initial.mean[1] != params.initial.mean[1]
    assert fitted.initial.cov[1, 1] != params.initial.cov[1, 1]

    record = DiffuseInitial.of(params.initial.mean, params.initial.cov, (True, False))
    with_record, same = trend_model(None)[0].fit_em(
        params._replace(initial=record), props, emissions, num_iters=10, verbose=False
    )
    np.testing.assert_allclose(same, values, rtol=1e-12)
    assert isinstance(with_record.initial, DiffuseInitial)
    assert with_record.initial.diffuse == (True, False)
    np.testing.assert_array_equal(with_record.initial.cov[0], [np.inf, 0.0])
    np.testing.assert_allclose(with_record.initial.cov[1, 1], fitted.initial.cov[1, 1], rtol=1e-9)
    np.testing.assert_allclose(with_record.dynamics.cov, fitted.dynamics.cov, rtol=1e-9)

    infinite = change(params, initial_cov=record.cov)
    plain, same = trend_model(None)[0].fit_em(
        infinite, props, emissions, num_iters=10, verbose=False
    )
    np.testing.assert_allclose(same, values, rtol=1e-12)
    np.testing.assert_allclose(plain.initial.cov, with_record.initial.cov, rtol=1e-9)


def test_a_state_that_the_data_do_not_determine_is_named():
    model, params, props = trend_model(elkax.ExactDiffuse())
    params = change(params, dynamics_weights=jnp.eye(2))
    with pytest.raises(ValueError, match="the data do not determine state.* 1"):
        model.fit_em(params, props, trends(), num_iters=3, verbose=False)


def test_a_start_without_a_finite_log_posterior_is_refused():
    model, params, props = trend_model(None)
    params = change(params, dynamics_cov=jnp.full((2, 2), jnp.nan))
    with pytest.raises(ValueError, match="not finite at the parameters to start from"):
        model.fit_em(params, props, trends(), num_iters=3, verbose=False)


def test_dynamics_with_a_stationary_start_are_refused():
    model, params, props = trend_model(elkax.Stationary())
    params = change(params, dynamics_weights=0.5 * jnp.eye(2))
    with pytest.raises(ValueError, match=r"freeze all of props\.dynamics"):
        model.fit_em(params, props, trends(), num_iters=3, verbose=False)
    props.dynamics.cov.trainable = False
    fitted, values = model.fit_em(params, props, trends(), num_iters=3, verbose=False)
    assert np.all(np.diff(values) > 0)
    jax.tree.map(np.testing.assert_array_equal, fitted.initial, params.initial)


@pytest.mark.parametrize("kind, free, words", [
    ("varying H", ALL, r"params\.emissions\.weights varies in time.*trainable = False"),
    ("varying F", ALL, r"params\.dynamics\.weights varies in time.*trainable = False"),
    ("varying R", ALL - {"emissions.cov"}, r"params\.emissions\.cov varies in time, and then"),
])  # fmt: skip
def test_trainable_parameters_over_time_are_refused(kind, free, words):
    params, emissions, inputs = two_series(kind)
    with pytest.raises(ValueError, match=words):
        LinearGaussianSSM(2, 2, 1).fit_em(params, make_props(free), emissions, inputs)


# From TensorFlow Probability, on sampling a Wishart distribution for its shape.
@pytest.mark.filterwarnings("ignore:shape requires ndarray:DeprecationWarning")
def test_conjugate_model_says_what_it_cannot_learn():
    params, emissions, inputs = two_series()
    model = LinearGaussianConjugateSSM(2, 2, 1)

    def fit(params, free=ALL, model=model):
        return model.fit_em(params, make_props(free), emissions, inputs, num_iters=2, verbose=False)

    with pytest.raises(ValueError, match=r"props\.emissions\.bias.trainable is False while"):
        fit(params, ALL - {"emissions.bias"})
    with pytest.raises(ValueError, match=r"params\.emissions\.cov must be constant with 2 axes"):
        fit(change(params, emissions_cov=jnp.ones(2)))
    partly = LinearGaussianConjugateSSM(2, 2, 1, initial=elkax.ExactDiffuse((True, False)))
    with pytest.raises(ValueError, match="diffuse in all states or in none"):
        fit(params, model=partly)


def test_bad_arguments_are_named(unchecked):
    params, emissions, inputs = two_series()
    model, props = LinearGaussianSSM(2, 2, 1), make_props()

    def fit(y=emissions, u=inputs, params=params, props=props, **options):
        return model.fit_em(params, props, y, u, num_iters=2, verbose=False, **options)

    with pytest.raises(ValueError, match=r"emissions must have shape \(T, 2\) or a batch"):
        fit(emissions[..., :1])
    with pytest.raises(ValueError, match="list of arrays of different shapes: pad shorter series"):
        fit([np.zeros((3, 2)), np.zeros((4, 2))])
    with pytest.raises(ValueError, match="got inf in series 1 at time 4, column 0"):
        fit(emissions.at[1, 4, 0].set(jnp.inf))
    with pytest.raises(ValueError, match="inputs must be finite, got nan in series 0 at time 7"):
        fit(u=inputs.at[0, 7, 0].set(jnp.nan))
    with pytest.raises(ValueError, match="inputs must be given"):
        fit(u=None)
    with pytest.raises(ValueError, match="inputs must be there for the 2 series of 12 time steps"):
        fit(u=inputs[:1])
    with pytest.raises(TypeError, match="emissions must hold real numbers, got dtype complex"):
        fit(emissions + 1j)
    with pytest.raises(ValueError, match="variance_floor must be positive"):
        fit(variance_floor=0.0)
    with pytest.raises(ValueError, match=r"variance_floor must be one variance.*got shape \(3,\)"):
        fit(variance_floor=jnp.ones(3))
    with pytest.raises(ValueError, match="learned, but params.emissions.cov is frozen"):
        fit(variance_floor=1.0, props=make_props(ALL - {"emissions.cov"}))
    with pytest.raises(TypeError, match=r"props\.initial\.mean must be dynamax's"):
        fit(props=props._replace(initial=props.initial._replace(mean=True)))
