"""What a port function does, found by giving it the places of elements for weights.

A port takes arrays by name and returns a tree of arrays that holds their elements,
moved. Where each went tells how to carry anything else of the weights' shapes, how to
bring it back, and that the port moves elements and does nothing else.
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

BITS = 24
EXACT = 2**BITS  # up to here float32, which a port may ask for, tells integers apart
PROOF = 2**10  # and up to here float16


class Correspondence:
    """Where a port puts every element of its arrays."""

    def __init__(
        self, port: Port, shapes: Mapping[str, tuple[int, ...]], needed: Collection[str]
    ):
        """Probe a port.

        Args:
          port: the function.
          shapes: of the arrays it takes, by name.
          needed: names of those of which no element may be lost.

        Raises:
          ValueError: the port changes, duplicates or drops elements.
        """
        self._port = port
        self._shapes = dict(shapes)
        sizes = [math.prod(shape) for shape in shapes.values()]
        self._ends = np.cumsum(sizes, dtype=np.int64)
        starts = self._ends - sizes
        self._spans = dict(
            zip(shapes, zip(starts, self._ends, strict=True), strict=True)
        )
        # The place of each element of each leaf among those of all arrays in a row.
        self.paths, self._places, self._structure = self._probe()
        self._check(needed)
        # Of each leaf, the arrays that it is made of.
        self.sources = [self._names_at(np.ravel(places)) for places in self._places]

    def gather(self, number: int, array_of: Callable[[str], np.ndarray]) -> np.ndarray:
        """One leaf of the port's tree, made of other arrays by name.

        The port is not asked again: it never sees a weight.
        """
        arrays = {name: array_of(name) for name in self.sources[number]}
        dtype = np.result_type(*arrays.values()) if arrays else np.float32
        leaf = np.empty(self._places[number].shape, dtype)
        for name, here, places in self._parts(number):
            leaf[here] = arrays[name].ravel()[places]
        return leaf

    def _parts(self, number: int) -> Iterator[tuple[str, Any, np.ndarray]]:
        """What a leaf is made of: an array's name, where it is, its places in it."""
        places = self._places[number]
        for name in self.sources[number]:
            start, end = self._spans[name]
            here: Any = ...
            if len(self.sources[number]) > 1:
                here = (places >= start) & (places < end)
            yield name, here, places[here] - start

    def unflatten(self, leaves: list[Any]) -> Any:
        """The port's tree with these leaves."""
        return jax.tree.unflatten(self._structure, leaves)

    def _call(self, arrays: dict[str, np.ndarray]) -> Any:
        try:
            return self._port(dict(arrays))
        except KeyError as error:
            name = error.args[0] if error.args else None
            if name is None or name in arrays:
                raise
            alike = difflib.get_close_matches(bare(name), arrays) or arrays
            raise KeyError(
                f"the port asks for {shown(name)}, which the model does not have; it "
                f"has {some(alike)}"
            ) from error

    def check_tree(self, name: str, tree: Any) -> None:
        """Refuse a tree whose structure or shapes are not those of the port's.

        Raises:
          TypeError: within `jax.jit`.
          ValueError: naming `name` and the leaf.
        """
        found, structure = flattened(name, tree)
        if structure != self._structure:
            problems = other_paths(dict(found), dict.fromkeys(self.paths))
            problems = problems or [trees(structure, self._structure)]
            raise ValueError(
                f"`{name}` must be the port's tree: {'; '.join(problems)}; make it "
                "with the same port"
            )
        for path, places, (_, leaf) in zip(
            self.paths, self._places, found, strict=True
        ):
            if isinstance(leaf, Tracer):
                raise TypeError(
                    f"{at(path)} of `{name}` must have values, got a traced array; "
                    "carry a run outside of jax.jit"
                )
            if np.shape(leaf) != places.shape:
                raise ValueError(
                    f"{at(path)} of `{name}` must have the port's shape "
                    f"{places.shape}, got {np.shape(leaf)}; make it with the same port"
                )

    def bring_back(self, tree: Any) -> Iterator[tuple[str, np.ndarray]]:
        """The arrays of which the port would make this tree, one after another.

        Those that the port drops, whole or in part, are left out.
        """
        arrays: dict[str, np.ndarray] = {}
        missing: dict[str, int] = {}
        for number, leaf in enumerate(jax.tree.leaves(tree)):
            values = np.asarray(leaf)
            for name, here, places in self._parts(number):
                size = math.prod(self._shapes[name])
                array = arrays.setdefault(name, np.empty(size, values.dtype))
                array[places] = values[here]
                missing[name] = missing.get(name, size) - places.size
                if not missing[name]:
                    yield name, arrays.pop(name).reshape(self._shapes[name])

    def label(self, labels: Mapping[str, str]) -> Any:
        """The label of the arrays that each leaf is made of, in the port's tree.

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

    def _names_at(self, places: np.ndarray) -> list[str]:
        """The arrays that these places are in."""
        if not places.size:
            return []
        names = list(self._shapes)
        first, last = np.searchsorted(
            self._ends, [places.min(), places.max()], side="right"
        )
        if first == last:
            return [names[first]]
        found = np.unique(np.searchsorted(self._ends, places, side="right"))
        return [names[i] for i in found]

    def _probe(self) -> tuple[list[Any], list[np.ndarray], Any]:
        paths, leaves, structure = self._digits(
            lambda places: places & (EXACT - 1), np.float32
        )
        places = [_whole(leaf) for leaf in _emptied(leaves)]
        if self._ends[-1:].sum() > EXACT:
            # Half as much memory, and exact up to 34 thousand million elements.
            _, high, _ = self._digits(lambda places: places >> BITS, np.float16)
            low = _emptied(places)
            places = [
                _joined(digits, _whole(leaf))
                for digits, leaf in zip(low, _emptied(high), strict=True)
            ]
        # Numbers of another sign, size and dtype: what is not moved is now elsewhere.
        _, proof, _ = self._digits(
            lambda places: places & (PROOF - 1), np.float16, -1 / PROOF
        )
        for path, here, leaf in zip(paths, places, _emptied(proof), strict=True):
            if not np.array_equal(-PROOF * leaf, (here & (PROOF - 1)) + 1):
                raise _changed(path)
        return paths, places, structure

    def _digits(
        self,
        digit: Callable[[np.ndarray], np.ndarray],
        dtype: type[np.floating],
        scale: float = 1,
    ) -> tuple[list[Any], list[np.ndarray], Any]:
        """Paths, leaves and structure of the port's tree of digits."""
        arrays = {
            # From 1, so that a zero that the port puts in shows.
            name: (scale * (digit(np.arange(start, end)) + 1))
            .astype(dtype)
            .reshape(shape)
            for (name, shape), (start, end) in zip(
                self._shapes.items(), self._spans.values(), strict=True
            )
        }
        found, structure = flattened("port", self._call(arrays))
        paths = [path for path, _ in found]
        leaves = [np.asarray(leaf) for _, leaf in found]
        for path, leaf in zip(paths, leaves, strict=True):
            # One that asks for float32 gets it, and may do so.
            if leaf.dtype not in (dtype, np.float32):
                raise ValueError(
                    f"{at(path)} must be made of the model's arrays in their dtype, "
                    f"got {leaf.dtype} of {np.dtype(dtype)}; do not cast, and add no "
                    "leaves"
                )
        return paths, leaves, structure

    def _check(self, needed: Collection[str]) -> None:
        used = np.zeros(self._ends[-1:].sum(), bool)
        for path, places in zip(self.paths, self._places, strict=True):
            if not ((places >= 0) & (places < len(used))).all():
                raise _changed(path)
            used[places] = True
        if sum(places.size for places in self._places) > np.count_nonzero(used):
            flat = np.concatenate([np.ravel(places) for places in self._places])
            twice = np.flatnonzero(np.bincount(flat, minlength=len(used)) > 1)
            raise ValueError(
                "the port must use each value once, but uses some of "
                f"{some(self._names_at(twice))} twice; leave out one of them, or "
                "untie it in torch"
            )
        # The arrays with elements of which none is lost.
        self.whole = [
            name
            for name, (start, end) in self._spans.items()
            if start < end and used[start:end].all()
        ]
        for name, (start, end) in self._spans.items():
            if name in needed and not used[start:end].all():
                raise ValueError(
                    f"the port must keep each trained value, but drops some of "
                    f"{bare(name)}; let its tree hold them, or freeze the parameter in "
                    "torch"
                )


