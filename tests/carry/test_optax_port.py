"""A run of optax's own RMSprop goes on in ours: forty more steps beside it."""

import functools
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers import by_step, covering, problem, slow_but, stepper
from optax_rmsprop import (
    ScaleByStddevState,
    dialects,
    from_optax,
    rmsprop,
    scale_by_rms,
    scale_by_stddev,
)

HALF = 40
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # float32; observed: 4e-6
PARAMS, GRADIENTS = jax.tree.map(jnp.float32, problem(2 * HALF)[:2])
GRADIENTS = by_step(GRADIENTS)
EPS = 1e-2


def falling(count):
    return 0.01 / (1 + 0.1 * count)


def until_now(count):
    return jnp.where(count < HALF, 0.01, 0.0)


@functools.cache
def compiled(tx):
    return jax.jit(stepper(tx))


def run(tx, params, state, gradients):
    step = compiled(tx)
    for g in gradients:
        params, state = step(params, state, g)
    return params, state


@functools.cache
def half_way(source):
    return run(source, PARAMS, source.init(PARAMS), GRADIENTS[:HALF])


def goes_on(source, tx, tolerance=TOLERANCE, **options):
    """Whether a run carried half way ends where it would have, state included."""
    params, state = half_way(source)
    carried = from_optax(state, source, tx, params, **options)
    assert jax.tree.structure(carried) == jax.tree.structure(tx.init(params))
    end, _ = run(source, params, state, GRADIENTS[HALF:])
    chex.assert_trees_all_close(
        run(tx, params, carried, GRADIENTS[HALF:])[0], end, **tolerance
    )
    return carried


OPTIONS = [
    {
        "learning_rate": rate,
        "centered": centered,
        "bias_correction": correct,
        "eps_in_sqrt": inside,
        **more,
    }
    for rate in (0.01, falling)
    for centered in (False, True)
    for correct in (False, True)
    for inside in (False, True)
    for more in ({}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True})
    # There optax's first update divides by a rounding error's root: its trace is NaN.
    if not (centered and correct and more and not inside)
]


def name_of(options):
    return "-".join(f"{k}={getattr(v, '__name__', v)}" for k, v in options.items())


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    "options", slow_but(covering(OPTIONS)[:3], covering(OPTIONS), name_of)
)
def test_optax_rmsprop_goes_on(options):
    args = {"eps": EPS, **options}
    more = {"decay": 0.9} if options["bias_correction"] else {"count": HALF}
    state = goes_on(optax.rmsprop(**args), dialects.optax(**args), **more)
    assert state[0].count == HALF


RMS = {"decay": 0.9, "eps": EPS}
OUTSIDE = optax.scale_by_rms(**RMS, eps_in_sqrt=False)
DOWN, SLOWER = optax.scale_by_learning_rate(0.01), optax.scale_by_schedule(falling)
TRACE, CLIP = optax.trace(0.9), optax.clip_by_global_norm(1.0)
INJECT = optax.inject_hyperparams
MASK = {"matrix": True, "scalar": False, "empty": True}
LABELS = {"matrix": "a", "scalar": "b", "empty": "a"}


def both(wrap, **options):
    args = {"learning_rate": 0.01, "momentum": 0.9, "eps": EPS, **options}
    return [wrap(make, args) for make in (optax.rmsprop, dialects.optax)]


