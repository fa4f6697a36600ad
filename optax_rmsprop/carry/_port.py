"""Find out what a port does: call it with the index of each element as its value.

Take a model with `a` of shape (2, 3) and `b` of shape (3,), and this port, which
transposes and concatenates:

    def port(weights):
        return {"w": np.concatenate([weights["a"].T, weights["b"][:, None]], axis=1)}

We number the elements of all arrays in one sequence, and give the port these indices:

    a = [[0, 1, 2],     b = [6, 7, 8]     it returns   w = [[0, 3, 6],
         [3, 4, 5]]                                         [1, 4, 7],
                                                            [2, 5, 8]]

So we know where each element of `w` comes from: w[0, 2] is element 6, which is b[0].
The port is never called with a weight. If `flat` has the values of `a` and then those
of `b`, in one dimension, the leaf of the port's tree is flat[w]. A slot of the
optimizer has its parameter's shape, so it becomes flat[w] likewise. In the other
direction, flat[w] = leaf restores `a` and `b`. Each index from 0 to 8 is in `w` once,
hence the port neither drops nor repeats an element.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.tree_util import tree_flatten_with_path

from optax_rmsprop._errors import at, bare, other_paths, short, shown, some, trees

Port = Callable[[dict[str, np.ndarray]], Any]

# A port may insist on floating point, which weights are. So indices go through it as
# float32, which represents each integer up to 2²⁴, or float16, up to 2¹¹.
LOW_BITS = 24
LOW_MASK = 2**LOW_BITS - 1
CHECK_MASK = 2**10 - 1
NONE = -1  # in place of an index, for a number that the port was not given


class ProbedPort:
    """A port, with the index of the source's element for each element of its tree.

    Attributes:
      paths: the path of each leaf of the port's tree.
      sources: the names of the arrays from which each leaf is made.
      complete: the names of the arrays of which the port uses each element, so that
        `disassemble` restores them.
    """

    def __init__(
        self, port: Port, shapes: Mapping[str, tuple[int, ...]], needed: Collection[str]
    ):
        """Probe a port.

        Args:
          port: the function.
          shapes: the shapes of its arrays, by name.
          needed: the names of the arrays of which it must use each element.

        Raises:
          ValueError: the port changes, repeats or drops elements.
        """
        self._port = port
        self._shapes = dict(shapes)
        sizes = [math.prod(shape) for shape in shapes.values()]
        self._total = sum(sizes)
        # Indices number the elements of all arrays, one array after another. Those of
        # an array are from its start to before its end.
        self._ends = np.cumsum(sizes, dtype=np.int64)
        self._spans = dict(
            zip(shapes, zip(self._ends - sizes, self._ends, strict=True), strict=True)
        )
        self.paths, self._indices, self._structure = self._probe()
        used = self._used_once()
        self.complete = []
        for name, (start, end) in self._spans.items():
            if used[start:end].all():
                if start < end:
                    self.complete.append(name)
            elif name in needed:
                raise ValueError(
                    f"the port must keep each trained value, but drops some of "
                    f"{bare(name)}; keep them in its tree, or freeze the parameter in "
                    "torch"
                )
        self.sources = [self._names_of(np.ravel(indices)) for indices in self._indices]

    def assemble(
        self, number: int, array_of: Callable[[str], np.ndarray]
    ) -> np.ndarray:
        """Make the leaf of this number from other arrays of the same shapes."""
        arrays = {name: array_of(name) for name in self.sources[number]}
        dtype = np.result_type(*arrays.values()) if arrays else np.float32
        leaf = np.empty(self._indices[number].shape, dtype)
        for name, in_leaf, in_array in self._parts(number):
            leaf[in_leaf] = arrays[name].ravel()[in_array]
        return leaf

    def disassemble(self, tree: Any) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the arrays from which the port would make this tree.

        Arrays of which the port drops any element are left out.
        """
        # An array may be in several leaves, for example if the port splits it. It is
        # complete when none of its elements is missing.
        arrays: dict[str, np.ndarray] = {}
        missing: dict[str, int] = {}
        for number, leaf in enumerate(jax.tree.leaves(tree)):
            values = np.asarray(leaf)
            for name, in_leaf, in_array in self._parts(number):
                size = math.prod(self._shapes[name])
                array = arrays.setdefault(name, np.empty(size, values.dtype))
                array[in_array] = values[in_leaf]
                missing[name] = missing.get(name, size) - in_array.size
                if not missing[name]:
                    yield name, arrays.pop(name).reshape(self._shapes[name])

    def _parts(self, number: int) -> Iterator[tuple[str, Any, np.ndarray]]:
        """Yield each array in a leaf: its name, and two indices of the same elements.

        The first indexes the leaf, the second the array in one dimension. For `w` at
        the head of this file they are

            "a", True in the first two columns, [0, 3, 1, 4, 2, 5]
            "b", True in the last column,       [0, 1, 2]
        """
        indices = self._indices[number]
        for name in self.sources[number]:
            start, end = self._spans[name]
            in_leaf: Any = ...
            if len(self.sources[number]) > 1:
                in_leaf = (indices >= start) & (indices < end)
            yield name, in_leaf, indices[in_leaf] - start

    def unflatten(self, leaves: list[Any]) -> Any:
        """The port's tree with these leaves."""
        return jax.tree.unflatten(self._structure, leaves)

    def label_tree(self, labels: Mapping[str, str]) -> Any:
        """The port's tree, with the label of each leaf's arrays; "" if it has none.

        Raises:
          ValueError: a leaf is made of arrays with different labels.
        """
        found = []
        for path, sources in zip(self.paths, self.sources, strict=True):
            kinds = {labels[name]: name for name in sources}
            if len(kinds) > 1:
                which = (f"`{bare(name)}` ({kind})" for kind, name in kinds.items())
                raise ValueError(
                    f"{at(path)} must come from one parameter group, got "
                    f"{some(which)}; let the port keep them in leaves of their own"
                )
            found.append(next(iter(kinds), ""))
        return self.unflatten(found)

    def check_tree(self, name: str, tree: Any) -> None:
        """Refuse a tree whose structure or shapes are not those of the port's tree.

        Raises:
          TypeError: within `jax.jit`.
          ValueError: with `name`, and the path of the leaf.
        """
        found, structure = flattened(name, tree)
        if structure != self._structure:
            raise other_tree(name, tree, self.unflatten([""] * len(self.paths)))
        for path, indices, (_, leaf) in zip(
            self.paths, self._indices, found, strict=True
        ):
            if isinstance(leaf, Tracer):
                raise TypeError(
                    f"{at(path)} of `{name}` must have values, got a traced array; "
                    "carry a run outside of jax.jit"
                )
            if np.shape(leaf) != indices.shape:
                raise ValueError(
                    f"{at(path)} of `{name}` must have the port's shape "
                    f"{indices.shape}, got {np.shape(leaf)}; make it with the same port"
                )

    def _names_of(self, indices: np.ndarray) -> list[str]:
        """The names of the arrays that have elements of these indices."""
        if not indices.size:
            return []
        names = list(self._shapes)
        first, last = np.searchsorted(
            self._ends, [indices.min(), indices.max()], side="right"
        )
        if first == last:  # the usual leaf, of one array
            return [names[first]]
        found = np.unique(np.searchsorted(self._ends, indices, side="right"))
        return [names[i] for i in found]

    def _probe(self) -> tuple[list[Any], list[np.ndarray], Any]:
        """Paths, indices and structure of the port's leaves.

        An index goes through the port as index + 1, so that a 0 which the port itself
        puts into a leaf is noticed. A model of more than 2²⁴ elements needs two calls:
        one with the low 24 bits of the index, plus 1, in float32, and one with the rest
        of its bits, plus 1, in float16. For example, element 2²⁴ + 3 is 4 in the first
        call and 2 in the second. This is enough for 2³⁵ elements.

        A port may return all indices, and yet change weights: np.abs changes no
        index. So the last call gives the low 10 bits, plus 1, divided by -2¹⁰: numbers
        of another sign, size and dtype. Element 3 is 4 in the first call and -0.0039 in
        the last. It shows a port that takes magnitudes (0.0039), that rounds (0), or
        that adds 1e-8, which is lost when added to 4. A port that sorts returns another
        order than before.
        """
        paths, leaves, structure = self._call_with(
            lambda indices: (indices & LOW_MASK) + 1, np.float32
        )
        probed = [_digits(leaf) for leaf in _consumed(leaves)]
        if self._total > LOW_MASK + 1:
            _, leaves, _ = self._call_with(
                lambda indices: (indices >> LOW_BITS) + 1, np.float16
            )
            low, high = _consumed(probed), map(_digits, _consumed(leaves))
            probed = [_joined(*digits) for digits in zip(low, high, strict=True)]
        _, leaves, _ = self._call_with(
            lambda indices: ((indices & CHECK_MASK) + 1) / -(CHECK_MASK + 1), np.float16
        )
        for path, indices, leaf in zip(paths, probed, _consumed(leaves), strict=True):
            expected = (indices & CHECK_MASK) + 1
            if not np.array_equal(leaf * -(CHECK_MASK + 1), expected):
                raise _changed(path)
        return paths, probed, structure

    def _call_with(
        self,
        number_of: Callable[[np.ndarray], np.ndarray],
        dtype: type[np.floating],
    ) -> tuple[list[Any], list[np.ndarray], Any]:
        """Call the port with a number for each index; return its tree's three parts."""
        arrays = {
            name: number_of(np.arange(start, end)).astype(dtype).reshape(shape)
            for (name, shape), (start, end) in zip(
                self._shapes.items(), self._spans.values(), strict=True
            )
        }
        found, structure = flattened("port", self._call(arrays))
        paths = [path for path, _ in found]
        leaves = [np.asarray(leaf) for _, leaf in found]
        for path, leaf in zip(paths, leaves, strict=True):
            # A port may ask for float32, since it is given float32 or less.
            if leaf.dtype not in (dtype, np.float32):
                raise ValueError(
                    f"{at(path)} must be made of the model's arrays in their dtype, "
                    f"got {leaf.dtype} of {np.dtype(dtype)}; do not cast, and add no "
                    "leaves"
                )
        return paths, leaves, structure

    def _call(self, arrays: dict[str, np.ndarray]) -> Any:
        try:
            return self._port(dict(arrays))
        except KeyError as error:
            name = error.args[0] if error.args else None
            if name is None or name in arrays:
                raise
            alike = difflib.get_close_matches(bare(name), arrays) or arrays
            remedy = "let the port leave it out, or give the model that has it"
            if str(name).rpartition(".")[2] == "_extra_state":
                remedy = "it is no tensor: take it from torch's state_dict yourself"
            elif {"module", "_orig_mod"} & set(str(name).split(".")):
                remedy = "make the port of the model within its wrapper (model.module)"
            raise KeyError(
                f"the port asks for {shown(name)}, which the model does not have; it "
                f"has {some(alike)}; {remedy}"
            ) from error

    def _used_once(self) -> np.ndarray:
        """Refuse foreign and repeated indices; return a mask of those that are used."""
        used = np.zeros(self._total, bool)
        for path, indices in zip(self.paths, self._indices, strict=True):
            if not ((indices >= 0) & (indices < self._total)).all():
                raise _changed(path)
            used[indices] = True
        if sum(indices.size for indices in self._indices) > np.count_nonzero(used):
            flat = np.concatenate([np.ravel(indices) for indices in self._indices])
            twice = np.flatnonzero(np.bincount(flat, minlength=self._total) > 1)
            raise ValueError(
                "the port must use each value once, but uses some of "
                f"{some(self._names_of(twice))} twice; leave out one of them, or "
                "untie it in torch"
            )
        return used


