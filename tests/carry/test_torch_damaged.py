"""A damaged run is refused, and the error names the part; no error is from inside."""

import collections
import copy

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import update_in_torch
from optax_rmsprop import from_torch, from_torch_checkpoint, to_torch

LONGEST = 600


def trained():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    options = {"momentum": 0.9, "centered": True}
    optimizer = torch.optim.RMSprop(model.named_parameters(), **options)
    update_in_torch(model, optimizer, torch.randn_like, 3)
    return model, optimizer


MODEL, OPTIMIZER = trained()
SAVED = OPTIMIZER.state_dict()
RUN = from_torch(MODEL, OPTIMIZER, dict)
ABSENT = object()
GROUP = ("param_groups", 0)
SLOTS = ("square_avg", "grad_avg", "momentum_buffer")


def damaged(*changes):
    """A checkpoint with other values at some places, given by the keys to them."""
    saved = copy.deepcopy(SAVED)
    for path, value in changes:
        inner = saved
        for key in path[:-1]:
            inner = inner[key]
        if value is ABSENT:
            del inner[path[-1]]
        else:
            inner[path[-1]] = value
    return saved


def is_clear(error):
    """Whether an error is of the form that all have here."""
    text = str(error)
    return (
        type(error) in (TypeError, ValueError) and "`" in text and (len(text) < LONGEST)
    )


DAMAGED = [
    (("state",), None, TypeError, "`optimizer` must have a dict for its state, got No"),
    (("state", 0), 5, TypeError, "state that `optimizer` has of 0 must be a dict, got"),
    (("state", 0, "step"), None, TypeError, "`step` of `weight` must be a number, got"),
    (("state", 0, "step"), np.nan, ValueError, "of `weight` must be a finite number"),
    (("state", 0, "step"), -1, ValueError, r"must be an integer in \[0, 2³¹\), got -1"),
    (("state", 0, "step"), 2.5, ValueError, r"be an integer in \[0, 2³¹\), got 2.5;"),
    (("state", 0, "step"), 2**31, ValueError, r"be an integer in \[0, 2³¹\), got 2.14"),
    (("state", 0, "step"), 10**400, ValueError, "finite number, got 1000"),
    (("state", 0, "square_avg"), None, TypeError, "`square_avg of weight` must be a t"),
    (
        ("state", 0, "square_avg"),
        torch.ones(2, 3, dtype=torch.int32),
        ValueError,
        "square_avg of `weight` must be floating point as its parameter, .* int32",
    ),
    (("param_groups",), "ab", TypeError, "must have a list of param_groups, got 'ab'"),
    (("param_groups",), [], ValueError, r"must have a list of param_groups, got \[\]"),
    (("param_groups",), [5], TypeError, "group 0 of `optimizer` must be a dict, got 5"),
    ((*GROUP, "lr"), None, TypeError, "`lr` of group 0 of `optimizer` must be a numb"),
    ((*GROUP, "lr"), 10**400, ValueError, "`lr` .* must be a finite number, got 1000"),
    ((*GROUP, "lr"), 10**5000, ValueError, "finite number, got an int too long to sh"),
    ((*GROUP, "momentum"), "x", TypeError, "`momentum` .* must be a number, got 'x'"),
    ((*GROUP, "centered"), 1, TypeError, "`centered` .* must be True or False, got 1"),
    ((*GROUP, "params"), ABSENT, TypeError, "`params` of group 0 must be a list, got"),
    ((*GROUP, "params"), [[0], 1], TypeError, r"must be numbers or names, got \[0\]"),
    ((*GROUP, "params"), [0, 0], ValueError, "must have `bias` once, got it in group"),
    ((*GROUP, "param_names"), "ab", ValueError, "`param_names` .* must be a list of 2"),
]


@pytest.mark.parametrize(
    ("path", "value", "error", "text"), DAMAGED, ids=[text for *_, text in DAMAGED]
)
def test_a_damaged_checkpoint(path, value, error, text):
    with pytest.raises(error, match=text) as caught:
        from_torch_checkpoint(MODEL.state_dict(), damaged((path, value)), dict)
    assert is_clear(caught.value)