# Chains of optax's own parts, and what has ours in their place.
CHAINS = {
    "rmsprop outside": (
        optax.chain(OUTSIDE, TRACE, DOWN),
        rmsprop(0.01, 0.9, EPS, momentum=0.9),
    ),
    "rmsprop, a schedule": (
        optax.chain(OUTSIDE, TRACE, SLOWER, optax.scale(-1.0)),
        optax.chain(scale_by_rms(**RMS), TRACE, SLOWER, optax.scale(-1.0)),
    ),
    "L2": (
        optax.chain(optax.add_decayed_weights(0.1), OUTSIDE, DOWN, TRACE),
        optax.chain(optax.add_decayed_weights(0.1), scale_by_rms(**RMS), DOWN, TRACE),
    ),
    "stddev": (
        optax.chain(CLIP, optax.scale_by_stddev(**RMS), DOWN),
        optax.chain(CLIP, scale_by_stddev(**RMS, eps_in_sqrt=True), DOWN),
    ),
    "nested": both(lambda make, args: optax.chain(CLIP, optax.chain(make(**args)))),
    "masked": both(lambda make, args: optax.masked(make(**args), MASK)),
    "partition": both(
        lambda make, args: optax.partition(
            {"a": make(**args), "b": make(0.1, eps=EPS, centered=True)}, LABELS
        )
    ),
    "inject": both(lambda make, args: INJECT(make)(**args)),
    "multi_steps": both(lambda make, args: optax.MultiSteps(make(**args), 2)),
    "multi_steps, many": both(lambda make, args: optax.MultiSteps(make(**args), 20)),
    "flatten": both(lambda make, args: optax.flatten(make(**args))),
    "two traces": both(lambda make, args: optax.chain(make(**args), optax.trace(0.5))),
    "another optimizer": both(
        lambda make, args: optax.partition(
            {"a": make(**args), "b": optax.sgd(0.1, momentum=0.9)}, LABELS
        )
    ),
    "one group stays": both(
        lambda make, args: optax.partition(
            {"a": make(**args), "b": optax.rmsprop(0.1, momentum=0.9)}, LABELS
        )
    ),
    "no rate in the buffer": (
        optax.chain(OUTSIDE, TRACE, optax.scale(0.0)),
        optax.chain(scale_by_rms(**RMS), TRACE, optax.scale(0.0)),
    ),
    "no rate any more": both(
        lambda make, args: make(**args | {"learning_rate": until_now})
    ),
    "a trace of 16 bits": (
        optax.chain(OUTSIDE, optax.trace(0.9, accumulator_dtype="bfloat16"), DOWN),
        optax.chain(scale_by_rms(**RMS), TRACE, DOWN),
    ),
    "apply_if_finite": both(lambda make, args: optax.apply_if_finite(make(**args), 3)),
}
APPROXIMATE = {"a trace of 16 bits"}  # in optax
# Groups, a wrapper that counts, and a trace whose sign nothing shows.
QUICK = {
    "partition",
    "multi_steps",
    "no rate any more",
}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", slow_but(QUICK, CHAINS))
def test_chains_go_on(name):
    source, tx = CHAINS[name]
    every = source._every_k_schedule(0) if isinstance(source, optax.MultiSteps) else 1
    tolerance = {"atol": 2e-2} if name in APPROXIMATE else TOLERANCE
    goes_on(source, tx, tolerance, count=HALF // every)


def test_a_group_that_does_not_train_keeps_its_sign():
    later = optax.scale_by_schedule(lambda count: jnp.where(count < 100, 0.0, -0.1))

    def make(rms):
        late = optax.chain(rms, optax.trace(0.9), later)
        now = optax.chain(rms, optax.scale(-0.1))
        return optax.partition({"a": now, "b": late}, LABELS)

    source, tx = make(OUTSIDE), make(scale_by_rms(**RMS))
    params, state = half_way(source)
    carried = from_optax(state, source, tx, params)
    old, new = (optax.tree.get(s, "trace")["scalar"] for s in (state, carried))
    assert old == new != 0


def test_a_trace_whose_sign_nothing_shows():
    silent = optax.chain(OUTSIDE, optax.scale(0.0), TRACE, optax.scale(0.0))
    params = {"w": jnp.ones(2)}
    rms, none, _, _ = silent.init(params)
    state = (rms, none, optax.TraceState(params), none)
    tx = optax.chain(scale_by_rms(**RMS), optax.scale(0.0), TRACE, optax.scale(0.0))
    with pytest.raises(ValueError, match="`opt_state` must have traces whose sign an"):
        from_optax(state, silent, tx, params, count=1)


@pytest.mark.usefixtures("standard_promotion")
def test_lookahead_goes_on():
    source, tx = both(lambda make, args: make(**args))
    params = optax.LookaheadParams.init_synced(PARAMS)
    ahead = [
        optax.lookahead(t, sync_period=3, slow_step_size=0.5) for t in (source, tx)
    ]
    state = ahead[0].init(params)
    for g in GRADIENTS[:HALF]:
        updates, state = ahead[0].update(g, state, params)
        params = optax.apply_updates(params, updates)
    carried = from_optax(state, *ahead, params, count=HALF)
    chex.assert_trees_all_close(
        ahead[1].update(GRADIENTS[0], carried, params)[0],
        ahead[0].update(GRADIENTS[0], state, params)[0],
        **TOLERANCE,
    )


@pytest.mark.usefixtures("standard_promotion")
def test_parts_of_complex_parameters():
    source, tx = both(
        lambda make, args: optax.contrib.split_real_and_imaginary(make(**args))
    )
    params = {"w": jnp.array([1 + 2j, -1 + 1j], jnp.complex64)}
    _, state = source.update(params, source.init(params), params)
    carried = from_optax(state, source, tx, params, count=1)
    chex.assert_trees_all_close(
        tx.update(params, carried, params)[0],
        source.update(params, state, params)[0],
        rtol=1e-5,
    )


def test_a_state_read_from_a_file_and_the_count_of_a_train_state():
    source, tx = both(lambda make, args: make(**args))
    params, state = half_way(source)
    in_numpy = jax.tree.map(np.asarray, state)
    carried = from_optax(in_numpy, source, tx, params, count=jnp.int32(HALF))
    chex.assert_trees_all_equal(
        carried, from_optax(state, source, tx, params, count=HALF)
    )


def test_one_that_has_not_stepped():
    source, tx = both(lambda make, args: make(**args))
    state = from_optax(source.init(PARAMS), source, tx, PARAMS, count=0)
    chex.assert_trees_all_equal(state, tx.init(PARAMS))


def test_the_variance_of_a_steady_gradient_is_not_negative():
    source = optax.rmsprop(0.01, centered=True, eps=EPS)
    params = {"w": jnp.ones(50)}
    steady = {"w": jnp.linspace(0.1, 3.0, 50)}
    params, state = run(source, params, source.init(params), [steady] * 300)
    assert (state[0].nu["w"] < state[0].mu["w"] ** 2).any()
    tx = dialects.optax(0.01, centered=True, eps=EPS)
    carried = from_optax(state, source, tx, params, count=300)
    assert isinstance(carried[0], ScaleByStddevState)
    exact = np.float64(state[0].nu["w"]) - np.float64(state[0].mu["w"]) ** 2
    np.testing.assert_allclose(
        carried[0].var["w"], np.maximum(exact, 0), rtol=0, atol=1e-6
    )
    assert (carried[0].var["w"] >= 0).all()


def test_bfloat16_parameters_get_averages_of_float32():
    source, tx = both(lambda make, args: make(**args))
    params = jax.tree.map(jnp.bfloat16, PARAMS)
    g = jax.tree.map(jnp.bfloat16, GRADIENTS[0])
    _, state = source.update(g, source.init(params), params)
    carried = from_optax(state, source, tx, params, count=1)
    for slot in (carried[0].nu, carried[2].trace):
        assert slot["matrix"].dtype == jnp.float32
    np.testing.assert_array_equal(
        carried[0].nu["matrix"], np.float32(state[0].nu["matrix"])
    )


def options_of_tx(**options):
    return dialects.optax(**{"learning_rate": 0.01, "momentum": 0.9, **options})


WITH_MOMENTUM = optax.rmsprop(0.01, momentum=0.9)
# Each is given in place of the counterpart of WITH_MOMENTUM.
DIFFERENT = {
    "learning rate": options_of_tx(learning_rate=0.02),
    "decay": options_of_tx(decay=0.9001),
    "eps": options_of_tx(eps=1e-2),
    "place of eps": options_of_tx(eps_in_sqrt=False, eps=1e-2),
    "momentum": options_of_tx(momentum=0.8),
    "nesterov": options_of_tx(nesterov=True),
    "learning rate outside": rmsprop(0.01, 0.9, 1e-8, eps_in_sqrt=True, momentum=0.9),
}


@pytest.mark.parametrize("tx", DIFFERENT.values(), ids=DIFFERENT)
def test_other_options_are_found(tx):
    source = WITH_MOMENTUM
    params, state = half_way(source)
    says = r"`tx` must make what `source` makes .* got \S+ where it makes \S+ at \S+; g"
    with pytest.raises(ValueError, match=says):
        from_optax(state, source, tx, params, count=HALF)


PLAIN, OURS = optax.rmsprop(0.01), dialects.optax(0.01)
FALLING = {"learning_rate": falling, "momentum": 0.9}
CORRECTED = {"learning_rate": 0.01, "bias_correction": True}
# The run's transformation, ours, options, error, what its text must match.
REFUSED = [
    (
        PLAIN,
        OURS,
        {},
        ValueError,
        r"`count` must be .* got None, and no average or",
    ),
    (PLAIN, OURS, {"count": 1.5}, TypeError, r"`count` must be an integer in \[0, 2"),
    (
        optax.rmsprop(**FALLING),
        dialects.optax(**FALLING),
        {"count": 7},
        ValueError,
        r"`count` must be .* got 7 and 40; give the right one",
    ),
    (
        optax.rmsprop(**FALLING),
        rmsprop(falling, 0.9, eps_in_sqrt=True, momentum=0.9),
        {},
        ValueError,
        r"`tx` must keep .* same order.*ScheduleState, TraceState, got .* inside the m",
    ),
    (
        optax.chain(OUTSIDE, TRACE, SLOWER, optax.scale(-1.0)),
        dialects.optax(**FALLING),
        {},
        ValueError,
        r"`tx` must keep .* got ScaleByRmsState, ScaleByScheduleState, TraceState; ",
    ),
    (
        optax.adam(0.01),
        OURS,
        {"count": HALF},
        ValueError,
        r"`tx` must keep .*: int32\[\], float32.* got ScaleByRmsState$",
    ),
    (
        optax.masked(PLAIN, MASK),
        optax.masked(OURS, MASK | {"scalar": True}),
        {"count": HALF},
        ValueError,
        r"`tx` must keep .* for the same parameters",
    ),
    (
        optax.rmsprop(**CORRECTED),
        dialects.optax(**CORRECTED),
        {},
        TypeError,
        r"`decay` must be a number .* got None; bias correction needs that of `source`",
    ),
    (
        *both(lambda make, args: optax.MultiSteps(make(**args), 200)),
        {"count": 0},
        ValueError,
        r"`source` must change its averages within 64 updates, .* before an accumulat",
    ),
]


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    ("source", "tx", "options", "error", "says"), REFUSED, ids=[r[-1] for r in REFUSED]
)
def test_what_is_refused(source, tx, options, error, says):
    params, state = half_way(source)
    with pytest.raises(error, match=says):
        from_optax(state, source, tx, params, **options)


