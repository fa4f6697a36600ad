"""States on eight devices: where they lie, what an update sends, what it computes."""

import contextlib
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from helpers import (
    WRAPPERS,
    make_mesh,
    share_that_differs,
    skip_without_pinned_host,
    slow_but,
    stepper,
)
from optax_rmsprop import (
    check_state_shardings,
    compress_state,
    rmsprop,
    scale_by_rms,
    state_shardings,
)

SHAPES = {"matrix": (256, 320), "stack": (3, 16, 8), "vector": (80,), "scalar": ()}
EVERYTHING = {"momentum": 0.9, "centered": True, "weight_decay": 0.1}
R = functools.partial(rmsprop, 0.01, 0.9, eps=1e-2)
SMALL = functools.partial(compress_state, R(momentum=0.9), min_size=1000)
KINDS = {
    "plain": R(),
    "everything": R(**EVERYTHING),
    "uint8": SMALL("uint8"),
    "bfloat16": SMALL("bfloat16"),
}
REPLICATED = dict.fromkeys(SHAPES, P())
BY_ROWS = REPLICATED | {"matrix": P("data"), "vector": P("data")}
BY_COLUMNS = REPLICATED | {"matrix": P(None, "model"), "stack": P(None, None, "model")}
# The mesh, where the parameters are, the argument `zero1`, and where the state is.
LAYOUTS = {
    "data parallel": ({"data": 8}, REPLICATED, None, REPLICATED),
    "ZeRO-1": (
        {"data": 8},
        REPLICATED,
        "data",
        BY_ROWS | {"stack": P(None, "data")},  # 8 does not divide 3
    ),
    "FSDP": ({"data": 8}, BY_ROWS, None, BY_ROWS),
    "tensor parallel": ({"model": 8}, BY_COLUMNS, None, BY_COLUMNS),
    "FSDP, tensor parallel": (
        {"data": 4, "model": 2},
        BY_COLUMNS | {"matrix": P("data", "model")},
        None,
        BY_COLUMNS | {"matrix": P("data", "model")},
    ),
    "ZeRO-1, tensor parallel": (
        {"data": 4, "model": 2},
        BY_COLUMNS | {"vector": P(("model", "data"))},
        "data",
        {
            "matrix": P("data", "model"),
            "stack": P(None, "data", "model"),
            "vector": P(("model", "data")),
            "scalar": P(),
        },
    ),
}
# Programs of compressed states take seconds to compile.
LAYOUTS_OF_COMPRESSED = ("ZeRO-1", "FSDP, tensor parallel")
QUICK = {("ZeRO-1", "everything")}
MODES = ["Auto"] + ["Explicit"] * hasattr(jax, "set_mesh")
# The most bytes of a collective for a compressed state's random bits: 4 for each index
# of the longest axis. A shard of the matrix has 40 KB, and one of its codes 10 KB.
FEW_BYTES = 4 * 320
FOR_RANDOM_BITS = {"all-gather", "all-reduce", "collective-permute"}


def abstract(shapes, specs, mesh):
    """Parameters as shapes, on a mesh without devices."""
    return {
        name: jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=NamedSharding(mesh, specs[name])
        )
        for name, shape in shapes.items()
    }


def abstract_layout(name):
    sizes, specs, zero1, of_state = LAYOUTS[name]
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    return abstract(SHAPES, specs, mesh), zero1, of_state


def dimensions(spec):
    """A spec without what says nothing at its end."""
    names = list(spec)
    while names and names[-1] is None:
        names.pop()
    return names


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_belongs_to_a_parameter_lies_as_it_does(layout, kind):
    params, zero1, of_state = abstract_layout(layout)
    shardings = state_shardings(KINDS[kind], params, zero1=zero1)
    state = jax.eval_shape(KINDS[kind].init, params)
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    if kind == "uint8":
        formats = jax.tree.leaves(shardings.formats)  # of the rows of two matrices
        rows = dimensions(P(*of_state["matrix"][:1]))
        assert [dimensions(s.spec) for s in formats] == 8 * [rows]
        shardings, state = (x._replace(formats=None) for x in (shardings, state))
    found = 0
    for slot in ("nu", "mu", "var", "trace"):
        for _, tree in optax.tree.get_all_with_path(shardings, slot):
            for name, spec in of_state.items():
                assert dimensions(tree[name].spec) == dimensions(spec)
            found += len(tree)
    assert found == len(SHAPES) * {"plain": 1, "everything": 3}.get(kind, 2)
    others = len(jax.tree.leaves(state)) - found
    whole = [s for s in jax.tree.leaves(shardings) if s.spec == P()]
    assert len(whole) == others + found // len(SHAPES) * sum(
        spec == P() for spec in of_state.values()
    )