ARGUMENTS = {
    "no model": (lambda: from_torch(None, OPTIMIZER, dict), "`model` must be a torch"),
    "no optimizer": (lambda: from_torch(MODEL, None, dict), "`optimizer` must be a to"),
    "no port": (lambda: from_torch(MODEL, OPTIMIZER, None), "`port` must be a funct"),
    "no port back": (
        lambda: to_torch(*RUN[::2], MODEL, OPTIMIZER, None),
        "`port` must be a function",
    ),
    "numbers for names": (
        lambda: from_torch_checkpoint({0: torch.ones(2)}, SAVED, dict),
        "`model` must have names for keys, got 0",
    ),
    "no params": (
        lambda: to_torch(None, RUN.opt_state, MODEL, OPTIMIZER, dict),
        r"`params` must be the port's tree: missing \['bias'\], \['weight'\]; make",
    ),
    "no state": (
        lambda: to_torch(RUN.params, None, MODEL, OPTIMIZER, dict),
        "`opt_state` must be the state of the run's optimizer, got None; give",
    ),
    "a part of a state": (
        lambda: to_torch(RUN.params, ({}, 5), MODEL, OPTIMIZER, dict),
        "`opt_state` must have the averages of torch's options, .* got none",
    ),
    "a port with keys without an order": (
        lambda: from_torch(
            MODEL, OPTIMIZER, lambda w: {1: w["weight"], "a": w["bias"]}
        ),
        "`port` must be a tree that JAX can flatten, got one with this fault",
    ),
    "keys without an order": (
        lambda: to_torch({1: 1.0, "a": 1.0}, RUN.opt_state, MODEL, OPTIMIZER, dict),
        "`params` must be a tree that JAX can flatten, got one with this fault",
    ),
    "keys without an order in a state": (
        lambda: to_torch(
            RUN.params,
            (RUN.opt_state[0]._replace(mu={1: 1.0, "a": 1.0}), *RUN.opt_state[1:]),
            MODEL,
            OPTIMIZER,
            dict,
        ),
        "`opt_state` must be a tree that JAX can flatten, got one with this fault",
    ),
    "within jit": (
        lambda: jax.jit(lambda p: to_torch(p, RUN.opt_state, MODEL, OPTIMIZER, dict))(
            RUN.params
        ),
        r"\['bias'\] of `params` must have values, got a traced array; carry",
    ),
    "a key": (
        lambda: to_torch(
            jax.tree.map(
                lambda p: jax.random.split(jax.random.key(0), p.shape), RUN.params
            ),
            RUN.opt_state,
            MODEL,
            OPTIMIZER,
            dict,
        ),
        "`params` must have arrays of numbers, got a PRNGKeyArray",
    ),
}