def test_a_state_of_another_source_or_of_other_parameters():
    params, state = half_way(PLAIN)
    with pytest.raises(ValueError, match=r"`opt_state` must be a state of `source` fo"):
        from_optax(state, optax.rmsprop(0.01, centered=True), OURS, params, count=HALF)
    wide = params | {"scalar": jnp.ones(3)}
    says = r"got float32\[\] at \[0\]\.nu\['scalar'\], expected float32\[3\]"
    with pytest.raises(ValueError, match=says):
        from_optax(state, PLAIN, OURS, wide, count=HALF)


@pytest.mark.usefixtures("standard_promotion")
def test_complex_averages():
    params = {"w": jnp.ones(2, jnp.complex64)}
    _, state = PLAIN.update(params, PLAIN.init(params), params)
    says = r"`opt_state` must have real averages, got complex64 at \.nu\['w'\]"
    with pytest.raises(ValueError, match=says):
        from_optax(state, PLAIN, OURS, params, count=1)


def test_nan_is_reported_at_the_line_of_the_user():
    source, tx = both(lambda make, args: make(**args))
    params, state = half_way(source)
    broken = state[0].nu["matrix"].at[0, 0].set(jnp.nan)
    state = (state[0]._replace(nu=state[0].nu | {"matrix": broken}), *state[1:])
    with pytest.warns(RuntimeWarning, match=r"\.nu\['matrix'\]") as record:
        carried = from_optax(state, source, tx, params, count=HALF)
    assert record[0].filename == __file__
    assert jnp.isnan(carried[0].nu["matrix"]).sum() == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_optax(half_way(source)[1], source, tx, params, count=HALF)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("nu", jnp.array([1.0, -1.0]), r"a negative one at "),
        ("count", jnp.int32(-5), r"integer from 0, got -5 at \.count"),
    ],
)
def test_averages_and_counts_below_0(field, value, says):
    source = optax.scale_by_rms(0.9, bias_correction=True)
    tx, p = scale_by_rms(0.9, eps_in_sqrt=True, bias_correction=True), jnp.ones(2)
    state = source.init(p)._replace(**{field: value})
    with pytest.raises(ValueError, match=rf"`opt_state` must .*{says}"):
        from_optax(state, source, tx, p, decay=0.9)


