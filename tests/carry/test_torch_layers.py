"""Layers ported from torch give Flax, Linen and NNX, torch's outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("torch")
pytest.importorskip("flax")
import torch
from flax import linen, nnx

from optax_rmsprop import from_torch, to_torch, torch_layers

TOLERANCE = 1e-5  # of outputs of size 1; observed: 1e-6
BATCH, TIME = 4, 6


@pytest.fixture(autouse=True)
def _same_weights():
    torch.manual_seed(0)


def weights_of(module):
    """As a port gets them, with norms that have seen something."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    for name, buffer in module.named_buffers():
        if "running" in name:
            torch.nn.init.uniform_(buffer, 0.5, 2)
    return {name: t.numpy().copy() for name, t in module.state_dict().items()}


def random(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def to_last(x):
    """From torch's (batch, channels, ...) to Flax's (batch, ..., channels)."""
    return np.moveaxis(x, 1, -1)


def in_torch(module, x):
    """The module's output, without the last state of a recurrent layer."""
    with torch.no_grad():
        output = module.eval()(torch.from_numpy(x))
    return (output[0] if isinstance(output, tuple) else output).numpy()


def loaded(module, tree):
    """An NNX module with these values, which must be all that it has."""
    state = nnx.state(module)
    shapes = jax.tree.map(jnp.shape, nnx.to_pure_dict(state))
    assert jax.tree.map(np.shape, tree) == shapes
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, tree))
    nnx.update(module, state)
    return module


def applied(module, tree, x, **collections):
    """The output of a Linen module, all of whose parameters must be in the tree."""
    wanted = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    shapes = jax.tree.map(jnp.shape, wanted)
    assert jax.tree.map(np.shape, tree) == shapes
    return module.apply({"params": tree, **collections}, x)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias):
    layer = torch.nn.Linear(3, 5, bias=bias)
    tree = torch_layers.linear(weights_of(layer), "")
    x = random(BATCH, 3)
    expected = in_torch(layer, x)
    close(applied(linen.Dense(5, use_bias=bias), tree, x), expected)
    ours = nnx.Linear(3, 5, use_bias=bias, rngs=nnx.Rngs(0))
    close(loaded(ours, tree)(x), expected)


def test_embedding():
    layer = torch.nn.Embedding(7, 3)
    tree = torch_layers.embedding(weights_of(layer), "")
    x = np.array([[0, 6], [2, 2]])
    expected = in_torch(layer, x)
    close(applied(linen.Embed(7, 3), tree, x), expected)
    close(loaded(nnx.Embed(7, 3, rngs=nnx.Rngs(0)), tree)(x), expected)


KINDS = {
    "plain": {},
    "grouped": {"groups": 2},
    "depthwise": {"groups": 4},
    "strided": {"stride": 2, "padding": 1},
    "dilated": {"dilation": 2, "padding": 2, "bias": False},
}


# One in three dimensions takes XLA five seconds, and is in test_torch_port_of.py.
@pytest.mark.parametrize(
    ("kind", "rank"), list(zip(KINDS, [1, 2, 1, 2, 2], strict=True))
)
def test_conv(kind, rank):
    options = {"padding": 0, "stride": 1, "dilation": 1, "bias": True} | KINDS[kind]
    size = (3, 2, 4)[:rank]
    layer = getattr(torch.nn, f"Conv{rank}d")(4, 8, size, **options)
    tree = torch_layers.conv(weights_of(layer), "")
    x = random(BATCH, 4, *(9, 8, 7)[:rank])
    expected = to_last(in_torch(layer, x))
    in_flax = {
        "kernel_size": size,
        "strides": (options["stride"],) * rank,
        "padding": options["padding"],
        "kernel_dilation": options["dilation"],
        "feature_group_count": options.get("groups", 1),
        "use_bias": options["bias"],
    }
    close(applied(linen.Conv(8, **in_flax), tree, to_last(x)), expected)
    ours = nnx.Conv(4, 8, **in_flax, rngs=nnx.Rngs(0))
    close(loaded(ours, tree)(to_last(x)), expected)


TRANSPOSED = {
    "plain": {},
    "strided": {"stride": 2},
    "padded": {"stride": 2, "padding": 1, "output_padding": 1},
    "dilated": {"dilation": 2, "bias": False},
}