def flattened(name: str, tree: Any) -> Any:
    """Leaves with their paths, and the structure, of a tree or of what a port made."""
    try:
        return tree_flatten_with_path(tree)
    except ValueError as error:  # of keys that have no order
        raise ValueError(
            f"`{name}` must be a tree that JAX can flatten, got one with this fault: "
            f"{short(str(error))}; make the keys of each dict of one kind"
        ) from error


def _changed(path: Any) -> ValueError:
    return ValueError(
        f"the port must only move values, but {at(path)} has others; let it rename, "
        "reshape, transpose, split, concatenate and stack, and nothing else"
    )


def _emptied(leaves: list[np.ndarray]) -> Iterator[np.ndarray]:
    """The items in turn, taken out of the list so that their memory is free again."""
    leaves.reverse()
    while leaves:
        yield leaves.pop()


def _whole(values: np.ndarray) -> np.ndarray:
    """What a leaf of digits, which start from 1, holds from 0; -1 is none."""
    with np.errstate(invalid="ignore"):  # infinity and NaN come out as none, too
        whole = values.astype(np.int32)
    whole[...] = np.where(whole == values, whole - 1, -1)
    return whole


def _joined(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    top = high.max(initial=0)
    dtype = np.int32 if (top + 1) * EXACT < 2**31 else np.int64
    places = high.astype(dtype) * EXACT + low
    places[(low < 0) | (high < 0)] = -1
    return places
