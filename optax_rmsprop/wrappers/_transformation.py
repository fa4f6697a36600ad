"""What the wrappers share: the check of a transformation, and whose a slot is."""

from collections.abc import Collection
from typing import Any

import optax

from optax_rmsprop._errors import shown

Name = tuple[tuple[type, str], ...]


def checked(tx: Any) -> optax.GradientTransformationExtraArgs:
    """Check that `tx` is an optax transformation; its update takes extra arguments."""
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(
            f"`tx` must be an optax.GradientTransformation, got {shown(tx)}; "
            "for optax.MultiSteps pass its gradient_transformation()"
        )
    return optax.with_extra_args_support(tx)


def name_of(path: Any) -> Name:
    """A path as a value with a hash, which a key of a user's node may lack."""
    return tuple((type(key), str(key)) for key in path)


def owner_of(path: Any, parameters: Collection[Name]) -> Name | None:
    """The parameter to which an array of a state belongs, if their shapes agree.

    It is the longest end of the path that is a parameter's. With the parameters
    ['a']['w'] and ['w'], .nu['a']['w'] belongs to the former, and if the shapes differ
    (as Adafactor's sums by row) to none: ['w'] is not tried.
    """
    name = name_of(path)
    ends = (name[i:] for i in range(len(name) + 1))
    return next((end for end in ends if end in parameters), None)