def matrices(params):
    return jax.tree.map(lambda p: len(p.shape) > 1, params)


def halves(params):
    return jax.tree.map(lambda p: "a" if len(p.shape) > 1 else "b", params)


AROUND = {
    **{
        name: wrap(functools.partial(R, momentum=0.9))
        for name, wrap in WRAPPERS.items()
    },
    "adamw": optax.adamw(0.1),
    "half masked": optax.masked(R(), matrices),
    "two groups": optax.partition({"a": R(), "b": optax.sgd(0.1, 0.9)}, halves),
    "compressed": optax.chain(SMALL("uint8"), optax.ema(0.9)),
    "lookahead": optax.contrib.schedule_free_sgd(0.1),
    "adafactor": optax.adafactor(0.01, min_dim_size_to_factor=128),
}


@pytest.mark.parametrize("name", AROUND)
def test_inside_of_other_transformations(name):
    params, _, _ = abstract_layout("FSDP")
    state = jax.eval_shape(AROUND[name].init, params)
    shardings = state_shardings(AROUND[name], params)
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    in_parts = 0
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True)
    for x, sharding in pairs:
        assert (sharding.spec == P("data")) == (x.shape in ((256, 320), (80,)))
        in_parts += sharding.spec == P("data")
    assert in_parts >= 1


def test_paths_tell_parameters_of_one_shape_apart():
    mesh = AbstractMesh((8,), ("data",))
    square = {"a": (64, 64), "b": (64, 64)}
    leaves = abstract(square, {"a": P("data"), "b": P(None, "data")}, mesh)
    # The name of the first is the end of the path of the second.
    params = {"b": leaves["a"], "a": {"b": leaves["b"]}}
    nu = state_shardings(scale_by_rms(), params).nu
    assert nu["b"].spec == P("data")
    assert nu["a"]["b"].spec == P(None, "data")
    single = state_shardings(R(momentum=0.9), leaves["a"])
    assert single[0].nu == single[1].trace == leaves["a"].sharding
    assert single[0].count.spec == P()


def on(spec, mesh, shape=(8, 8), **memory):
    sharding = NamedSharding(mesh, spec, **memory)
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


@pytest.mark.parametrize(
    ("shape", "spec", "of_state"),
    [
        ((8, 8), P(), P("data", None)),
        ((8, 8), P("model"), P("model", "data")),
        ((8, 8), P("data"), P("data")),
        ((8, 8), P(None, "data"), P(None, "data")),
        ((8, 8), P(("model", "data")), P(("model", "data"))),
        ((0, 8), P(), P(None, "data")),
        ((3, 2), P(), P()),
        ((3, 8), P(None, "model"), P(None, "model")),
    ],
)
def test_zero1_takes_the_first_dimension_that_is_free(shape, spec, of_state):
    mesh = AbstractMesh((4, 2), ("data", "model"))
    param = on(spec, mesh, shape, memory_kind="pinned_host")
    nu = state_shardings(scale_by_rms(), param, zero1="data").nu
    assert nu.spec == of_state
    assert nu.memory_kind == "pinned_host"


def test_another_shape_at_the_path_of_a_parameter_is_replicated():
    """The parameter of that path decides, not one at a shorter path that would fit."""
    params = {"w": on(P("data"), ONE), "a": {"w": on(P(), ONE, (4, 4))}}

    def init(params):
        return {"w": jnp.zeros((8, 8)), "a": {"w": jnp.zeros((8, 8))}}

    shardings = state_shardings(optax.GradientTransformation(init, None), params)
    assert shardings["w"].spec == P("data")
    assert shardings["a"]["w"].spec == P()


