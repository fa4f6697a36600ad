"""The programs that the TPU compiler makes of a step, on a machine without a TPU.

Needs the extra `tpu`; skipped where libtpu is not installed, or there is a TPU.
"""

import importlib.util
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from optax_rmsprop import compress_state, rmsprop, state_shardings
from optax_rmsprop.wrappers import master_weights

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu"
)
FOLDER = Path(__file__).parents[2] / "benchmarks"
TOPOLOGIES = ("v5e:2x2", "v6e:2x2")
OPTIONS = {
    "plain": ({}, 20),
    "momentum": ({"momentum": 0.9}, 28),
    "everything": ({"momentum": 0.9, "centered": True, "weight_decay": 1e-4}, 36),
}


@pytest.fixture(scope="module")
def run_benchmark():
    """A function from the name of a benchmark to the names in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # by several test processes
        patch.syspath_prepend(FOLDER)
        yield lambda name: runpy.run_path(str(FOLDER / f"{name}.py"))


@pytest.fixture(scope="module")
def tpu(run_benchmark):
    return run_benchmark("tpu")


def compile_step(tpu, topology, *args, **options):
    return tpu["compile_step"](tpu["devices"](topology)[0], *args, **options)


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize(("options", "bytes_"), OPTIONS.values(), ids=OPTIONS)
def test_one_loop_a_leaf_that_reads_and_writes_everything_once(
    tpu, topology, options, bytes_
):
    shapes = {"a": (8192, 8192), "b": (4096, 2048)}
    compiled = compile_step(tpu, topology, rmsprop(**options), shapes)
    program, memory = compiled.as_text(), compiled.memory_analysis()
    size = 8192 * 8192 + 4096 * 2048
    assert tpu["moved_bytes"](program) / size == pytest.approx(bytes_, abs=0.01)
    assert tpu["large"](program, {"fusion"}) <= len(shapes)
    assert tpu["large"](program, {"copy", "copy-start"}, least=2**25) == 0
    assert memory.temp_size_in_bytes < 2**20
    slots = (bytes_ - 4 - 8) // 8  # g is read; p and slots are read and written
    assert memory.alias_size_in_bytes >= 4 * (1 + slots) * size  # in place


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize(("dtype", "itemsize"), [("bfloat16", 2), ("uint8", 1)])
def test_small_states_are_read_and_written_once(tpu, topology, kind, dtype, itemsize):
    options, exact = OPTIONS[kind]
    tx = compress_state(rmsprop(**options), dtype)
    join = tpu["JOIN"] if dtype == "uint8" and kind != "plain" else None
    compiled = compile_step(tpu, topology, tx, options=join)
    limit = 12 + (exact - 12) * itemsize / 4  # g is read, p is read and written
    assert tpu["moved_bytes"](compiled.as_text()) / 8192**2 < limit + 0.02
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20


# The compiler of jax 0.10 refuses arrays of bytes in host memory.
NEWER = pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="needs jax 0.12")


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(None, 8), ("bfloat16", 4), pytest.param("uint8", 2, marks=NEWER)],
)
def test_a_state_in_host_memory_crosses_the_link_twice(
    run_benchmark, topology, dtype, limit
):
    """In and out, and no more; the host keeps one copy."""
    offload = run_benchmark("offload")
    tx = compress_state(rmsprop(), dtype) if dtype else rmsprop()
    layers, _ = offload["model"](topology)
    params = dict(list(layers.items())[:2])
    compiled = offload["compile_step"](tx, params)
    size, memory = sum(p.size for p in params.values()), compiled.memory_analysis()
    assert offload["link_bytes"](compiled) / size == pytest.approx(limit, abs=0.01)
    state = memory.host_argument_size_in_bytes
    assert state == memory.host_alias_size_in_bytes
    assert state / size == pytest.approx(limit / 2, abs=0.01)
    assert memory.argument_size_in_bytes / size == pytest.approx(8, abs=0.01)


@pytest.mark.usefixtures("standard_promotion")  # for optax.apply_updates
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize(
    ("kind", "dtype", "bytes_"), [("plain", "int8", 16), ("momentum", "int16", 26)]
)
def test_corrected_parameters_are_read_and_written_once(
    tpu, topology, kind, dtype, bytes_
):
    tx = master_weights(rmsprop(**OPTIONS[kind][0]), dtype)
    compiled = compile_step(tpu, topology, tx, (8192, 8192), jnp.bfloat16)
    moved = tpu["moved_bytes"](compiled.as_text()) / 8192**2
    assert moved == pytest.approx(bytes_, abs=0.01)
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (4096, 4096):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_flax_step_with_everything_sharded_over_a_slice(tpu, topology):
    devices = tpu["devices"](topology)
    mesh = jax.sharding.Mesh(devices, "data")
    model, tx = Network(), rmsprop(centered=True, momentum=0.9)
    batch = jax.ShapeDtypeStruct((256, 1024), jnp.float32)
    labels = jax.ShapeDtypeStruct((256,), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), batch)

    def by_first_axis(x):
        axes = ["data"] if x.ndim and x.shape[0] % len(devices) == 0 else []
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def step(params, state, batch, labels):
        def loss(params):
            logits = model.apply(params, batch)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, labels
            ).mean()

        grads = jax.grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, batch, labels = jax.tree.map(by_first_axis, (params, batch, labels))
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(tx.init, params),
        state_shardings(tx, params),
    )
    args = params, state, batch, labels
    shardings = jax.tree.map(lambda x: x.sharding, args[:2])
    compiled = (
        jax.jit(step, donate_argnums=(0, 1), out_shardings=shardings)
        .lower(*args)
        .compile()
    )
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(args))
    memory, program = compiled.memory_analysis(), compiled.as_text()
    assert memory.argument_size_in_bytes < 1.05 * whole / len(devices)
    assert "all-gather" in program  # of parameters, which data parallel has not
    state_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(args[:2]))
    assert memory.alias_size_in_bytes > 0.95 * state_bytes / len(devices)


def test_the_limits_can_fail(tpu):
    """A transformation that reads its gradient in a second loop is found."""

    def twice(g):
        return jax.tree.map(lambda x: x - jnp.mean(x), g)  # a whole pass before

    tx = optax.chain(optax.stateless_with_tree_map(lambda g, p: twice(g)), rmsprop())
    compiled = compile_step(tpu, "v5e:2x2", tx)
    assert tpu["moved_bytes"](compiled.as_text()) / 8192**2 > 23.9