@pytest.mark.parametrize(("call", "text"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_an_argument_of_another_kind(call, text):
    with pytest.raises((TypeError, ValueError), match=text) as caught:
        call()
    assert is_clear(caught.value)


VALUES = {
    **{repr(x): x for x in (None, "x", [], {}, [1], True, False, 1j, b"x", 0, 3, -1)},
    **{repr(x): x for x in (0.5, 1.5, -1.0, np.nan, np.inf, 2**31)},
    **{"absent": ABSENT, "huge": 10**400, "longer": -(10**5000), "object": object()},
    **{"text": np.array("x"), "two": np.ones(2), "array": np.array(0.5)},
    **{f"tensor {x}": torch.tensor(x) for x in (0.5, 3.0, -1.0, np.nan, True, 1j)},
    **{"matrix": torch.ones(2, 3), "meta": torch.ones((), device="meta")},
    **{"vector": torch.ones(2), "integers": torch.ones(2, dtype=torch.int64)},
}
NUMBERS = {"0", "3", "0.5", "1.5", "2147483648", "array", "tensor 0.5", "tensor 3.0"}
BELOW_1 = {"0.5", "array", "tensor 0.5"}
# At each place, the values that are right there, or that change nothing.
RIGHT = {
    ("state",): {"{}"},  # before the first step
    ("param_groups",): (),
    ("state", 0): {"{}", "absent"},  # of what has had no gradient
    ("state", 0, "step"): {"0", "3", "tensor 3.0"},
    **{("state", 0, slot): {"matrix"} for slot in SLOTS},
    GROUP: (),
    (*GROUP, "lr"): NUMBERS,
    (*GROUP, "alpha"): BELOW_1,
    (*GROUP, "eps"): NUMBERS,
    (*GROUP, "weight_decay"): NUMBERS,
    (*GROUP, "momentum"): BELOW_1 | {"0"},
    (*GROUP, "centered"): {"True", "False"},
    (*GROUP, "maximize"): {"True", "False", "absent"},
    **{(*GROUP, key): set(VALUES) for key in ("foreach", "capturable")},
    (*GROUP, "param_names"): {"absent"},
    (*GROUP, "params"): (),
    (*GROUP, "params", 0): {"0", "False"},
    (*GROUP, "params", 1): {"True"},
}


@settings(derandomize=True, deadline=None, max_examples=200)
@given(path=st.sampled_from(list(RIGHT)), value=st.sampled_from(sorted(VALUES)))
def test_any_damage_is_found(path, value):
    saved, error = damaged((path, VALUES[value])), None
    try:
        run = from_torch_checkpoint(MODEL.state_dict(), saved, dict, ["weight", "bias"])
    except (TypeError, ValueError) as caught:
        error = caught
    assert (error is None) == (value in RIGHT[path]), error
    if error:
        assert is_clear(error), error
    else:
        jax.tree.map(np.testing.assert_array_equal, run.params, RUN.params)


def long_run():
    """With many long names."""
    model = torch.nn.Module()
    for i in range(300):
        name = "parameter" * 30 + str(i)
        model.register_parameter(name, torch.nn.Parameter(torch.ones(1)))
    optimizer = torch.optim.RMSprop(model.parameters(), momentum=0.9)
    update_in_torch(model, optimizer, torch.ones_like)
    return model, optimizer


LONG = long_run()
LONG_RUN = from_torch(*LONG, dict)
LONG_SAVED = LONG[0].state_dict(), LONG[1].state_dict()
OF_LONG = {
    "a port for another": lambda: from_torch(*LONG, lambda w: w["x" * 1000]),
    "a port that drops": lambda: from_torch(*LONG, lambda w: {}),
    "a port that repeats": lambda: from_torch(*LONG, lambda w: [w, w]),
    "a port that changes": lambda: from_torch(
        *LONG, lambda w: {name: 2 * x for name, x in w.items()}
    ),
    "no names": lambda: from_torch_checkpoint(*LONG_SAVED, dict),
    "other names": lambda: from_torch_checkpoint(
        *LONG_SAVED, dict, [f"{'x' * 1000}{i}" for i in range(300)]
    ),
    "other params": lambda: to_torch([1.0] * 300, None, *LONG, dict),
    "params in another order": lambda: to_torch(
        collections.OrderedDict(LONG_RUN.params), None, *LONG, dict
    ),
    "averages below 0": lambda: to_torch(
        LONG_RUN.params,
        jax.tree.map(lambda x: x - 2 * x.ndim, LONG_RUN.opt_state),
        *LONG,
        dict,
    ),
    "averages of other shapes": lambda: to_torch(
        LONG_RUN.params,
        jax.tree.map(
            lambda x: np.ones((1,) * 60 * x.ndim, x.dtype), LONG_RUN.opt_state
        ),
        *LONG,
        dict,
    ),
    "params of other shapes": lambda: to_torch(
        jax.tree.map(lambda x: np.ones((1,) * 60), LONG_RUN.params), None, *LONG, dict
    ),
    "foreign states": lambda: from_torch_checkpoint(
        LONG_SAVED[0],
        LONG_SAVED[1] | {"state": {f"{'x' * 1000}{i}": {} for i in range(300)}},
        dict,
        list(LONG_SAVED[0]),
    ),
    "other options": lambda: from_torch_checkpoint(
        LONG_SAVED[0],
        LONG_SAVED[1] | {"param_groups": [{"params": []} | LONG_SAVED[0]]},
        dict,
    ),
}


@pytest.mark.parametrize("call", OF_LONG.values(), ids=OF_LONG)
def test_errors_are_short(call):
    with pytest.raises((KeyError, TypeError, ValueError)) as caught:
        call()
    assert len(str(caught.value)) < LONGEST
