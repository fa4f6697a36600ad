"""RMSprop for JAX: torch's numbers, never NaN, at home in optax."""

from optax import add_decayed_weights as add_decayed_weights
from optax import trace as trace

from optax_rmsprop import dialects as dialects
from optax_rmsprop.optimizer import rmsprop as rmsprop
from optax_rmsprop.transforms import ScaleByRmsState as ScaleByRmsState
from optax_rmsprop.transforms import ScaleByStddevState as ScaleByStddevState
from optax_rmsprop.transforms import scale_by_rms as scale_by_rms
from optax_rmsprop.transforms import scale_by_stddev as scale_by_stddev

__version__ = "0.1.0"