ONE, OTHER = AbstractMesh((8,), ("data",)), AbstractMesh((4, 2), ("data", "model"))
NONE = AbstractMesh((), ())
ERRORS = [
    (
        {"w": jnp.ones(2)},
        None,
        r"`params` must have a NamedSharding each, got Single.*",
    ),
    (
        {"w": np.ones(2)},
        None,
        r"got a ndarray at \['w'\]; jax.device_put\(params, Named",
    ),
    ({"w": 1.0}, None, r"got a float at \['w'\]"),
    (
        {"w": jax.ShapeDtypeStruct((2,), jnp.float32)},
        None,
        r"got a ShapeDtypeStruct at \['w'\]; give it one as sharding=",
    ),
    (
        {"b": on(P(), ONE), "w": on(P("model"), OTHER)},
        None,
        r"`params` must be on one mesh, got Mesh\('data': 8; \w+\) at \['b'\] and "
        r"Mesh\('data': 4, 'model': 2; \w+\) at \['w'\]; jax.device_put moves",
    ),
    ({}, None, "`params` must have an array, whose mesh is used, got {}"),
    (
        on(P(), OTHER),
        "batch",
        "`zero1` must be an axis of the mesh, 'data' or 'model', got 'batch'; name",
    ),
    (on(P(), ONE), ("data",), r"`zero1` must be an axis of the mesh, 'data', got \("),
    (on(P(), NONE, ()), "data", "an axis of the mesh, which has none, got 'data'"),
]


@pytest.mark.parametrize(("params", "zero1", "message"), ERRORS)
def test_bad_parameters_and_axes(params, zero1, message):
    with pytest.raises(ValueError, match=message):
        state_shardings(R(), params, zero1=zero1)


def test_errors_about_long_names_are_short():
    axes, long = ("x" * 500, "y" * 500), "layer" * 200
    one, other = AbstractMesh((1, 1), axes), AbstractMesh((1, 1), axes[::-1])
    with pytest.raises(ValueError, match="`params` must be on one mesh") as raised:
        state_shardings(
            R(), {f"{long}{i}": on(P(), m) for i, m in enumerate((one, other))}
        )
    assert len(str(raised.value)) < 600
    mesh = jax.make_mesh((1, 1), axes, axis_types=2 * (jax.sharding.AxisType.Auto,))
    whole = {long: NamedSharding(mesh, P(axes))}
    with pytest.raises(ValueError, match="`state` must be sharded as") as raised:
        check_state_shardings({long: jax.device_put(1.0)}, whole)
    assert len(str(raised.value)) < 600


def test_what_is_no_transformation_or_no_sharding():
    with pytest.raises(TypeError, match=r"`tx` must be an optax.Gradient.*, got 1"):
        state_shardings(1, on(P(), ONE))
    mesh = jax.make_mesh((1,), ("data",))
    params = jax.device_put({"w": jnp.ones(2)}, NamedSharding(mesh, P()))
    state = scale_by_rms().init(params)
    shardings = state_shardings(scale_by_rms(), params)
    check_state_shardings(state, shardings)
    specs = shardings._replace(nu={"w": P()})
    nowhere = shardings._replace(count=NamedSharding(ONE, P()))
    with pytest.raises(TypeError, match=r"on devices, got .* at \.count; Named"):
        check_state_shardings(state, nowhere)
    with pytest.raises(
        TypeError, match=r"`shardings` must be .* at \.nu\['w'\]; Named"
    ):
        check_state_shardings(state, specs)
    with pytest.raises(
        ValueError, match=r"missing \.nu\['w'\]; unexpected \.nu\['v'\]"
    ):
        check_state_shardings(state._replace(nu={"v": params["w"]}), shardings)
    with pytest.raises(ValueError, match=r"structure of `shardings`: got .* expected"):
        check_state_shardings([params["w"]], (shardings.count,))
    with pytest.raises(
        ValueError, match=r"a ndarray at \.nu\['w'\], .*; jax.device_put"
    ):
        check_state_shardings(state._replace(nu={"w": np.ones(2)}), shardings)
    by_rows = shardings._replace(count=NamedSharding(mesh, P("data")))
    with pytest.raises(ValueError, match=r"at \.count, expected P.*data"):
        check_state_shardings(state, by_rows)  # more dimensions than the count has
    with pytest.raises(ValueError, match=r"a traced array at .*count.* outside of jax"):
        jax.jit(lambda s: check_state_shardings(s, shardings))(state)
    with pytest.raises(ValueError, match=r"a traced array at \['w'\]; call .* outside"):
        jax.jit(lambda p: state_shardings(R(), p).count)(params)


def collectives(compiled):
    """Name and bytes of every collective operation of a program."""
    operation = (
        r"= (\(.*?\)|\S+) (all-reduce|all-gather|all-to-all|reduce-scatter|"
        r"collective-permute|collective-broadcast|ragged-all-to-all)(?:-start)?\("
    )
    found = []
    for result, name in re.findall(operation, compiled.as_text()):
        nbytes = 0
        for bits, sides in re.findall(r"[a-z]+(\d*)\w*\[([\d,]*)\]", result):
            sides = [int(side) for side in sides.split(",") if side]
            nbytes += int(bits or 8) // 8 * int(np.prod(sides))
        found.append((name, nbytes))
    return sorted(found)


