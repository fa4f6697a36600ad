"""Adam with a small state, by peers and by `compress_state`: bytes, error, and time.

Bytes per parameter are those of the state of a 1024 x 1024 matrix, without tables of
levels. Errors are the root mean square of √nu / √(float32's nu) - 1 over a 32 x 256
matrix, after 300 steps with decay 0.999. Sizes of gradients are alike, or differ by two
octaves from one parameter, or row, to the next. The time is that of a jitted step of a
4000 x 8000 array, over float32's in the same turn; torchao (it needs torch) has none.
flashoptim-jax runs as plain JAX: its kernels are for GPUs.

Run by hand, 2 minutes and 3 GiB. Peers that are not installed are left out.

    pip install --no-deps flashoptim-jax rollfast torchao
    python benchmarks/peers_small_state.py
"""

import json
import pathlib
import time
from functools import partial
from importlib import import_module, metadata, util

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_rmsprop.wrappers import compress_state, decompress_state
from step import environment, spread

RECORD = pathlib.Path(__file__).parent / "results/peers_small_state.json"
RATE, STEPS, REPS = 1e-3, 300, 5
SHAPE, SIZED, TIMED = (32, 256), (1024, 1024), (4000, 8000)
SIZES = {"alike": (), "differ by parameter": SHAPE, "differ by row": (SHAPE[0], 1)}


def from_optax(tx, nu):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return tx.init, step, nu


def in_jax():
    """The functions init, step, and nu of a state, by name."""
    small = compress_state(optax.adam(RATE), jnp.uint8)
    yield "float32", from_optax(optax.adam(RATE), lambda s: s[0].nu)
    yield "compress_state", from_optax(small, lambda s: decompress_state(s)[0].nu)
    if util.find_spec("flashoptim_jax"):
        adam = import_module("flashoptim_jax").flash_adam
        tx = adam(RATE, master_weight_bits=None, fused=False)
        nu_of = import_module("flashoptim_jax.quantization").dequantize_variance
        yield "flashoptim-jax", (tx.init, tx.step, lambda s: nu_of(s.nu))
    if util.find_spec("rollfast"):
        adamw = import_module("rollfast.optim.adam").adamw
        tx = adamw(RATE, mu_dtype=jnp.bfloat16, weight_decay=0.0)
        yield "rollfast", from_optax(tx, lambda s: s[0].nu.astype(jnp.float32))


def run_jax(init, step, nu, gradients):
    """The arrays of the state after these gradients, and its nu."""
    params = jnp.ones(gradients[0].shape)
    state, step = init(params), jax.jit(step)
    for g in gradients:
        params, state = step(params, state, g)
    return jax.tree.leaves(state), nu(state)


def run_torchao(gradients):
    torch, optim = import_module("torch"), import_module("torchao.optim")
    param = torch.nn.Parameter(torch.ones(gradients[0].shape))
    tx = optim.Adam8bit([param], lr=RATE)
    for g in gradients:
        param.grad = torch.tensor(g)
        tx.step()
    mu, nu = (tx.state[param][name] for name in ("exp_avg", "exp_avg_sq"))
    return [mu.codes, mu.scale, nu.codes, nu.scale], nu.dequantize()


def time_ratios(peers):
    rng = np.random.default_rng(0)
    params, g = (jnp.array(rng.standard_normal(TIMED, np.float32)) for _ in range(2))
    steps = {n: jax.jit(step, donate_argnums=(0, 1)) for n, (_, step, _) in peers}
    runs = {n: (params.copy(), init(params)) for n, (init, *_) in peers}
    seconds = {n: [] for n in runs}
    for rep in range(REPS + 1):  # the first compiles
        for name in list(runs)[:: -1 if rep % 2 else 1]:
            start = time.perf_counter()
            runs[name] = jax.block_until_ready(steps[name](*runs[name], g))
            seconds[name].append(time.perf_counter() - start)
    exact = seconds["float32"][1:]
    return {n: spread(np.divide(s[1:], exact).tolist()) for n, s in seconds.items()}


def main():
    rng, jax_peers = np.random.default_rng(0), list(in_jax())
    runs = {n: partial(run_jax, *peer) for n, peer in jax_peers}
    runs |= {"torchao": run_torchao} if util.find_spec("torchao") else {}
    one = np.ones((1, *SIZED), np.float32)
    sizes = {n: sum(x.nbytes for x in run(one)[0]) for n, run in runs.items()}
    rows = {n: {"state, bytes per parameter": x / one.size} for n, x in sizes.items()}
    for sizes, differ in SIZES.items():
        octaves = 2 * rng.standard_normal(differ) if differ else 0
        numbers = np.exp2(octaves) * rng.standard_normal((STEPS, *SHAPE))
        gradients = numbers.astype(np.float32)
        nus = {n: np.asarray(run(gradients)[1]) for n, run in runs.items()}
        for name, nu in nus.items():
            error = np.sqrt(nu / nus["float32"]) - 1
            rows[name][f"error, sizes {sizes}"] = float(np.sqrt(np.mean(error**2)))
    for name, ratio in time_ratios(jax_peers).items():
        rows[name]["step time / float32's"] = ratio
    peers = {name: metadata.version(name) for name in list(rows)[2:]}
    report = json.dumps({**environment(), "peers": peers, "rows": rows}, indent=1)
    RECORD.write_text(report + "\n")
    print(report)


if __name__ == "__main__":
    main()
