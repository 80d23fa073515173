"""What is compiled when functions are called outside of `jit`."""

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import elkax
from problems import random_stable, with_missing

COMPILED = "/jax/core/compile/backend_compile_duration"


def count_compilations(function):
    """Tell how many programs XLA compiles in a call."""
    events = []

    def listen(event, duration, **_):
        del duration
        events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.block_until_ready(function())
    jax.monitoring.unregister_event_duration_listener(listen)
    return events.count(COMPILED)


PROBLEM = random_stable(2, 2, 6)
GAPS = with_missing(PROBLEM, rows=(2,)).emissions.at[4, 0].set(jnp.nan)
CALLS = {
    "filter": lambda: elkax.lgssm_filter(PROBLEM.params, PROBLEM.emissions),
    "gaps": lambda: elkax.lgssm_filter(PROBLEM.params, GAPS),
    "smoother": lambda: elkax.lgssm_smoother(PROBLEM.params, PROBLEM.emissions),
    "log_prob": lambda: elkax.lgssm_marginal_log_prob(PROBLEM.params, PROBLEM.emissions),
    "stationary": lambda: elkax.lgssm_filter(
        PROBLEM.params, PROBLEM.emissions, initial=elkax.Stationary()
    ),
    "diffuse": lambda: elkax.lgssm_filter(
        PROBLEM.params, PROBLEM.emissions, initial=elkax.ExactDiffuse()
    ),
    "innovations": lambda: elkax.lgssm_innovations(PROBLEM.params, GAPS),
    "disturbances": lambda: elkax.lgssm_disturbances(PROBLEM.params, GAPS),
    "forecast": lambda: elkax.lgssm_forecast(PROBLEM.params, PROBLEM.emissions, 2),
    "sample": lambda: elkax.lgssm_posterior_sample(jr.key(0), PROBLEM.params, PROBLEM.emissions),
    "joint": lambda: elkax.lgssm_joint_sample(PROBLEM.params, jr.key(0), 6),
    "online": lambda: elkax.lgssm_online_step(
        PROBLEM.params, elkax.lgssm_online_start(PROBLEM.params), PROBLEM.emissions[0]
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_second_call_compiles_nothing(name):
    assert count_compilations(CALLS[name]) > 0
    assert count_compilations(CALLS[name]) == 0


def test_a_first_call_compiles_few_programs():
    """The arguments' preparation is one program, not one for every operation in it."""
    jax.clear_caches()
    assert count_compilations(CALLS["filter"]) <= 5
