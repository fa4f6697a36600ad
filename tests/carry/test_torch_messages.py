"""No error or warning has more than 600 characters, however large the run is.

`test_torch_damaged.py` has more errors, of a smaller run.
"""

import functools
import warnings

import numpy as np
import pytest

pytest.importorskip("torch")
import torch

from helpers import update_in_torch
from optax_rmsprop.carry import from_torch, from_torch_checkpoint, names_of, to_torch
from optax_rmsprop.carry._torch._checkpoints import recognise

pytestmark = pytest.mark.slow
LONGEST = 600
LONG = "x" * 100_000
SHAPE = (1,) * 60
NAMES = ["parameter" * 30 + str(i) for i in range(500)]
OTHERS = torch.nn.Linear(3, 2)


@functools.cache
def live(groups=1):
    model = torch.nn.Module()
    for name in NAMES:
        model.register_parameter(name, torch.nn.Parameter(torch.ones(1)))
    parameters = list(model.parameters())
    divided = [
        {"params": parameters[i::groups], "weight_decay": i / 10} for i in range(groups)
    ]
    optimizer = torch.optim.RMSprop(divided, momentum=0.9)
    update_in_torch(model, optimizer, torch.ones_like)
    return model, optimizer


@functools.cache
def run(groups=1):
    return from_torch(*live(groups), dict)


def model_of(tensor):
    return dict.fromkeys(NAMES, tensor)


def saved(**changes):
    """The state_dict of the optimizer, with changes of its only group."""
    optimizer = live()[1].state_dict()
    return optimizer | {"param_groups": [optimizer["param_groups"][0] | changes]}


def from_saved(model=None, optimizer=None, names=NAMES):
    model = live()[0].state_dict() if model is None else model
    return from_torch_checkpoint(model, optimizer or saved(), dict, names)


def carried_back(params=None, state=None, groups=1):
    made = run(groups)
    state = made.opt_state if state is None else state
    return to_torch(params or made.params, state, *live(groups), dict)


def with_field(**fields):
    average, *rest = run().opt_state
    return average._replace(**fields), *rest


