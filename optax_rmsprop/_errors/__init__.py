"""Checks and error messages that several files of the package share.

A message names the argument, the rule, the value that was given, and the remedy, in at
most 600 characters. `_arguments` checks single arguments (numbers, schedules, flags,
dtypes). `_states` checks trees (parameters, gradients, states of our transformations).
`_texts` shows values and trees in few characters.

A check that only one file needs is in that file. Checks look at types and values, never
at the name of a class. A traced value is not known, so it is not checked.
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
    checked_slots,
    count,
    fits,
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
    "checked_slots",
    "count",
    "dtype_of",
    "fits",
    "flags",
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