def expected_collectives(params, of_state):
    """ZeRO-1 puts a parameter together again of its parts, and that is all."""
    return sorted(
        ("all-gather", p.addressable_shards[0].data.nbytes)
        for name, p in params.items()
        if not p.sharding.is_equivalent_to(of_state[name], p.ndim)
    )


def assert_few(found, expected, kind, mode):
    """Check for these collectives, and small ones that compressed states may have."""
    if kind == "uint8" and mode == "Explicit":
        # The smallest and the largest code of rows that are on several devices.
        few = [c for c in found if c[0] == "all-reduce"]
        assert sum(nbytes for _, nbytes in few) <= FEW_BYTES, few
        found = [c for c in found if c not in few]
    if kind in ("uint8", "bfloat16") and mode == "Auto":
        few = [c for c in found if c[1] <= FEW_BYTES]
        assert {name for name, _ in few} <= FOR_RANDOM_BITS, few
        found, expected = (
            [c for c in those if c[1] > FEW_BYTES] for those in (found, expected)
        )
    assert found == expected, (found, expected)


def draw(seed):
    rng = np.random.default_rng(seed)
    shapes = SHAPES.items()
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes}


STEPS = 3


@functools.cache
def alone(kind):
    """Parameters and state after some steps, on the first device."""
    tx = KINDS[kind]
    step, params = jax.jit(stepper(tx)), draw(0)
    state = tx.init(jax.tree.map(jnp.asarray, params))
    for i in range(STEPS):
        params, state = step(params, state, draw(i + 1))
    return params, state


def mesh_of(sizes, mode):
    kinds = (getattr(AxisType, mode),) * len(sizes)
    return make_mesh(sizes, axis_types=kinds)


def inside(mesh, mode):
    return jax.set_mesh(mesh) if mode == "Explicit" else contextlib.nullcontext()


def assert_as_alone(results, kind):
    """Check that results equal those of one device, within rounding.

    How XLA contracts products and sums may depend on the shape of a shard. It rarely
    makes another code of a compressed number.
    """
    most = 1e-3 if kind in ("uint8", "bfloat16") else 0.0
    assert share_that_differs(results, alone(kind)) <= most


def layouts():
    """Each layout with each kind, in one of the modes, so that each meets both.

    What is plain is a part of everything.
    """
    for i, kind in enumerate(list(KINDS)[1:]):
        compressed = kind in ("uint8", "bfloat16")
        for j, layout in enumerate(LAYOUTS_OF_COMPRESSED if compressed else LAYOUTS):
            marks = [pytest.mark.slow] * ((layout, kind) not in QUICK)
            yield pytest.param(layout, kind, MODES[(i + j) % len(MODES)], marks=marks)


@pytest.mark.parametrize(("layout", "kind", "mode"), list(layouts()))
def test_a_layout_computes_the_same_and_sends_no_more_than_it_must(layout, kind, mode):
    tx = KINDS[kind]
    sizes, specs, zero1, of_state = LAYOUTS[layout]
    mesh = mesh_of(sizes, mode)
    places, of_slots = (
        {name: NamedSharding(mesh, spec) for name, spec in tree.items()}
        for tree in (specs, of_state)
    )
    with inside(mesh, mode):
        params = jax.device_put(draw(0), places)
        shardings = state_shardings(tx, params, zero1=zero1)
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        check_state_shardings(state, shardings)
        grads = [jax.device_put(draw(i + 1), places) for i in range(STEPS)]
        step = jax.jit(
            stepper(tx),
            in_shardings=(places, shardings, places),
            out_shardings=(places, shardings),
        )
        step = step.lower(params, state, grads[0]).compile()
        assert_few(
            collectives(step), expected_collectives(params, of_slots), kind, mode
        )
        for g in grads:
            params, state = step(params, state, g)
    check_state_shardings(state, shardings)
    assert_as_alone((params, state), kind)


def fsdp(mode, kind="everything"):
    sizes, specs, _, _ = LAYOUTS["FSDP"]
    mesh = mesh_of(sizes, mode)
    places = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    params = jax.device_put(draw(0), places)
    return mesh, params, places, state_shardings(KINDS[kind], params)


