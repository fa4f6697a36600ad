"""Go on with a carried run in Flax NNX, whose optimizer has the state in variables.

By hand it is four lines: write the parameters into the model, make an optimizer of the
run's transformation, write the run's state into it, and its number of steps. But
`nnx.update` says nothing of a name that it misses, adds one that the model does not
have, and takes any shape; and `optax.partition` needs the parameters in the port's own
kind of tree. So `to_nnx` does it, and checks names and shapes first.
"""

from __future__ import annotations  # so that help() shows these types by name

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr, tree_flatten_with_path

from optax_rmsprop._errors import kind_of, some, trees
from optax_rmsprop.carry._run import Run

if TYPE_CHECKING:
    from flax import nnx


def to_nnx(run: Run, model: nnx.Module, wrt: Any = None) -> nnx.Optimizer:
    """Write a carried run into a Flax NNX model, and make its optimizer.

    Args:
      run: what `from_torch` or one of its relatives returned. Its parameters must have
        the names and shapes of the model's, in dicts, lists or an `nnx.State`. They
        keep their dtype.
      model: gets the run's parameters, in place. Other variables, such as running
        statistics, are not written.
      wrt: the filter of the variables that are trained, as of `nnx.Optimizer`. By
        default `nnx.Param`.

    Returns:
      An `nnx.Optimizer` that goes on with the run's state and at its step: call
      `optimizer.update(model, grads)`. `nnx.as_pure(optimizer.opt_state)` (before flax
      0.12 `nnx.pure`) is its state in the run's own form, as `to_torch` takes it.

    Raises:
      TypeError: the run or the model is of another kind.
      ValueError: names or shapes differ; the state is not of the run's `tx`.

    Example:
      >>> import torch
      >>> from flax import nnx
      >>> from optax_rmsprop.carry import from_torch, to_nnx, torch_layers
      >>> source = torch.nn.Linear(3, 2)
      >>> torch_optimizer = torch.optim.RMSprop(source.parameters())
      >>> run = from_torch(
      ...     source, torch_optimizer, lambda weights: torch_layers.linear(weights, "")
      ... )
      >>> optimizer = to_nnx(run, nnx.Linear(3, 2, rngs=nnx.Rngs(0)))

    References:
      flax/nnx/training/optimizer.py (0.12.8).
    """
    from flax import nnx

    if not isinstance(run, Run):
        raise TypeError(
            f"`run` must be a Run, got {kind_of(run)}; give what from_torch returned"
        )
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"`model` must be an nnx.Module, got {kind_of(model)}; a Linen model takes "
            "the run in its TrainState"
        )

    def is_leaf(x: Any) -> bool:
        return x is None or isinstance(x, nnx.Variable)

    def named(tree: Any) -> dict[str, Any]:
        leaves, _ = tree_flatten_with_path(tree, is_leaf=is_leaf)
        return {keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}

    def translator(like: Any) -> Callable[[Any], Any]:
        """A function from a tree of either form to one of this form."""
        names, structure = named(like), jax.tree.structure(like, is_leaf)

        def translated(tree: Any) -> Any:
            leaves = named(tree)
            return jax.tree.unflatten(structure, [leaves[name] for name in names])

        return translated

    wrt = nnx.Param if wrt is None else wrt
    variables = nnx.state(model, wrt)
    _check(named(run.params), named(variables))
    made: Any = jax.tree.structure(jax.eval_shape(run.tx.init, run.params))
    given: Any = jax.tree.structure(run.opt_state)
    if given != made:
        raise ValueError(
            f"`run` must have a state of its own `tx`: {trees(given, made)}; give what "
            "from_torch returned"
        )
    to_run, to_model = translator(run.params), translator(variables)

    def init_fn(params: Any) -> Any:
        return run.tx.init(to_run(params))

    def update_fn(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        if params is not None:
            params = to_run(params)
        updates, state = run.tx.update(to_run(updates), state, params, **extra)
        return to_model(updates), state

    tx = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    nnx.update(model, to_model(run.params))
    optimizer = nnx.Optimizer(model, tx, wrt=wrt)
    nnx.update(optimizer.opt_state, nnx.state(run.opt_state))
    optimizer.step[...] = jnp.full_like(optimizer.step[...], _step(run.opt_state))
    return optimizer


def _check(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Check that the run has the names and the shapes of the model."""
    lists = {
        "missing": sorted(theirs.keys() - ours.keys()),
        "unexpected": sorted(ours.keys() - theirs.keys()),
    }
    found = [f"{kind} {some(names)}" for kind, names in lists.items() if names]
    if found:
        raise ValueError(
            f"`run` must have the parameters of the model: {'; '.join(found)}; let the "
            "port return the names of nnx.state(model, wrt)"
        )
    differ = [
        f"{name} {np.shape(leaf)} for {np.shape(theirs[name])}"
        for name, leaf in ours.items()
        if np.shape(leaf) != np.shape(theirs[name])
    ]
    if differ:
        raise ValueError(
            f"`run` must have the shapes of the model, got {some(differ)}; let the "
            "port transpose, or make the model of the run's sizes"
        )


def _step(opt_state: Any) -> int:
    """The number of updates made, the largest of the groups'."""
    counts = optax.tree.get_all_with_path(opt_state, "count")
    return max((int(count) for _, count in counts), default=0)