def with_nan():
    optimizer = saved()
    for state in optimizer["state"].values():
        state["square_avg"] = torch.full((1,), np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_saved(optimizer=optimizer)


def foreign(value):
    return torch.optim.RMSprop([torch.nn.Parameter(value)])


SHARED = torch.ones(501)
CASES = {
    "a dict for the model": lambda: from_torch(run().params, live()[1], dict),
    "a dict for the optimizer": lambda: from_torch(live()[0], saved(), dict),
    "a class of a long name": lambda: from_torch(OTHERS, type(LONG, (), {})(), dict),
    "another model": lambda: from_torch(OTHERS, live()[1], dict),
    "a parameter of many axes": lambda: from_torch(
        OTHERS, foreign(torch.ones(SHAPE)), dict
    ),
    "a text for a port": lambda: from_torch(*live(), LONG),
    "a port that returns text": lambda: from_torch(*live(), lambda w: LONG),
    "a port that returns names": lambda: from_torch(*live(), list),
    "a port that mixes keys": lambda: from_torch(*live(), lambda w: {**w, 1: 2.0}),
    "a port that casts, at a long path": lambda: from_torch(
        *live(), lambda w: {LONG: {n: x.astype(float) for n, x in w.items()}}
    ),
    "a port that joins groups": lambda: from_torch(
        *live(2), lambda w: np.concatenate(list(w.values()))
    ),
    "a port that asks for a tuple": lambda: from_torch(*live(), lambda w: w[(*w,)]),
    "a port that returns objects": lambda: from_torch(
        *live(), lambda w: {name: object() for name in w}
    ),
    "too many learning rates": lambda: from_torch(*live(), dict, [0.1] * 600),
    "a text for a learning rate": lambda: from_torch(*live(), dict, LONG),
    "a dict for a learning rate": lambda: from_torch(*live(), dict, run().params),
    "a huge learning rate": lambda: from_torch(*live(), dict, -(10**5000)),
    "a text for an option": lambda: from_saved(optimizer=saved(alpha=LONG)),
    "a tensor for an option": lambda: from_saved(
        optimizer=saved(alpha=torch.ones(SHAPE))
    ),
    "a state of other slots": lambda: from_saved(
        optimizer=saved() | {"state": {0: live()[0].state_dict()}}
    ),
    "a state without its slots": lambda: from_saved(
        optimizer=saved()
        | {"state": {i: {"step": 1} | model_of(0) for i in range(500)}}
    ),
    "states of tuples": lambda: from_saved(
        optimizer=saved() | {"state": {(LONG, i): {} for i in range(500)}}
    ),
    "a text for a state": lambda: from_saved(
        optimizer=saved() | {"state": {LONG: LONG}}
    ),
    "a text for the groups": lambda: from_saved(
        optimizer=saved() | {"param_groups": LONG}
    ),
    "texts for groups": lambda: from_saved(
        optimizer=saved() | {"param_groups": [LONG]}
    ),
    "a dict for the params": lambda: from_saved(optimizer=saved(params=model_of(0))),
    "a tuple for a param": lambda: from_saved(optimizer=saved(params=[(*NAMES,)])),
    "too few param_names": lambda: from_saved(optimizer=saved(param_names=NAMES[1:])),
    "other param_names": lambda: from_saved(optimizer=saved(param_names=NAMES[::-1])),
    "too few names": lambda: from_saved(names=NAMES[1:]),
    "dicts for names": lambda: from_saved(names=[model_of(0)] * 500),
    "a dict for the names": lambda: from_saved(names=model_of(0)),
    "a text for the names": lambda: from_saved(names=LONG),
    "the same name": lambda: from_saved(names=NAMES[:1] * 500),
    "a list for a model": lambda: from_saved(list(model_of(0).items())),
    "a tuple for a name": lambda: from_saved({(*NAMES,): 1}),
    "a list for a tensor": lambda: from_saved({LONG: [1] * 10_000}),
    "a checkpoint for a model": lambda: from_saved({"model": model_of(0), LONG: 1}),
    "a list for an optimizer": lambda: from_saved(optimizer=[saved()]),
    "a model for an optimizer": lambda: from_saved(optimizer=model_of(0)),
    "other shapes": lambda: from_saved(model_of(torch.ones(SHAPE))),
    "other dtypes": lambda: from_saved(
        {name: torch.ones(1, dtype=torch.complex64) for name in NAMES}
    ),
    "a dtype that NumPy lacks": lambda: from_saved(
        {name: torch.ones(1).to(torch.float8_e4m3fn) for name in NAMES}
    ),
    "sparse tensors": lambda: from_saved({n: torch.ones(1).to_sparse() for n in NAMES}),
    "meta tensors": lambda: from_saved(model_of(torch.ones(1, device="meta"))),
    "the same tensor": lambda: from_saved(model_of(torch.ones(1))),
    "tensors that overlap": lambda: from_saved(
        {name: SHARED[i : i + 2] for i, name in enumerate(NAMES)},
        saved() | {"state": {}},
    ),
    "64 bits": lambda: from_saved({n: torch.ones(1).double() for n in NAMES}),
    "a parameter in two groups": lambda: from_saved(
        optimizer=saved() | {"param_groups": saved()["param_groups"] * 2},
        names=NAMES * 2,
    ),
    "NaN": with_nan,
    "params of other names": lambda: carried_back({LONG + n: 1.0 for n in NAMES}),
    "params of another dtype": lambda: carried_back(model_of(np.ones(1, np.int8))),
    "texts for params": lambda: carried_back(model_of(LONG)),
    "a text for a state in JAX": lambda: carried_back(state=LONG),
    "too many averages": lambda: carried_back(state=(run().opt_state[0],) * 500),
    "a state of more groups": lambda: carried_back(state=run(2).opt_state),
    "a state of fewer groups": lambda: carried_back(state=run().opt_state, groups=2),
    "other groups in a state": lambda: carried_back(
        state=run(2).opt_state._replace(inner_states={LONG + n: 0 for n in NAMES}),
        groups=2,
    ),
    "a text for groups in a state": lambda: carried_back(
        state=run(2).opt_state._replace(inner_states=LONG), groups=2
    ),
    "a text for a count": lambda: carried_back(state=with_field(count=LONG)),
    "a count of many axes": lambda: carried_back(
        state=with_field(count=np.ones(SHAPE, int))
    ),
    "a text for averages": lambda: carried_back(state=with_field(nu=LONG)),
    "texts for averages": lambda: carried_back(state=with_field(nu=model_of(LONG))),
    "complex averages": lambda: carried_back(
        state=with_field(nu=model_of(np.ones(1, complex)))
    ),
    "a model without the modules": lambda: to_torch(
        *run()[::2], OTHERS, torch.optim.RMSprop(OTHERS.parameters()), dict
    ),
    "gradients of other names": lambda: run().tx.update(
        {name: run().params[name] for name in NAMES[1:]}, run().opt_state
    ),
    "gradients of other names, and two groups": lambda: run(2).tx.update(
        {name: run(2).params[name] for name in NAMES[1:]}, run(2).opt_state
    ),
    "gradients in a list": lambda: run(2).tx.update(
        list(run(2).params.values()), run(2).opt_state
    ),
    "other params beside gradients": lambda: run(2).tx.update(
        run(2).params, run(2).opt_state, run(2).params | {LONG: 1.0}
    ),
    "params of other names for init": lambda: run(2).tx.init({LONG: 1.0}),
    "a state of one group": lambda: run(2).tx.update(run(2).params, run().opt_state),
    "many models": lambda: recognise(
        {name: dict(OTHERS.state_dict()) for name in NAMES} | {"optimizer": saved()}
    ),
    "many optimizers": lambda: recognise(
        {name: dict(saved()) for name in NAMES} | {"model": OTHERS.state_dict()}
    ),
    "neither": lambda: recognise(model_of(1)),
    "tuples for keys": lambda: recognise({(LONG, name): 1 for name in NAMES}),
    "a model alone": lambda: recognise(live()[0].state_dict()),
    "names that only wrappers tell apart": lambda: recognise(
        {
            "model": {k + n: torch.ones(1) for n in NAMES for k in ("", "module.")},
            "optimizer": saved(),
        }
    ),
    "a flattened optimizer with frozen parameters": lambda: recognise(
        {
            "model": live()[0].state_dict(),
            "optimizer": {f"param_groups.{name}.lr": 0.1 for name in NAMES}
            | {f"state.{NAMES[0]}.step": 1},
        }
    ),
    "names of another model": lambda: names_of(OTHERS, live()[1]),
    "names of a dict": lambda: names_of(model_of(0), live()[1]),
}


@pytest.mark.parametrize("call", CASES.values(), ids=CASES)
def test_a_message_is_short(call):
    with pytest.raises((KeyError, TypeError, ValueError, RuntimeWarning)) as caught:
        call()
    assert len(str(caught.value)) < LONGEST