@pytest.mark.parametrize(
    ("kind", "rank"), list(zip(TRANSPOSED, [1, 2, 1, 2], strict=True))
)
def test_conv_transpose(kind, rank):
    defaults = {"padding": 0, "output_padding": 0, "stride": 1, "dilation": 1}
    options = defaults | {"bias": True} | TRANSPOSED[kind]
    size = (3, 2, 4)[:rank]
    layer = getattr(torch.nn, f"ConvTranspose{rank}d")(4, 8, size, **options)
    tree = torch_layers.conv_transpose(weights_of(layer), "")
    x = random(BATCH, 4, *(5, 4, 3)[:rank])
    expected = to_last(in_torch(layer, x))
    before = [options["dilation"] * (k - 1) - options["padding"] for k in size]
    in_flax = {
        "kernel_size": size,
        "strides": (options["stride"],) * rank,
        "padding": [(n, n + options["output_padding"]) for n in before],
        "kernel_dilation": (options["dilation"],) * rank,
        "use_bias": options["bias"],
    }
    close(applied(linen.ConvTranspose(8, **in_flax), tree, to_last(x)), expected)
    ours = nnx.ConvTranspose(4, 8, **in_flax, rngs=nnx.Rngs(0))
    close(loaded(ours, tree)(to_last(x)), expected)


@pytest.mark.parametrize(("rank", "groups"), [(1, 2), (2, 4), (3, 2)])
def test_grouped_conv_transpose(rank, groups):
    size = (3, 2, 4)[:rank]
    options = {"stride": 2, "padding": 1, "output_padding": 1, "groups": groups}
    layer = getattr(torch.nn, f"ConvTranspose{rank}d")(4, 8, size, **options)
    weights = weights_of(layer)
    tree = torch_layers.conv_transpose(weights, "", groups)
    x = random(BATCH, 4, *(5, 4, 3)[:rank])
    expected = to_last(in_torch(layer, x))
    in_flax = {
        "kernel_size": size,
        "input_dilation": (2,) * rank,
        "padding": [(k - 1 - 1, k - 1 - 1 + 1) for k in size],
        "feature_group_count": groups,
    }
    close(applied(linen.Conv(8, **in_flax), tree, to_last(x)), expected)
    ours = nnx.Conv(4, 8, **in_flax, rngs=nnx.Rngs(0))
    close(loaded(ours, tree)(to_last(x)), expected)
    with pytest.raises(ValueError, match=f"must be torch's, {groups} in '', got 1"):
        torch_layers.conv_transpose(weights, "")


def test_a_flattened_image():
    conv, head = torch.nn.Conv2d(1, 4, 3), torch.nn.Linear(4 * 3 * 2, 5)
    images = random(BATCH, 1, 5, 4)
    tree = torch_layers.linear(weights_of(head), "", flattened=(4, 3, 2))
    expected = in_torch(torch.nn.Sequential(conv, torch.nn.Flatten(), head), images)
    x = to_last(in_torch(conv, images))
    close(applied(linen.Dense(5), tree, x.reshape(BATCH, -1)), expected)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_batch_norm(rank):
    layer = getattr(torch.nn, f"BatchNorm{rank}d")(4)
    weights = weights_of(layer)
    tree = torch_layers.norm(weights, "")
    stats = torch_layers.running_stats(weights, "")
    x = random(BATCH, 4, *(5, 4, 3)[:rank])
    expected = to_last(in_torch(layer, x))
    module = linen.BatchNorm(use_running_average=True, epsilon=1e-5)
    close(applied(module, tree, to_last(x), batch_stats=stats), expected)
    ours = nnx.BatchNorm(4, use_running_average=True, epsilon=1e-5, rngs=nnx.Rngs(0))
    close(loaded(ours, tree | stats)(to_last(x)), expected)


def test_layer_norm():
    layer = torch.nn.LayerNorm(5)
    tree = torch_layers.norm(weights_of(layer), "")
    x = random(BATCH, 5)
    expected = in_torch(layer, x)
    close(applied(linen.LayerNorm(epsilon=1e-5), tree, x), expected)
    ours = nnx.LayerNorm(5, epsilon=1e-5, rngs=nnx.Rngs(0))
    close(loaded(ours, tree)(x), expected)


def test_layer_norm_without_a_bias():
    layer = torch.nn.LayerNorm(5, bias=False)
    tree = torch_layers.norm(weights_of(layer), "")
    x = random(BATCH, 5)
    module = linen.LayerNorm(epsilon=1e-5, use_bias=False)
    close(applied(module, tree, x), in_torch(layer, x))


