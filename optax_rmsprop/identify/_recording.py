"""Record a run of torch, Keras or JAX; save it, and load it.

The file is NumPy's .npz with an array `params/NAME` and an array `grads/NAME` for each
parameter, and `learning_rate`. A program that has NumPy alone can write it.

Of each parameter a few coordinates are recorded, the same at every step.
"""

import collections
import contextlib
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr

from optax_rmsprop._errors import integer, kind_of, shown, some
from optax_rmsprop.identify._run import LEAST_STEPS, indices, rates_of

MOST_NUMBERS = 1024
LEAST_NUMBERS = 4  # of each parameter
BFLOAT16 = np.dtype(jnp.bfloat16)
# What NumPy raises for a file that is no .npz, or a damaged one.
UNREADABLE = (
    *(AttributeError, EOFError, RuntimeError, ValueError),
    *(zipfile.BadZipFile, zlib.error),
)
CLIPS = ("clipnorm", "clipvalue", "global_clipnorm")


class Recording(NamedTuple):
    """What `identify` and `compare` take, in their order: `identify(*recording)`.

    Attributes:
      params: a dictionary of arrays by name, T + 1 on the first axis.
      grads: the same, with T on the first axis.
      learning_rate: T numbers, or None if they are not known.
    """

    params: dict[str, np.ndarray]
    grads: dict[str, np.ndarray]
    learning_rate: np.ndarray | None = None

    def save(self, file: str | PathLike[str]) -> None:
        """Write an .npz file, which `load` reads."""
        arrays: dict[str, Any] = {}
        for kind, named in (("params", self.params), ("grads", self.grads)):
            for name, array in named.items():
                if array.dtype == BFLOAT16:  # which NumPy's format does not have
                    arrays[f"bfloat16/{kind}/{name}"] = array.view(np.uint16)
                elif array.dtype.kind in "fc":
                    arrays[f"{kind}/{name}"] = array
                else:
                    raise TypeError(
                        f"`{kind}` must be arrays of floats, got {array.dtype} in "
                        f"{shown(name)}; convert it to float32"
                    )
        if self.learning_rate is not None:
            arrays["learning_rate"] = self.learning_rate
        np.savez(file, **arrays)


def load(file: str | PathLike[str]) -> Recording:
    """Read a recording from an .npz file.

    Args:
      file: a file of `Recording.save`, or of `numpy.savez` with arrays `params/NAME`
        and `grads/NAME` for each parameter, and `learning_rate` or not.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no .npz file, or has other arrays.
    """
    found: dict[str, dict[str, np.ndarray]] = {"params": {}, "grads": {}}
    rate, others = None, []
    try:
        with Path(file).open("rb") as stream:
            arrays = np.load(stream, allow_pickle=False)
            for key in arrays.files:  # an array alone has none
                kind, _, name = key.removeprefix("bfloat16/").partition("/")
                array = arrays[key]
                if not isinstance(array, np.ndarray):
                    raise ValueError(f"{key} is no array")
                if key == "learning_rate":
                    rate = array
                elif kind in found and name not in ("", *found[kind]):
                    if key.startswith("bfloat16/") and array.dtype == np.uint16:
                        array = array.view(BFLOAT16)
                    found[kind][name] = array
                else:
                    others.append(key)
    except UNREADABLE as error:
        raise ValueError(
            f"`file` must be an .npz file of a recording, got {shown(str(file))}, "
            f"which cannot be read ({error}); Recording.save or numpy.savez write it"
        ) from None
    if found["params"].keys() != found["grads"].keys():
        others += sorted(found["params"].keys() ^ found["grads"].keys())
    if others or not found["params"]:
        raise ValueError(
            "`file` must have arrays params/NAME, grads/NAME and learning_rate, got "
            f"{some(others) if others else 'none of params'} in {shown(str(file))}"
        )
    return Recording(found["params"], found["grads"], rate)


