"""Match the layers of a model to those of a tree of Flax.

A layer is matched to a subtree that has the same leaves with the same shapes. Where
several layers have the same, their names decide. For example, torch's

    features.0, features.3            and Flax's          Conv_0, Conv_1

all have {"kernel": (3, 3, 8, 8), "bias": (8,)}. The names are split into words,
("features", 0), ("features", 3) and ("conv", 0), ("conv", 1). Names that differ in
their numbers alone are a family; here each side has one. Within a family a number
counts only by its rank among its siblings: 0 and 3 are the first and the second, as are
0 and 1. Names with several numbers in one part must have the same words. Where there
are several families, those of the same words belong together, and then those that alone
are in modules of the same ranks. For example, norm and LayerNorm_0 are beside the
blocks, and block.0.norm, block.1.norm and Block_0/LayerNorm_0, Block_1/LayerNorm_0 in
them.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from optax_rmsprop._errors import at, kind_of, short, some
from optax_rmsprop.carry._port_of._layer import Layer, Path
from optax_rmsprop.carry.torch_layers import one_bias

Shapes = Mapping[Path, tuple[int, ...]]
Words = tuple[str, ...]
STATISTICS = {"mean", "var"}
# Parts of names in which Flax differs from torch's recurrent layers.
SYNONYMS = {"backwardrnn": "reverse", "forwardrnn": "", "rnn": "", "cell": ""}


class Form(NamedTuple):
    """A layout in which a layer can be returned.

    Attributes:
      shapes: of its leaves.
      buffers: the paths of those that are no parameters, such as running statistics.
    """

    shapes: dict[Path, tuple[int, ...]]
    buffers: set[Path]


def nested(leaves: Mapping[Path, Any]) -> Any:
    """A nested dict with these leaves, or the only leaf if its path is ()."""
    if () in leaves:
        return leaves[()]
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def fitted(
    layers: Sequence[Layer], forms: Sequence[Sequence[Form]], like: Any
) -> tuple[list[tuple[int, dict[Path, Path]]], Callable[[dict[Path, Any]], Any]]:
    """Match layers, each with its forms, to the tree `like`.

    Returns:
      For each layer the number of its form, and for each leaf of that form its path in
      `like`. And a function that builds the tree from leaves by their paths.

    Raises:
      TypeError: `like` is not a tree of arrays.
      ValueError: layers have no match, or several.
    """
    leaves, structure = _leaves_of(like)
    collection = ("params",) if _is_linen(like) else ()
    # By their paths in modules: those of Linen begin with the collection.
    full = {path[len(collection) :]: path for path in leaves}
    has_statistics = any(path[-1] in STATISTICS for path in full if path)
    shapes_of = [
        [
            {
                path: shape
                for path, shape in form.shapes.items()
                if has_statistics or path not in form.buffers
            }
            for form in found
        ]
        for found in forms
    ]
    found = _matched(layers, shapes_of, {path: leaves[full[path]] for path in full})
    targets = []
    lost = []
    for number, layer in enumerate(layers):
        form, node = found.get(number, (0, ()))
        shapes = shapes_of[number][form]
        if shapes and number not in found:
            lost.append(_described(layer.name, shapes))
        paths = {path: (*node, *path) for path in shapes}
        targets.append(
            (form, {p: full.get(q, (*collection, *q)) for p, q in paths.items()})
        )
    covered = {node for _, node in found.values()}
    free: dict[Path, dict[Path, tuple[int, ...]]] = {}
    for path in full:
        if not _is_within(path, covered):
            free.setdefault(path[:-1], {})[path[-1:]] = leaves[full[path]]
    if lost or free or len(full) < len(leaves):
        left = [_described("/".join(path), shapes) for path, shapes in free.items()]
        raise ValueError(
            "`like` must have one layer with the leaves and shapes of each layer of "
            "the model; without a match, or with several, are "
            f"{some(lost, most=150) or 'none'} of the model and "
            f"{some(left, most=150) or 'none'} of `like`; name them alike (layers.0 as "
            "layers_0), or leave out `like` and rename in a function around the port"
        )
    made = {target for _, paths in targets for target in paths.values()}

    def build(arrays: dict[Path, Any]) -> Any:
        if made != leaves.keys():  # cells of Linen, which get both biases of torch
            return nested(arrays)
        return jax.tree.unflatten(structure, [arrays[path] for path in leaves])

    return targets, build


def _is_linen(like: Any) -> bool:
    return isinstance(like, Mapping) and isinstance(like.get("params"), Mapping)


def _is_within(path: Path, nodes: set[Path]) -> bool:
    return any(path[:i] in nodes for i in range(len(path) + 1))


def _leaves_of(like: Any) -> tuple[dict[Path, tuple[int, ...]], Any]:
    """The shapes of the leaves of a tree of Flax, in its order, and its structure."""
    nnx: Any = sys.modules.get("flax.nnx")  # if it is not imported, `like` is not of it
    if nnx and isinstance(like, nnx.Module):
        like = nnx.state(like, nnx.Not(nnx.RngState))
    found, _ = tree_flatten_with_path(
        like, is_leaf=lambda node: nnx is not None and isinstance(node, nnx.Variable)
    )
    leaves, structure = jax.tree.flatten(like)
    shapes = {}
    for (path, _), leaf in zip(found, leaves, strict=True):
        shape = getattr(leaf, "shape", None)
        if not isinstance(shape, tuple):
            raise TypeError(
                "`like` must be a tree of arrays of Flax, got "
                f"{kind_of(leaf)} at {at(path)}; give the variables of Linen's init, "
                "or an nnx.Module"
            )
        shapes[tuple(keystr((key,), simple=True) for key in path)] = shape
    return shapes, structure


def _described(name: str, shapes: Shapes) -> str:
    arrays = ", ".join(f"{'/'.join(p)} {s}".strip() for p, s in shapes.items())
    if len(shapes) > 2:
        arrays = f"{len(shapes)} arrays"
    return f"{short(name, 60) or 'the root'} ({short(arrays, 60)})"


def _matched(
    model: Sequence[Layer], forms: Sequence[Sequence[Shapes]], leaves: Shapes
) -> dict[int, tuple[int, Path]]:
    """The form and the subtree for each layer that has a match.

    The layers with the most leaves come first, so that no part of them is taken for a
    layer.
    """
    subtrees: dict[Path, dict[Path, tuple[int, ...]]] = {}
    for path, shape in leaves.items():
        for i in range(len(path) + 1):
            subtrees.setdefault(path[:i], {})[path[i:]] = shape
    nodes: dict[Any, list[Path]] = {}
    for path, part in subtrees.items():
        nodes.setdefault(_kind(path, part), []).append(path)
    wanted: dict[Any, dict[int, int]] = {}
    names = [layer.alias for layer in model]
    for layer, (name, of_forms) in enumerate(zip(names, forms, strict=True)):
        for form, shapes in enumerate(of_forms):
            wanted.setdefault(_kind((name,), shapes), {})[layer] = form
        if len(of_forms) > 1:  # a cell
            wanted.setdefault(_kind((), _in_linen(of_forms[0])), {})[layer] = 0
    found: dict[int, tuple[int, Path]] = {}
    taken: set[Path] = set()
    for kind in sorted(wanted, key=lambda kind: len(kind[1]), reverse=True):
        layers = [layer for layer in wanted[kind] if layer not in found]
        free = [path for path in nodes.get(kind, ()) if not _is_within(path, taken)]
        own = [model[layer].path for layer in layers]
        if sorted(own) == sorted(free):  # the names themselves
            pairs = [(i, free.index(path)) for i, path in enumerate(own)]
        else:
            pairs = _paired(
                [_words(names[layer]) for layer in layers],
                [_words(".".join(path)) for path in free],
            )
            crossed = (_may_be_crossed(names[layers[i]], free[j]) for i, j in pairs)
            if len(pairs) > 1 and any(crossed):
                continue
        for i, j in pairs:
            found[layers[i]] = wanted[kind][layers[i]], free[j]
            taken.add(free[j])
    return found


def _kind(path: Path, shapes: Shapes) -> Any:
    """A value that is equal for layers that can match.

    A parameter that is not within a layer must have the same name, too.
    """
    name = path[-1].rpartition(".")[2] if path and () in shapes else ""
    return _words(name), frozenset(shapes.items())


def _in_linen(cell: Shapes) -> dict[Path, tuple[int, ...]]:
    """The leaves that Linen's cell has, which joins the two biases of torch."""
    arrays = {p: np.broadcast_to(np.float32(0), s) for p, s in cell.items()}
    layers = one_bias(nested(arrays)) if arrays else {}
    return {
        (name, key): array.shape
        for name, layer in layers.items()
        for key, array in layer.items()
    }


