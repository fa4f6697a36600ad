"""The address that `carry.torch_layers` had before, for imports of names from it."""

import sys

from optax_rmsprop.carry import torch_layers

sys.modules[__name__] = torch_layers