class Recorder:
    """The run that `record` has seen so far."""

    def __init__(self, steps: int):
        self.steps = _steps(steps)
        self._before: list[dict[str, tuple[np.ndarray, np.ndarray]]] = []
        self._after: list[dict[str, np.ndarray]] = []
        self._rates: list[float] = []

    @property
    def recording(self) -> Recording:
        """The `Recording` of the steps so far.

        Raises:
          ValueError: fewer steps than `identify` needs; a parameter had a gradient at
            some steps only, or was changed between two steps.
        """
        if len(self._after) < LEAST_STEPS:
            raise ValueError(
                f"the recording must have at least {LEAST_STEPS} steps, got "
                f"{len(self._after)}; take more of them within `with`"
            )
        # A last step that raised an error was not taken.
        taken = self._before[: len(self._after)]
        names = taken[0].keys()
        for step, (before, last) in enumerate(
            zip(taken[1:], self._after[:-1], strict=True), start=1
        ):
            if before.keys() != names:
                raise ValueError(
                    f"{some(sorted(before.keys() ^ names))} must have a gradient at "
                    f"every step, got one only at some, as at step {step}; freeze it"
                )
            for name, (p, _) in before.items():
                if not np.array_equal(p, last[name]):
                    raise ValueError(
                        f"{name} must change in the optimizer's step only, but it "
                        f"changed between the steps {step - 1} and {step}; record "
                        "without averaging or clipping of weights"
                    )
        last = self._after[-1]
        return Recording(
            {n: np.stack([*(b[n][0] for b in taken), last[n]]) for n in names},
            {n: np.stack([b[n][1] for b in taken]) for n in names},
            np.array(self._rates[: len(taken)]),
        )

    def save(self, file: str | PathLike[str]) -> None:
        """Write the recording to an .npz file."""
        self.recording.save(file)

    def _note_before(self, arrays: dict[str, tuple[Any, Any]], rate: Any) -> None:
        if len(self._after) < self.steps:
            most = len(arrays)
            # A step that raised an error was not taken.
            del self._before[len(self._after) :], self._rates[len(self._after) :]
            self._before.append(
                {n: (_part(p, most), _part(g, most)) for n, (p, g) in arrays.items()}
            )
            self._rates.append(float(rate))

    def _note_after(self, arrays: dict[str, Any]) -> None:
        if len(self._after) < len(self._before):
            before = self._before[-1]
            most = len(before)
            self._after.append({n: _part(arrays[n], most) for n in before})


@contextlib.contextmanager
def record(
    optimizer: Any, steps: int = 60, *, group: int | None = None
) -> Iterator[Recorder]:
    """Record the next steps of an optimizer of torch or Keras.

        with record(optimizer) as recorder:
            train()
        recorder.save("run.npz")                 # or identify(*recorder.recording)

    Parameters and gradients are copied before and after each step, at about 1000
    coordinates, chosen once. The optimizer is not changed afterwards.

    Args:
      optimizer: a torch.optim.Optimizer of any class, if its step gets no closure, or
        an optimizer of Keras 3 in a loop that is not compiled
        (`model.compile(..., run_eagerly=True)`).
      steps: how many steps, at least 10. Later ones are not recorded.
      group: the parameter group of torch to record, an index; needed if there are
        several, because each has options of its own.

    Yields:
      A `Recorder`: its `recording` has the steps so far, its `save(file)` writes them.

    Raises:
      TypeError: an optimizer of neither.
      ValueError: a group that is not there, or is needed; a closure given to `step`,
        which computes the gradients within it; in `recording`, what it says.
    """
    recorder = Recorder(steps)
    if hasattr(optimizer, "register_step_pre_hook"):
        number = _group(optimizer, group)
        now: dict[str, Any] = {}  # the parameters of the step that is being taken

        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if any(x is not None for x in (*args[1:], *kwargs.values())):
                raise ValueError(
                    "`optimizer.step` must be called without a closure while it is "
                    "recorded; call backward() before it"
                )
            now.clear()  # of a step that raised an error
            now.update(_torch_group(optimizer, number))
            rate = optimizer.param_groups[number]["lr"]
            recorder._note_before({n: (p, p.grad) for n, p in now.items()}, rate)

        def after(*_: Any) -> None:
            recorder._note_after(now)

        hooks = [
            optimizer.register_step_pre_hook(before),
            optimizer.register_step_post_hook(after),
        ]
        try:
            yield recorder
        finally:
            for hook in hooks:
                hook.remove()
    elif hasattr(optimizer, "apply") and hasattr(optimizer, "build"):
        if hasattr(optimizer, "inner_optimizer"):
            raise ValueError(
                "`optimizer` must get the gradients as they are, got a "
                "LossScaleOptimizer; give its inner_optimizer"
            )
        clips = [name for name in CLIPS if getattr(optimizer, name, None) is not None]
        if clips:
            raise ValueError(
                "`optimizer` must get the gradients after clipping, but it clips them "
                f"itself ({', '.join(clips)}); clip them before its apply"
            )
        apply = optimizer.apply

        def applied(grads: Any, trainable_variables: Any = None) -> Any:
            given = trainable_variables or optimizer._trainable_variables
            variables = dict(zip(_distinct(v.path for v in given), given, strict=True))
            pairs = zip(variables.items(), grads, strict=True)
            arrays = {n: (v.value, g) for (n, v), g in pairs if g is not None}
            recorder._note_before(arrays, optimizer.learning_rate)
            result = apply(grads, trainable_variables)
            recorder._note_after({n: v.value for n, v in variables.items()})
            return result

        optimizer.apply = applied
        try:
            yield recorder
        finally:
            del optimizer.apply
    else:
        raise TypeError(
            "`optimizer` must be an optimizer of torch or Keras 3, got "
            f"{kind_of(optimizer)}; wrap an optax transformation in `recorded`"
        )


