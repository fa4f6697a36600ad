"""Carry a run between torch and JAX: parameters, optimizer state, parameter groups.

How the weights move is yours to say: a port, a function from torch's arrays by name
(those of the model's state_dict) to a tree for JAX. It may rename, reshape, transpose,
split, concatenate and stack; `torch_layers` has it ready for the usual layers.
`_port.py` finds out where it puts each element; so the same function carries every slot
of the optimizer, there and back.
"""

from __future__ import annotations  # so that help() shows these types by name

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from optax_rmsprop.carry._back import WayBack
from optax_rmsprop.carry._port import Port
from optax_rmsprop.carry._run import Run, carry
from optax_rmsprop.carry._torch_read import read, read_checkpoint
from optax_rmsprop.carry._torch_write import write

if TYPE_CHECKING:
    import torch


def from_torch(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    port: Port,
    learning_rate: Any = None,
) -> Run:
    """Carry a model and its RMSprop from torch to JAX.

    Args:
      model: holds all of the optimizer's parameters. Nothing is changed in it.
      optimizer: a `torch.optim.RMSprop`, or the `RMSpropTF` of timm, before its first
        step or after any.
      port: function from a dict of NumPy arrays, the model's state_dict, to a tree of
        arrays. It must use every trained parameter, each element once, and may leave
        out the others (frozen parameters, buffers, further names of tied parameters).
        Tied are all names of the same elements of the same memory. A leaf must stay
        within one parameter group.
      learning_rate: in place of torch's: a number, an optax schedule of the steps made
        (torch's included), or a list of one for each group. By default the group's
        present one, from now on constant.

    Returns:
      A `Run`. Leaves that no group trains, or that have had no gradient while
      others of their group have, stay put.

    Raises:
      KeyError: the port asks for a name that the model does not have.
      TypeError: what is no model, no port or another optimizer; an option or a step
        that is no number; a tensor that the port uses and NumPy does not have (sparse,
        quantized, without values, in float8).
      ValueError: a port that does more than to move elements, mixes groups or casts; a
        model that does not hold the optimizer's parameters, or in which two of them
        share memory, but are not tied; tied ones of which the optimizer trains two; a
        state that does not fit its parameter; an option or a step out of range; an
        option of timm's that has no counterpart here.

    Warns:
      RuntimeWarning: a slot holds NaN or infinity. It is carried as it is.

    Example:
      >>> import torch
      >>> from optax_rmsprop.carry import from_torch, to_torch
      >>> model = torch.nn.Linear(3, 2)
      >>> optimizer = torch.optim.RMSprop(model.parameters(), lr=0.1, momentum=0.9)
      >>> def port(weights):
      ...     return {"kernel": weights["weight"].T, "bias": weights["bias"]}
      >>> params, tx, opt_state = from_torch(model, optimizer, port)
      >>> params["kernel"].shape
      (3, 2)
      >>> to_torch(params, opt_state, model, optimizer, port)

    References:
      torch/optim/rmsprop.py (2.13.0); timm/optim/rmsprop_tf.py (1.0.31).
    """
    return carry(read(model, optimizer), port, learning_rate)


def from_torch_checkpoint(
    model: Mapping[str, torch.Tensor],
    optimizer: Mapping[str, Any],
    port: Port,
    names: Sequence[str] | None = None,
    learning_rate: Any = None,
) -> Run:
    """Carry a saved run from torch to JAX, without the class of its model.

    Args:
      model: the model's state_dict.
      optimizer: the optimizer's state_dict, of torch's RMSprop or timm's RMSpropTF. It
        does not say its class: that of another optimizer with RMSprop's options, such
        as Stable-Baselines3's RMSpropTFLike, is taken for torch's.
      port: as in `from_torch`.
      names: the name of each of the optimizer's parameters, in its order. By default
        the checkpoint's own, which it has where the optimizer was made from
        `model.named_parameters()`.
      learning_rate: as in `from_torch`.

    Returns:
      A `Run`. What has no state while others of its group have stays put, as do
      parameters that are not the optimizer's.

    Raises:
      KeyError, TypeError, ValueError: as `from_torch`; names that are missing, repeated
        or not the model's; a state that does not fit its parameter.

    Warns:
      RuntimeWarning: as `from_torch`.

    Example:
      >>> import io, torch
      >>> from optax_rmsprop.carry import from_torch_checkpoint
      >>> model = torch.nn.Linear(3, 2)
      >>> optimizer = torch.optim.RMSprop(model.parameters(), lr=0.1, momentum=0.9)
      >>> saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
      >>> file = io.BytesIO()
      >>> torch.save(saved, file)
      >>> _ = file.seek(0)
      >>> loaded = torch.load(file, weights_only=True, map_location="cpu")
      >>> def port(weights):
      ...     return {"kernel": weights["weight"].T, "bias": weights["bias"]}
      >>> names = [name for name, _ in model.named_parameters()]
      >>> run = from_torch_checkpoint(loaded["model"], loaded["optimizer"], port, names)
      >>> run.params["kernel"].shape
      (3, 2)

    References:
      See `from_torch`.
    """
    return carry(read_checkpoint(model, optimizer, names), port, learning_rate)


def to_torch(
    params: Any,
    opt_state: Any,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    port: Port,
) -> None:
    """Carry a run back: write parameters and optimizer state into torch's, in place.

    Args:
      params: as from `from_torch`, after any number of updates.
      opt_state: likewise.
      model: like that given to `from_torch`, or the same.
      optimizer: likewise. Its learning rates are left as they are.
      port: the same.

    Raises:
      KeyError, TypeError, ValueError: as `from_torch`; parameters or a state that do
        not belong to this model, optimizer and port; averages of squares or a count
        below 0; a momentum buffer that has the learning rate inside for an optimizer
        that has it outside, or the reverse; a tensor that torch cannot write.

    Nothing is written then. If writing itself fails (no memory is left, or the user
    interrupts it), what was written is taken back before the error goes on.

    Warns:
      RuntimeWarning: as `from_torch`.

    Example:
      See `from_torch`.

    References:
      See `from_torch`.
    """
    source = read(model, optimizer)
    write(model, optimizer, WayBack(params, opt_state, source, port))