def flattened(name: str, tree: Any) -> Any:
    """The leaves with their paths, and the structure, of a tree that a user gave."""
    try:
        return tree_flatten_with_path(tree)
    except ValueError as error:  # the keys of a dict cannot be sorted
        raise ValueError(
            f"`{name}` must be a tree that JAX can flatten, got one with this fault: "
            f"{short(str(error))}; make the keys of each dict of one kind"
        ) from error


def other_tree(name: str, tree: Any, like: Any) -> ValueError:
    """The error for a tree whose structure is not that of the port's tree, `like`."""
    (found, structure), (expected, wanted) = flattened(name, tree), flattened("", like)
    problems = other_paths(dict(found), dict(expected))
    problems = problems or [trees(structure, wanted)]
    return ValueError(
        f"`{name}` must be the port's tree: {'; '.join(problems)}; make it with the "
        "same port"
    )


def _changed(path: Any) -> ValueError:
    return ValueError(
        f"the port must only move values, but {at(path)} has others; let it rename, "
        "reshape, transpose, split, concatenate and stack, and nothing else"
    )


def _consumed(leaves: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the items in order, and take each out of the list to free its memory."""
    leaves.reverse()
    while leaves:
        yield leaves.pop()


def _digits(leaf: np.ndarray) -> np.ndarray:
    """The integers of which a leaf has each plus 1; NONE where it has a fraction."""
    with np.errstate(invalid="ignore"):  # infinity and NaN become NONE, too
        integers = leaf.astype(np.int32)
    integers[...] = np.where(integers == leaf, integers - 1, NONE)
    return integers


def _joined(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The indices high * 2²⁴ + low; NONE where either is missing."""
    end = (int(high.max(initial=0)) + 1) << LOW_BITS
    dtype: Any = np.int32 if end <= 2**31 else np.int64
    indices = (high.astype(dtype) << LOW_BITS) + low
    indices[(low < 0) | (high < 0)] = NONE
    return indices