def test_layer_norm_over_two_dimensions():
    layer = torch.nn.LayerNorm((4, 5))
    tree = torch_layers.norm(weights_of(layer), "")
    x = random(BATCH, 4, 5)
    axes = {"reduction_axes": (-2, -1), "feature_axes": (-2, -1)}
    close(applied(linen.LayerNorm(epsilon=1e-5, **axes), tree, x), in_torch(layer, x))


def test_group_norm():
    layer = torch.nn.GroupNorm(2, 4)
    tree = torch_layers.norm(weights_of(layer), "")
    x = random(BATCH, 4, 5, 6)
    expected = to_last(in_torch(layer, x))
    module = linen.GroupNorm(2, epsilon=1e-5)
    close(applied(module, tree, to_last(x)), expected)
    ours = nnx.GroupNorm(4, 2, epsilon=1e-5, rngs=nnx.Rngs(0))
    close(loaded(ours, tree)(to_last(x)), expected)


IN, HIDDEN = 3, 5
CELLS = {
    "lstm": (torch.nn.LSTM, linen.LSTMCell, torch_layers.lstm),
    "optimized lstm": (torch.nn.LSTM, linen.OptimizedLSTMCell, torch_layers.lstm),
    "gru": (torch.nn.GRU, linen.GRUCell, torch_layers.gru),
}
NNX_CELLS = {
    "rnn": (torch.nn.RNN, nnx.SimpleCell, torch_layers.nnx_fused),
    "lstm": (torch.nn.LSTM, nnx.LSTMCell, torch_layers.nnx_lstm),
    "optimized lstm": (torch.nn.LSTM, nnx.OptimizedLSTMCell, torch_layers.nnx_fused),
    "gru": (torch.nn.GRU, nnx.GRUCell, torch_layers.nnx_fused),
}


def in_both_directions(run, x):
    """Two layers, each forwards and backwards, as torch joins them."""
    for layer in range(2):
        forwards, backwards = run(x, layer, False), run(x, layer, True)
        x = np.concatenate([forwards, backwards], -1)
    return x


@pytest.mark.parametrize("kind", CELLS)
def test_recurrent_in_linen(kind):
    torch_class, cell_class, port = CELLS[kind]
    layer = torch_class(IN, HIDDEN, 2, batch_first=True, bidirectional=True)
    weights = {f"a.{name}": w for name, w in weights_of(layer).items()}

    def run(x, number, reverse):
        tree = torch_layers.one_bias(port(weights, "a", number, reverse))
        module = linen.RNN(cell_class(HIDDEN), reverse=reverse, keep_order=True)
        return applied(module, {"cell": tree}, x)

    x = random(BATCH, TIME, IN)
    close(in_both_directions(run, x), in_torch(layer, x))


@pytest.mark.parametrize("kind", NNX_CELLS)
def test_recurrent_in_nnx(kind):
    torch_class, cell_class, port = NNX_CELLS[kind]
    layer = torch_class(IN, HIDDEN, 2, batch_first=True, bidirectional=True)
    weights = weights_of(layer)

    def run(x, number, reverse):
        rngs = nnx.Rngs(0)
        cell = cell_class(x.shape[-1], HIDDEN, rngs=rngs)
        cell = torch_layers.both_biases(cell)
        loaded(cell, port(weights, "", number, reverse))
        return nnx.RNN(cell, reverse=reverse, keep_order=True, rngs=rngs)(x)

    x = random(BATCH, TIME, IN)
    close(in_both_directions(run, x), in_torch(layer, x))


@pytest.mark.parametrize("kind", CELLS)
def test_recurrent_without_biases(kind):
    torch_class, cell_class, port = CELLS[kind]
    layer = torch_class(IN, HIDDEN, bias=False, batch_first=True)
    cell = port(weights_of(layer), "")
    assert all(gate.keys() == {"kernel"} for gate in cell.values())
    x = random(BATCH, TIME, IN)
    tree = {"cell": torch_layers.one_bias(cell)}
    close(applied(linen.RNN(cell_class(HIDDEN)), tree, x), in_torch(layer, x))
    assert all(gate.keys() == {"kernel"} for gate in cell.values())


def test_both_biases_keep_the_cell():
    cell = nnx.GRUCell(IN, HIDDEN, rngs=nnx.Rngs(0))
    cell.dense_h.param_dtype = jnp.bfloat16
    kernel = np.asarray(cell.dense_h.kernel[...])
    assert torch_layers.both_biases(cell) is cell
    np.testing.assert_array_equal(cell.dense_h.kernel[...], kernel)
    assert cell.dense_h.bias[...].dtype == jnp.bfloat16
    rnn = nnx.RNN(cell, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="`cell` must have linear layers, got a RNN"):
        torch_layers.both_biases(rnn)


