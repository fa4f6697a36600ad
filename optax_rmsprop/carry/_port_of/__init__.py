"""Make the port of a live model, from the classes of its layers.

A port says how the weights of a whole model move. `_torch.py` and `_keras.py` walk a
model, and return a list of layers (`_layer.py`): each has a rule, which moves the
arrays of that layer as a function of `torch_layers` or `keras_layers` does. What is
common to both is in `_port_of.py`: every rule is tried out, and then the port calls the
rules one after another. `_like.py` finds each layer in a tree of Flax, so that the port
returns that tree.
"""

from optax_rmsprop.carry._port_of._port_of import port_of

__all__ = ["port_of"]