def _steps(steps: int) -> int:
    if integer("steps", steps) < LEAST_STEPS:
        raise ValueError(f"`steps` must be at least {LEAST_STEPS}, got {steps}")
    return steps


def _group(optimizer: Any, group: int | None) -> int:
    count = len(optimizer.param_groups)
    if group is None and count > 1:
        raise ValueError(
            f"`group` must be an index below {count}, got None: the optimizer has "
            f"{count} groups, each with options of its own; record one of them"
        )
    group = 0 if group is None else integer("group", group)
    if group >= count:
        raise ValueError(f"`group` must be an index below {count}, got {group}")
    return group


def _torch_group(optimizer: Any, number: int) -> dict[str, Any]:
    """The parameters of a group that have a gradient, by name."""
    group = optimizer.param_groups[number]
    names = group.get("param_names") or [
        f"param_groups[{number}][{i}]" for i in range(len(group["params"]))
    ]
    pairs = zip(_distinct(names), group["params"], strict=True)
    return {name: p for name, p in pairs if p.grad is not None}


def _distinct(names: Iterable[str]) -> list[str]:
    """The names, with a number where one comes again."""
    seen: collections.Counter[str] = collections.Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found


def _most(arrays: int) -> int:
    """How many coordinates of each of so many arrays are recorded."""
    return max(LEAST_NUMBERS, MOST_NUMBERS // arrays)


def _part(array: Any, arrays: int) -> np.ndarray:
    """Some coordinates of an array of torch, TensorFlow or JAX, as a copy in NumPy."""
    most = _most(arrays)
    if hasattr(array, "detach"):
        if array.is_sparse:
            raise ValueError(
                "`optimizer` must have dense gradients while it is recorded, got a "
                "sparse one; give the embedding sparse=False"
            )
        flat = array.detach().reshape(-1)
        flat = flat[indices(flat.numel(), most)].cpu()
        if str(flat.dtype) == "torch.bfloat16":
            return flat.float().numpy().astype(BFLOAT16)
        return flat.numpy()
    try:
        flat = np.asarray(array).reshape(-1)
    except Exception as error:
        raise ValueError(
            f"`record` must see values, got {kind_of(array)} in a compiled step "
            f"({type(error).__name__}); give model.compile run_eagerly=True"
        ) from None
    return flat[indices(flat.size, most)]


class RecordedState(NamedTuple):
    """State of `recorded`: that of the transformation, and what was recorded.

    Attributes:
      inner_state: the state of the transformation.
      count: the number of updates.
      params, grads: trees like the parameters, with steps + 1 on the first axis and
        some coordinates on the second.
    """

    inner_state: optax.OptState
    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as in optax
    params: Any
    grads: Any


def recorded(
    tx: optax.GradientTransformation, steps: int = 60
) -> optax.GradientTransformationExtraArgs:
    """Record the first steps of a transformation in its state, also under `jax.jit`.

        tx = recorded(optax.rmsprop(1e-3))
        ...                                                    # train as before
        identify(*recording_of(opt_state, learning_rate=1e-3))

    The updates are those of `tx`. About 1000 coordinates are recorded, chosen once.

    Args:
      tx: an optax transformation. Put it around all that changes the updates, but not
        around a clipping of gradients.
      steps: how many steps, at least 10. Later ones are not recorded.
    """
    steps = _steps(steps)
    inner = optax.with_extra_args_support(tx)

    def parts(tree: Any) -> Any:
        """Coordinates of the arrays of floats; others are not trained."""
        most = _most(len(jax.tree.leaves(tree)))
        return jax.tree.map(
            lambda x: (
                jnp.ravel(x)[indices(np.size(x), most)]
                if jnp.issubdtype(x.dtype, jnp.inexact)
                else None
            ),
            tree,
        )

    def init(params: optax.Params) -> RecordedState:
        # Gradients of 16-bit parameters may have 32 bits.
        wider = lambda dtype: jnp.promote_types(dtype, jnp.float32)  # noqa: E731
        of_params, of_grads = (
            jax.tree.map(
                lambda x, dtype_of=dtype_of: jnp.zeros(
                    (steps + 1, *x.shape), dtype_of(x.dtype)
                ),
                parts(params),
            )
            for dtype_of in (jnp.dtype, wider)
        )
        count = jnp.zeros([], jnp.int32)
        return RecordedState(inner.init(params), count, of_params, of_grads)

    def update(
        updates: optax.Updates,
        state: RecordedState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, RecordedState]:
        if params is None:
            raise ValueError(
                "`params` must be given to the update of `recorded`, got None; call "
                "tx.update(grads, opt_state, params)"
            )

        def noted(buffers: Any, tree: Any) -> Any:
            # After the last step the index is out of bounds, and nothing is written.
            def set_row(buffer: jax.Array, part: jax.Array) -> jax.Array:
                if jnp.promote_types(part.dtype, buffer.dtype) != buffer.dtype:
                    raise TypeError(
                        f"`updates` must be {buffer.dtype} at most while they are "
                        f"recorded, got {part.dtype}; convert them"
                    )
                row = part.astype(buffer.dtype)
                return buffer.at[state.count].set(row, mode="drop")

            return jax.tree.map(set_row, buffers, parts(tree))

        new, inner_state = inner.update(
            updates, state.inner_state, params, **extra_args
        )
        return new, RecordedState(
            inner_state,
            optax.safe_increment(state.count),
            noted(state.params, params),
            noted(state.grads, updates),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def recording_of(opt_state: optax.OptState, learning_rate: Any = None) -> Recording:
    """Return the `Recording` in a state of `recorded`, also within another state.

    Args:
      opt_state: the state after at least 11 updates: the parameters after a step are
        those that the next update gets.
      learning_rate: as in `identify`.
    """
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=_is_ours) if _is_ours(x)]
    if len(found) != 1:
        raise ValueError(
            "`opt_state` must have one state of `recorded`, got "
            f"{len(found)}; wrap the transformation: recorded(tx)"
        )
    state = found[0]
    params, grads = (
        {keystr(path) or "params": np.asarray(x) for path, x in found}
        for found, _ in map(
            jax.tree_util.tree_flatten_with_path, (state.params, state.grads)
        )
    )
    steps = min(int(state.count), *map(len, params.values())) - 1
    if steps < LEAST_STEPS:
        raise ValueError(
            f"`opt_state` must have at least {LEAST_STEPS + 1} updates, got "
            f"{int(state.count)}; train on"
        )
    return Recording(
        {name: x[: steps + 1] for name, x in params.items()},
        {name: x[:steps] for name, x in grads.items()},
        None if learning_rate is None else rates_of(learning_rate, steps),
    )


def _is_ours(node: Any) -> bool:
    return isinstance(node, RecordedState)