def test_another_recurrent_class_is_refused():
    gru = {f"a.{k}": w for k, w in weights_of(torch.nn.GRU(4, 8)).items()}
    with pytest.raises(ValueError, match=r"a\.weight_hh_l0 must be of torch's lstm"):
        torch_layers.lstm(gru, "a")
    lstm = weights_of(torch.nn.LSTM(4, 6))
    with pytest.raises(ValueError, match="weight_hh_l0 must be of torch's gru, got"):
        torch_layers.gru(lstm, "")
    two_gates = {"weight_hh_l0": np.ones((12, 6))}
    with pytest.raises(ValueError, match="must be of torch's gru or lstm or rnn, got"):
        torch_layers.nnx_fused(two_gates, "")


def test_a_projection_is_refused():
    layer = torch.nn.LSTM(IN, HIDDEN, proj_size=2)
    weights = {f"a.{k}": w for k, w in weights_of(layer).items()}
    for port in (torch_layers.lstm, torch_layers.nnx_lstm, torch_layers.nnx_fused):
        with pytest.raises(ValueError, match="must be without proj_size"):
            port(weights, "a")


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_both_biases_train_as_in_torch(kind):
    """Carried, trained and carried back, a recurrent layer equals one that stayed."""
    torch_class, cell_class, port_cell = CELLS[kind]
    x, target = random(BATCH, TIME, IN), random(BATCH, TIME, HIDDEN) / 4

    def stepped(layer, optimizer, steps):
        for _ in range(steps):
            output, _ = layer(torch.from_numpy(x))
            optimizer.zero_grad()
            ((output - torch.from_numpy(target)) ** 2).mean().backward()
            optimizer.step()

    def start():
        torch.manual_seed(0)
        layer = torch_class(IN, HIDDEN, batch_first=True)
        options = {"lr": 1e-2, "alpha": 0.9, "eps": 1e-3, "momentum": 0.5}
        optimizer = torch.optim.RMSprop(layer.parameters(), **options)
        stepped(layer, optimizer, 5)
        return layer, optimizer

    def port(weights):
        return port_cell(weights, "")

    stayed, optimizer = start()
    before = [p.detach().clone() for p in stayed.parameters()]
    stepped(stayed, optimizer, 10)

    layer, optimizer = start()
    params, tx, state = from_torch(layer, optimizer, port)
    module = linen.RNN(cell_class(HIDDEN))

    @jax.jit
    def step(params, state):
        def loss(params):
            tree = {"cell": torch_layers.one_bias(params)}
            return jnp.mean((module.apply({"params": tree}, x) - target) ** 2)

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(10):
        params, state = step(params, state)
    to_torch(params, state, layer, optimizer, port)
    for ours, theirs, old in zip(
        layer.parameters(), stayed.parameters(), before, strict=True
    ):
        assert (theirs - old).abs().max() > 0.02
        close(ours.detach(), theirs.detach())


LONG = "layer" * 200
ABOUT_LONG = {
    "`groups` must be torch's": lambda: torch_layers.conv_transpose(
        {f"{LONG}.weight": np.ones((4, 2, 3)), f"{LONG}.bias": np.ones(4)}, LONG
    ),
    "must be of torch's lstm": lambda: torch_layers.lstm(
        {f"{LONG}.weight_hh_l0": np.ones((3, 1))}, LONG
    ),
    "`heads` must be torch's": lambda: torch_layers.attention(
        {f"{LONG}.{k}": np.ones((9, 3)) for k in ("in_proj_weight", "out_proj.weight")},
        LONG,
        2,
    ),
    "must be without add_bias_kv": lambda: torch_layers.attention(
        {f"{LONG}.bias_k": np.ones(1)}, LONG, 1
    ),
    "must be without proj_size": lambda: torch_layers.lstm(
        {f"{LONG}.weight_hr_l0": np.ones((3, 1))}, LONG
    ),
    "`cell` must have linear layers": lambda: torch_layers.both_biases(
        type(LONG, (), {})()
    ),
}


@pytest.mark.parametrize(("text", "call"), ABOUT_LONG.items(), ids=ABOUT_LONG)
def test_errors_are_short(text, call):
    with pytest.raises((TypeError, ValueError), match=text) as raised:
        call()
    assert len(str(raised.value)) < 600
