"""A script that uses the package, for the type checker: it is never run.

mypy checks it with the flags of `--strict` (`pyproject.toml`). It fails if it finds an
error in a line, or none in one that ends with `type: ignore`.
"""

import jax
import jax.numpy as jnp
import optax

import optax_rmsprop
from optax_rmsprop import ScaleByRmsState, diagnose, dialects, rmsprop, scale_by_rms
from optax_rmsprop.carry import port_of, to_nnx
from optax_rmsprop.identify import identify
from optax_rmsprop.wrappers import compress_state, single_pass

Params = dict[str, jax.Array]


def mask(params: optax.Params) -> dict[str, bool]:
    return {"w": True}


params: Params = {"w": jnp.zeros((64, 64))}
txs: list[optax.GradientTransformation] = [
    rmsprop(1e-3, momentum=0.9, weight_decay=1e-4, weight_decay_mask=mask),
    rmsprop(optax.linear_schedule(1e-3, 0.0, 100), centered=True),
    rmsprop(jnp.float32(1e-3), decay=jnp.float32(0.9), accumulator_dtype=jnp.float32),
    dialects.tensorflow(0.016, decay=0.9, momentum=0.9, epsilon=1e-3),
    compress_state(dialects.timm(0.016), jnp.uint8),
    single_pass(optax.chain(optax.clip_by_global_norm(1.0), rmsprop())),
]
for tx in txs:
    state = tx.init(params)
    updates, state = tx.update(params, state, params)
rms = scale_by_rms(0.99, eps_in_sqrt=True).init(params)
assert isinstance(rms, ScaleByRmsState)
sizes = diagnose(rms, 1e-3, 1e-8).step_size
found = identify(params, params, 1e-3)
call: str = found[0].call
ports = port_of, to_nnx
misspelt = [
    optax_rmsprop.from_torchh,  # type: ignore[attr-defined]
    optax_rmsprop.identify.identifyy,  # type: ignore[attr-defined]
]
rmsprop(1e-3, alpha=0.9)  # type: ignore[call-arg]
rmsprop(1e-3, centered="yes")  # type: ignore[arg-type]
