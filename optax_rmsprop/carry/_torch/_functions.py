"""Carry a run between torch and JAX: parameters, optimizer state, parameter groups.

The user says how the weights move by a port: a function that takes a dict of torch's
arrays, with the names of the model's state_dict, and returns a tree for JAX. It may
rename, reshape, transpose, split, concatenate and stack; `torch_layers` has ports of
the usual layers. `_port.py` finds out which element comes from where. So the same
function moves each slot of the optimizer, in both directions.
"""

from __future__ import annotations  # so that help() shows these types by name

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from optax_rmsprop.carry._back import SourceArrays
from optax_rmsprop.carry._port import Port
from optax_rmsprop.carry._run import Run, carry
from optax_rmsprop.carry._torch._checkpoints import recognise
from optax_rmsprop.carry._torch._read import read, read_checkpoint
from optax_rmsprop.carry._torch._write import write

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)


def from_torch(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    port: Port,
    learning_rate: Any = None,
    *,
    trainable: Collection[str] | None = None,
    dialect: str | None = None,
) -> Run:
    """Carry a model and its RMSprop from torch to JAX.

    Args:
      model: has all of the optimizer's parameters. It is not changed.
      optimizer: a `torch.optim.RMSprop`, timm's `RMSpropTF` or Stable-Baselines3's
        `RMSpropTFLike`, before its first step or after any. A subclass must inherit
        its step.
      port: a function from a dict of NumPy arrays, the model's state_dict, to a tree
        of arrays. It must use each element of each trained parameter once. It may leave
        out the rest: frozen parameters, buffers, further names of tied parameters.
        (Names are tied if they are the same elements of the same memory.) The arrays
        in one leaf must be of one parameter group.
      learning_rate: replaces torch's. By default it is the group's present one, and
        constant from now on. Otherwise a list with a number or a schedule for each
        group, such as `schedule_of` makes; or one number or schedule, if all groups
        have one rate. If their rates differ, one schedule multiplies the rate of each
        (its `initial_lr`, if a torch scheduler has set that, or else its present lr).
        Schedules are functions of the number of updates that the run has made, torch's
        included, also for a group that was added later. If a schedule has an attribute
        `momentum` that is not None, this is the schedule of the momentum.
      trainable: the names of the optimizer's parameters that train. By default it is
        those with requires_grad. But one that decays, and that has had no gradient
        although others of its group have, does not train: torch skips it as long as it
        has none, and gradients of 0, as JAX has, would let it decay.
      dialect: "torch", "timm" or "stable_baselines3", for an optimizer of another class
        whose step is the one of these.

    Returns:
      A `Run`. Its optimizer does not change leaves that do not train.

    Raises:
      KeyError: the port asks for a name that the model does not have.
      TypeError: the model, the optimizer or the port is of another kind; an option or
        a step is not a number; the port uses a tensor that NumPy cannot represent
        (sparse, quantized, without values, in float8).
      ValueError: the port changes elements, mixes groups or casts; the model lacks
        parameters of the optimizer; two parameters share a part of their memory; the
        optimizer trains two parameters that are tied; a state does not fit its
        parameter; an option or a step is out of range; an option of timm has no
        counterpart here.

    Warns:
      RuntimeWarning: a slot has NaN or infinity, and is carried as it is; a parameter
        does not train because it has had no gradient.

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
    return carry(read(model, optimizer, trainable, dialect), port, learning_rate)


def from_torch_checkpoint(
    model: Mapping[str, Any],
    optimizer: Mapping[str, Any] | None = None,
    port: Port | None = None,
    names: Sequence[str] | None = None,
    learning_rate: Any = None,
    *,
    trainable: Collection[str] | None = None,
    dialect: str | None = None,
) -> Run:
    """Carry a saved run from torch to JAX, without the class of its model.

    Args:
      model: the model's state_dict; or, without `optimizer`, the whole checkpoint, as
        torch.load returns it. Both state_dicts are found in it by their form. Known are
        checkpoints of torch, torch.distributed, Lightning and timm; the files of HF
        Trainer and accelerate, {"model": ..., "optimizer.pt": ...}, or "optimizer.bin";
        and the members of a Stable-Baselines3 zip, each loaded for itself. The parts
        "module." and "_orig_mod." are removed from names.
      optimizer: the state_dict of one of the optimizers of `from_torch`.
      port: as in `from_torch`. It must be given.
      names: the names of the optimizer's parameters, in its order, as `names_of` gives
        them. By default they are the checkpoint's own. It has them if the optimizer was
        made from `model.named_parameters()`. In a whole checkpoint they are found if
        the shapes, and the order of timm, HF Trainer or Stable-Baselines3, allow only
        one possibility.
      learning_rate: as in `from_torch`.
      trainable: as in `from_torch`. A checkpoint does not say which parameters were
        frozen: by default all do train. It must be given if a group has no state and
        another has.
      dialect: as in `from_torch`. A state_dict does not name the optimizer's class: its
        options show timm's and, from torch 1.12, torch's. Otherwise it must be given.

    Returns:
      A `Run`. Its optimizer does not change parameters that do not train or that the
      saved optimizer lacks.

    Raises:
      KeyError, TypeError, ValueError: as `from_torch`; or names are missing, repeated
        or not in the model.

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
      >>> run = from_torch_checkpoint(loaded, port=port, names=names)  # the same

    References:
      See `from_torch`.
    """
    if optimizer is None:
        saved = recognise(model)
        model, optimizer = saved.model, saved.optimizer
        names = saved.names if names is None else names
        _log.info("the checkpoint is read as %s", saved.kind)
    source = read_checkpoint(model, optimizer, names, trainable, dialect)
    return carry(source, port, learning_rate)


def to_torch(
    params: Any,
    opt_state: Any,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    port: Port,
    *,
    dialect: str | None = None,
) -> None:
    """Carry a run back: write parameters and optimizer state into torch's, in place.

    Args:
      params: the parameters of `from_torch`, after any number of updates.
      opt_state: the optimizer's state, likewise.
      model: the model given to `from_torch`, or one like it.
      optimizer: likewise. Its learning rates do not change.
      port: the port given to `from_torch`.
      dialect: as in `from_torch`.

    Raises:
      KeyError, TypeError, ValueError: as `from_torch`; or parameters or state do not
        belong to this model, optimizer and port; averages of squares or a count are
        below 0; the momentum buffer has the learning rate inside and the optimizer
        has it outside, or the reverse, or the state does not tell which; torch cannot
        write to a tensor.

    After these errors nothing has been written. If writing itself fails (no memory is
    left, or the user interrupts it), all old values are restored before the error is
    raised.

    Warns:
      RuntimeWarning: as `from_torch`.

    Example:
      See `from_torch`.

    References:
      See `from_torch`.
    """
    source = read(model, optimizer, dialect=dialect)
    write(model, optimizer, SourceArrays(params, opt_state, source, port))