needs_explicit = pytest.mark.skipif(
    "Explicit" not in MODES, reason="jax.set_mesh needs jax 0.7"
)


@needs_explicit
@pytest.mark.parametrize("kind", ["everything", "bfloat16"])
def test_inits_in_explicit_mode(kind):
    """There, `jax.jit` needs no help to shard a state, nor to keep it so."""
    mesh, params, places, shardings = fsdp("Explicit", kind)
    with jax.set_mesh(mesh):
        state = jax.jit(KINDS[kind].init)(params)
        check_state_shardings(state, shardings)
        params, state = jax.jit(stepper(KINDS[kind]))(params, state, params)
    check_state_shardings((params, state), (places, shardings))
    # JAX refuses to compute with an array of a mesh whose axes are of another kind.
    _, _, _, automatic = fsdp("Auto", kind)
    with pytest.raises(ValueError, match=r"got .*; Explicit; .* expected .*; Auto; "):
        check_state_shardings(state, automatic)


@pytest.mark.parametrize("kind", ["everything", "bfloat16"])
def test_inits_in_automatic_mode(kind):
    """A compiled init does not look at its argument, and one that is not does."""
    tx = KINDS[kind]
    mesh, params, _, shardings = fsdp("Auto", kind)
    state = jax.jit(tx.init)(params)
    assert all(len(x.sharding.device_set) == 1 for x in jax.tree.leaves(state))
    if hasattr(jax, "set_mesh"):
        with jax.set_mesh(mesh):
            state = jax.jit(tx.init)(params)
        assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state))
        assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(state))
    state = tx.init(params)
    slots = [x for x in jax.tree.leaves(state) if x.shape == (256, 320)]
    assert slots
    assert all(x.sharding.spec[0] == "data" for x in slots)
    with pytest.raises(ValueError, match=r"got SingleDeviceSharding.* at .*count"):
        check_state_shardings(state, shardings)
    check_state_shardings(jax.device_put(state, shardings), shardings)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_eager_inits_agree():
    """`tx.init` keeps shardings by JAX's own rules, which are an independent oracle."""
    _, params, _, _ = fsdp("Auto")
    for name, tx in AROUND.items():
        state = tx.init(params)
        shardings = jax.tree.leaves(state_shardings(tx, params))
        for x, sharding in zip(jax.tree.leaves(state), shardings, strict=True):
            if isinstance(x.sharding, NamedSharding):
                assert x.sharding.is_equivalent_to(sharding, x.ndim), name


def test_a_state_elsewhere_has_more_collectives():
    """The negative control: a state by columns of parameters by rows."""
    mesh, params, places, shardings = fsdp("Auto", "plain")
    wrong = jax.tree.map(
        lambda s: NamedSharding(mesh, P(None, "data")) if s == places["matrix"] else s,
        shardings,
    )
    wrong[0].nu["vector"] = places["vector"]
    state = jax.jit(KINDS["plain"].init, out_shardings=wrong)(params)
    with pytest.raises(
        ValueError,
        match=r"`state` must be sharded as in `shardings`, got P\w*\(None, 'data'\) on "
        r"Mesh\('data': 8; Auto; devices 0 1 2 3 4 5 6 7\) at \[0\]\.nu\['matrix'\], "
        r"expected P\w*\('data',\) on Mesh.*; jax.device_put\(state, shardings\) moves",
    ):
        check_state_shardings(state, shardings)
    step = jax.jit(
        stepper(KINDS["plain"]),
        in_shardings=(places, wrong, places),
        out_shardings=(places, wrong),
    )
    found = collectives(step.lower(params, state, params).compile())
    assert found
    for kind in ("plain", "uint8"):
        with pytest.raises(AssertionError):
            assert_few(found, expected_collectives(params, places), kind, "Auto")
    # One that lies wrongly only on other devices.
    turned = jax.sharding.Mesh(mesh.devices[::-1], ("data",))
    moved = jax.device_put(params, NamedSharding(turned, P()))
    with pytest.raises(
        ValueError, match=r"; devices 7 6 5 4 3 2 1 0\) at \['matrix'\]"
    ):
        check_state_shardings(moved, places)
    with pytest.raises(ValueError, match=r"on one mesh, .* 6 7\) at .* 7 6 .* at \['s"):
        state_shardings(R(), params | {"stack": moved["stack"]})