def _paired(ours: Sequence[Words], theirs: Sequence[Words]) -> list[tuple[int, int]]:
    """Pairs of positions that are unique, or else decided by the names; or none."""
    if len(ours) != len(theirs):
        return []
    if len(ours) == 1:
        return [(0, 0)]
    families, others = _families(ours), _families(theirs)
    pairs = []
    for words, family in families.items():
        partner = others.get(words)
        if partner is None:
            # Families without one of the same words: those alone in these modules.
            rest = [f for w, f in families.items() if w not in others]
            left = [f for w, f in others.items() if w not in families]
            left = [f for f in left if f.modules == family.modules]
            if len(left) != 1 or sum(f.modules == family.modules for f in rest) != 1:
                return []
            partner = left[0]
        if partner.members.keys() != family.members.keys():
            return []
        pairs += [(n, partner.members[ranks]) for ranks, n in family.members.items()]
    return pairs if len(pairs) == len(ours) else []


def _may_be_crossed(name: str, path: Path) -> bool:
    """Whether numbers may stand for other things in the two names.

    branch0.conv1 and conv1_branch0 have them in another order, and so have
    heads.0.layers.1 and layers.1.heads.0.
    """
    parts = [*name.split("."), *path]
    in_one = any(len(re.findall(r"\d+", part)) > 1 for part in parts)
    ours, theirs = _letters(_words(name)), _letters(_words(".".join(path)))
    return ours != theirs and (in_one or sorted(ours) == sorted(theirs))


