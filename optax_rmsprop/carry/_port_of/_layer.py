"""The layers of which a live model consists, and the rules that move them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from optax_rmsprop._errors import bare, short, shown, some

Path = tuple[str, ...]
Weights = Mapping[str, np.ndarray]
# From the model's arrays, a layer's name and the live layer to its tree.
Rule = Callable[[Weights, str, Any], Any]


class Layer(NamedTuple):
    """A part of a model whose arrays a rule moves.

    Attributes:
      name: torch's, or Keras' path.
      alias: the name by which it is found in a tree of Flax, with dots between modules.
      path: in the tree of the port.
      kind: the class, as errors show it.
      rules: functions of the model's arrays, one for each layout that Flax has. The
        port uses the first, unless `like` shows another.
      own: the names of the arrays that a rule must use.
      statistics: the names of those in `own` that are no parameters.
    """

    name: str
    alias: str
    path: Path
    kind: str
    rules: Sequence[Callable[[Weights], Any]]
    own: Sequence[str]
    statistics: Sequence[str] = ()


class Model(NamedTuple):
    """What a port needs of a live model.

    Attributes:
      layers: in the model's order.
      shapes: of all arrays, by name.
      tied: the names of arrays that have an earlier name, too.
    """

    layers: Sequence[Layer]
    shapes: Mapping[str, tuple[int, ...]]
    tied: set[str]


def bound(rules: Sequence[Rule], name: str, layer: Any) -> list[Callable[..., Any]]:
    """Rules as functions of the model's arrays alone."""
    return [lambda weights, rule=rule: rule(weights, name, layer) for rule in rules]


def unknown(layer: Any, name: str, own: Sequence[str], between: str) -> TypeError:
    """The error for a layer of no known class with arrays of its own.

    `between` stands between the names of a layer and of its arrays.
    """
    kind = type(layer)
    first = short(own[0], 40)
    whole = f"f'{{name}}{between}{first}'" if name else repr(first)
    what = shown(name) if name else "`model`"
    return TypeError(
        f"{what} must be of a class that port_of knows, got "
        f"{short(f'{kind.__module__}.{kind.__qualname__}', 100)} with "
        f"{some(own, most=60)}; add rules={{{bare(kind.__name__)}: f}}, where f "
        "returns its arrays, such as lambda weights, name, layer: "
        f"{{'{first}': weights[{whole}]}}"
    )