@pytest.mark.parametrize("kind", slow_but(["everything"], ["everything", "uint8"]))
def test_a_state_in_host_memory(kind):
    """It computes the same, and a state in the other memory is found, either way."""
    skip_without_pinned_host()
    tx = KINDS[kind]
    _, params, places, shardings = fsdp("Auto", kind)
    in_host = jax.tree.map(lambda s: s.with_memory_kind("pinned_host"), shardings)
    state = jax.jit(tx.init, out_shardings=in_host)(params)

    def step(params, state, grads):
        return stepper(tx)(params, jax.device_put(state, shardings), grads)

    step = jax.jit(step, out_shardings=(places, in_host), donate_argnums=(0, 1))
    for i in range(STEPS):
        params, state = step(params, state, jax.device_put(draw(i + 1), places))
    check_state_shardings(state, in_host)
    assert_as_alone((params, state), kind)
    for there, wanted in ((shardings, in_host), (in_host, shardings)):
        kinds = (jax.tree.leaves(x)[0].memory_kind for x in (there, wanted))
        message = r"\) in {} at .*count, expected .*\) in {}; jax.device_put"
        with pytest.raises(ValueError, match=message.format(*kinds)):
            check_state_shardings(jax.device_put(state, there), wanted)


def test_zero1_with_scattered_gradients():
    """Gradients in the parts of the state: what a reduce-scatter gives."""
    tx = KINDS["everything"]
    mesh = mesh_of({"data": 8}, "Auto")
    whole = dict.fromkeys(SHAPES, NamedSharding(mesh, P()))
    params = jax.device_put(draw(0), whole)
    shardings = state_shardings(tx, params, zero1="data")
    parts = state_shardings(optax.trace(0.9), params, zero1="data").trace
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    step = jax.jit(
        stepper(tx),
        in_shardings=(whole, shardings, parts),
        out_shardings=(whole, shardings),
    )
    grads = jax.device_put(draw(1), parts)
    found = collectives(step.lower(params, state, grads).compile())
    assert found == expected_collectives(params, parts)


def test_a_whole_training_step():
    """With a loss over a batch in parts, all that is sent is for the gradient."""
    tx = KINDS["everything"]
    mesh = mesh_of({"data": 8}, "Auto")
    whole, by_rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    weights = {"a": jnp.ones((16, 4)), "b": jnp.ones(4)}
    batch = jnp.asarray(np.random.default_rng(0).normal(size=(64, 16)), jnp.float32)

    def loss(params, batch):
        return jnp.mean(jnp.tanh(batch @ params["a"] + params["b"][None]) ** 2)

    def train(params, state, batch):
        return stepper(tx)(params, state, jax.grad(loss)(params, batch))

    params, shards = jax.device_put(weights, whole), jax.device_put(batch, by_rows)
    shardings = state_shardings(tx, params)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    gradient = jax.jit(jax.grad(loss), out_shardings=whole).lower(params, shards)
    step = jax.jit(train, out_shardings=(whole, shardings))
    compiled = step.lower(params, state, shards).compile()
    assert collectives(compiled) == collectives(gradient.compile()) != []
    actual = compiled(params, state, shards)
    expected = jax.jit(train)(weights, tx.init(weights), batch)
    for x, y in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        # observed: 2e-7, as sums of eight parts are in another order
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-8)


def test_within_shard_map():
    kind = "everything"
    tx = KINDS[kind]
    mesh, params, places, shardings = fsdp("Auto", kind)
    specs, of_state = jax.tree.map(lambda s: s.spec, (places, shardings))
    init = jax.shard_map(tx.init, mesh=mesh, in_specs=(specs,), out_specs=of_state)
    step = jax.shard_map(
        stepper(tx),
        mesh=mesh,
        in_specs=(specs, of_state, specs),
        out_specs=(specs, of_state),
    )
    state, step = jax.jit(init)(params), jax.jit(step)
    check_state_shardings(state, shardings)
    grads = [jax.device_put(draw(i + 1), places) for i in range(STEPS)]
    step = step.lower(params, state, grads[0]).compile()
    assert collectives(step) == []
    for g in grads:
        params, state = step(params, state, g)
    assert_as_alone((params, state), kind)


@needs_explicit  # Orbax, too, enters jax.set_mesh
@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_the_page_of_scale_in_both_modes(mode, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
    make_mesh = functools.partial(jax.make_mesh, axis_types=(getattr(AxisType, mode),))
    monkeypatch.setattr(jax, "make_mesh", make_mesh)
    for code in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S):
        exec(compile(code, f"scale.md, {mode}", "exec"), {})