def _letters(words: Words) -> Words:
    return tuple(word for word in words if not word.isdigit())


def _words(name: str) -> Words:
    """A path's words and numbers: ("layers", "0", "norm", "1") of Layers_0.norm1."""
    words: list[str] = []
    for part in name.lower().replace("_", "").split("."):
        part = SYNONYMS.get(part, part)
        words += re.findall(r"[a-z]+|\d+", part)
    return tuple(words)


class Family(NamedTuple):
    """Names that differ in their numbers alone.

    Attributes:
      members: the position of each, by its ranks among its siblings.
      modules: how deep they are, and the ranks of the modules in which they are. A
        number at the end of a name is that of the layer itself.
    """

    members: dict[tuple[int, ...], int]
    modules: tuple[int, set[tuple[int, ...]]]


def _families(names: Sequence[Words]) -> dict[str, Family]:
    """Families by their joined words, without a common beginning.

    ("layers", "0"), ("layers", "3") and ("norm",) become
    {"layers#": Family({(0,): 0, (1,): 1}, (1, {()})),
     "norm": Family({(): 2}, (1, {()}))}.
    The words are joined because torch's stem.conv may be stem_conv in Flax.
    """
    siblings: dict[Words, set[int]] = {}
    for words in names:
        for i, word in enumerate(words):
            if word.isdigit():
                siblings.setdefault(words[:i], set()).add(int(word))
    ranked = {words: sorted(numbers) for words, numbers in siblings.items()}
    families: dict[Words, list[int]] = {}
    for number, words in enumerate(names):
        plain = tuple("#" if word.isdigit() else word for word in words)
        families.setdefault(plain, []).append(number)
    common = _common(families)
    beginning = _common("".join(plain) for plain in families)
    found = {}
    for plain, members in families.items():
        ranks = [
            [ranked[names[n][:i]].index(int(names[n][i])) for n in members]
            for i, word in enumerate(plain)
            if word == "#"
        ]
        around = ranks[:-1] if plain[-1:] == ("#",) else ranks
        depth = sum(word != "#" for word in plain[common:])
        found["".join(plain)[beginning:]] = Family(
            dict(zip(_telling(ranks, len(members)), members, strict=True)),
            (depth, set(_telling(around, len(members)))),
        )
    return found


def _common(sequences: Iterable[Sequence[str]]) -> int:
    """The number of elements with which all begin."""
    columns = zip(*sequences, strict=False)
    return len(list(itertools.takewhile(lambda c: len(set(c)) == 1, columns)))


def _telling(ranks: Sequence[Sequence[int]], size: int) -> list[tuple[int, ...]]:
    """The ranks of each member, without those that are 0 for all, and tell nothing."""
    columns = [column for column in ranks if any(column)]
    return [tuple(column[i] for column in columns) for i in range(size)]