MANY = {f"{'layer' * 30}{i:04}": np.ones((1,) * 60, np.float32) for i in range(50)}
ADAM = optax.scale_by_adam()
OF_MANY = {
    "`tx` must keep what": (
        dict.fromkeys(MANY, np.ones(1, np.float32)),
        optax.chain(ADAM, optax.rmsprop(0.1, momentum=0.9)),
        optax.chain(dialects.optax(0.1, momentum=0.9), ADAM),
        lambda state: state,
    ),
    "`opt_state` must be a state of `source`": (
        MANY,
        PLAIN,
        OURS,
        lambda state: jax.tree.map(lambda x: x.astype(np.float16), state),
    ),
    "`opt_state` must contain averages of squares": (
        MANY,
        PLAIN,
        OURS,
        lambda state: jax.tree.map(lambda x: -1 - x, state),
    ),
    "`count` must be the number of updates": (
        (),
        *2 * [optax.chain(*100 * [optax.scale_by_schedule(falling)])],
        lambda state: tuple(
            part._replace(count=np.int32(i)) for i, part in enumerate(state)
        ),
    ),
}


@pytest.mark.parametrize(("says", "case"), OF_MANY.items(), ids=OF_MANY)
def test_errors_are_short(says, case):
    params, source, tx, changed = case
    state = jax.tree.map(
        lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(source.init, params)
    )
    with pytest.raises(ValueError, match=says) as raised:
        from_optax(changed(state), source, tx, params, count=0)
    assert len(str(raised.value)) < 600
