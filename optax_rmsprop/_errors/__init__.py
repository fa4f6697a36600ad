"""Checks and error messages that several rooms share.

Each message names the argument, the rule, the value that was given, and the remedy, in
at most 600 characters. `_arguments` checks single arguments (numbers, schedules, flags,
dtypes), `_states` checks trees (parameters, gradients, states of our transformations),
and `_texts` writes values and trees in few characters. A check that only one file needs
lives in that file. Checks look at types and values, and never at the name of a class.
Values are looked at only where they are known: a traced number passes.
"""

from optax_rmsprop._errors._arguments import (
    ASCEND,
    FOREIGN,
    STATIC_ARGS,
    as_dtype,
    dtype_of,
    flags,
    inexact,
    integer,
    is_off,
    is_real,
    knows_foreign_names,
    number,
    schedule,
)
from optax_rmsprop._errors._states import (
    averages,
    belong,
    count,
    fits,
    held,
    not_negative,
    other_paths,
    params,
    same_state,
    same_tree,
    state_types,
)
from optax_rmsprop._errors._texts import (
    at,
    bare,
    kind_of,
    short,
    shown,
    some,
    trees,
)

__all__ = [
    "ASCEND",
    "FOREIGN",
    "STATIC_ARGS",
    "as_dtype",
    "at",
    "averages",
    "bare",
    "belong",
    "count",
    "dtype_of",
    "fits",
    "flags",
    "held",
    "inexact",
    "integer",
    "is_off",
    "is_real",
    "kind_of",
    "knows_foreign_names",
    "not_negative",
    "number",
    "other_paths",
    "params",
    "same_state",
    "same_tree",
    "schedule",
    "short",
    "shown",
    "some",
    "state_types",
    "trees",
]
