"""Whole models of torch in the names of a Flax model, with torch's numbers."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("torch")
pytest.importorskip("flax")
import torch
from flax import linen, nnx
from torch import nn

from helpers import random
from optax_rmsprop.carry import from_torch, port_of, to_torch, torch_layers
from optax_rmsprop.carry._port_of._like import _paired, _words

TOLERANCE = 1e-10  # of outputs of size 1, in float64; observed: 2e-14
BATCH, TIME, SIZE, HEADS, TOKENS = 3, 4, 8, 2, 7

# Flax makes float32 at first.
pytestmark = pytest.mark.usefixtures("x64", "standard_promotion", "same_weights")


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


def shapes(tree):
    return jax.tree.map(jnp.shape, tree)


def init(module, *inputs):
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)


def goes_on(model, like, x, apply, to_flax=lambda x: x):
    """Check outputs, a step, and the way back of a model in both frameworks.

    `apply` calls the Flax model with the port's tree. Returns that tree.
    """
    model = model.double().eval()
    for name, buffer in model.named_buffers():
        if "running" in name:
            nn.init.uniform_(buffer, 0.5, 2)
    optimizer = torch.optim.RMSprop(model.parameters(), 1e-2, 0.9, 1e-3, momentum=0.9)

    def step_in_torch():
        optimizer.zero_grad()
        (model(torch.from_numpy(x)) ** 2).mean().backward()
        optimizer.step()

    step_in_torch()
    step_in_torch()
    port = port_of(model, like=like)
    params, tx, state = from_torch(model, optimizer, port)

    @jax.jit
    def step(params, state):
        def loss(params):
            output = apply(params, to_flax(x))
            return jnp.mean(output**2), output

        grads, output = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, output

    stepped, state, output = step(params, state)
    with torch.no_grad():
        close(output, model(torch.from_numpy(x)))
    step_in_torch()
    expected = from_torch(model, optimizer, port)
    jax.tree.map(close, stepped, expected.params)
    moved = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), params, stepped)
    assert max(jax.tree.leaves(moved)) > 1e-3
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    to_torch(stepped, state, model, optimizer, port)
    again = from_torch(model, optimizer, port)
    jax.tree.map(close, again.params, expected.params)
    jax.tree.map(close, again.opt_state, expected.opt_state)
    return params


class Block(nn.Module):
    def __init__(self, n_in, n_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.downsample = None
        if stride > 1:
            conv = nn.Conv2d(n_in, n_out, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(n_out))

    def forward(self, x):
        y = self.bn2(self.conv2(torch.tanh(self.bn1(self.conv1(x)))))
        return torch.tanh(y + (self.downsample(x) if self.downsample else x))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(Block(4, 4, 1), Block(4, 4, 1))
        self.layer2 = nn.Sequential(Block(4, 8, 2), Block(8, 8, 1))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.tanh(self.bn1(self.conv1(x)))
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


def flax_norm(name=None):
    return linen.BatchNorm(use_running_average=True, epsilon=1e-5, name=name)


class ResNetBlock(linen.Module):
    n_out: int
    stride: int

    @linen.compact
    def __call__(self, x):
        y = linen.Conv(
            self.n_out, (3, 3), (self.stride,) * 2, padding=1, use_bias=False
        )(x)
        y = jnp.tanh(flax_norm()(y))
        y = linen.Conv(self.n_out, (3, 3), padding=1, use_bias=False)(y)
        y = flax_norm()(y)
        if self.stride > 1:
            x = linen.Conv(
                self.n_out, (1, 1), (self.stride,) * 2, use_bias=False, name="conv_proj"
            )(x)
            x = flax_norm("norm_proj")(x)
        return jnp.tanh(x + y)


class FlaxResNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Conv(4, (3, 3), padding=1, use_bias=False, name="conv_init")(x)
        x = jnp.tanh(flax_norm("bn_init")(x))
        for n_out, stride in [(4, 1), (4, 1), (8, 2), (8, 1)]:
            x = ResNetBlock(n_out, stride)(x)
        return linen.Dense(5)(x.mean((1, 2)))


@pytest.mark.slow
def test_a_resnet():
    x = random(BATCH, 3, 6, 6)
    model, module = ResNet(), FlaxResNet()
    like = init(module, np.moveaxis(x, 1, -1))
    params = goes_on(model, like, x, module.apply, lambda x: np.moveaxis(x, 1, -1))
    assert shapes(params) == shapes(like)
    ours = params["batch_stats"]["ResNetBlock_2"]["norm_proj"]["var"]
    close(ours, model.layer2[0].downsample[1].running_var)
    # Without collections, and so without running statistics.
    port = port_of(model, like=like["params"])
    run = from_torch(model, torch.optim.RMSprop(model.parameters()), port)
    assert shapes(run.params) == shapes(like["params"])


class GPTBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(SIZE), nn.LayerNorm(SIZE)
        self.qkv, self.out = nn.Linear(SIZE, 3 * SIZE), nn.Linear(SIZE, SIZE)
        self.mlp = nn.Sequential(
            nn.Linear(SIZE, 4 * SIZE), nn.Tanh(), nn.Linear(4 * SIZE, SIZE)
        )

    def forward(self, x):
        q, k, v = self.qkv(self.ln_1(x)).chunk(3, -1)
        weights = q @ k.mT + torch.full((TIME, TIME), -torch.inf).triu(1)
        x = x + self.out(weights.softmax(-1) @ v)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(TOKENS, SIZE), nn.Embedding(TIME, SIZE)
        self.h = nn.ModuleList([GPTBlock(), GPTBlock()])
        self.ln_f = nn.LayerNorm(SIZE)
        self.lm_head = nn.Linear(SIZE, TOKENS, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, x):
        x = self.wte(x) + self.wpe.weight
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        def norm():
            return nnx.LayerNorm(SIZE, epsilon=1e-5, use_fast_variance=False, rngs=rngs)

        self.norm_0, self.norm_1 = norm(), norm()
        self.qkv = nnx.Linear(SIZE, 3 * SIZE, rngs=rngs)
        self.out = nnx.Linear(SIZE, SIZE, rngs=rngs)
        self.up = nnx.Linear(SIZE, 4 * SIZE, rngs=rngs)
        self.down = nnx.Linear(4 * SIZE, SIZE, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)

    def __call__(self, x):
        q, k, v = jnp.split(self.qkv(self.norm_0(x)), 3, -1)
        weights = q @ k.mT + jnp.triu(jnp.full((TIME, TIME), -jnp.inf), 1)[None]
        x = x + self.out(jax.nn.softmax(weights) @ v)
        return x + self.dropout(self.down(jnp.tanh(self.up(self.norm_1(x)))))


class NNXGPT(nnx.Module):
    def __init__(self, rngs):
        self.tokens = nnx.Embed(TOKENS, SIZE, dtype=float, rngs=rngs)
        self.positions = nnx.Embed(TIME, SIZE, dtype=float, rngs=rngs)
        self.block_0, self.block_1 = NNXBlock(rngs), NNXBlock(rngs)
        self.last_norm = nnx.LayerNorm(
            SIZE, epsilon=1e-5, use_fast_variance=False, rngs=rngs
        )

    def __call__(self, x):
        x = self.tokens(x) + self.positions.embedding[...][None]
        x = self.block_1(self.block_0(x))
        return self.tokens.attend(self.last_norm(x))


@pytest.mark.slow
def test_a_gpt_with_a_tied_head():
    module = NNXGPT(nnx.Rngs(0))
    graph, state, rest = nnx.split(module, nnx.Param, ...)

    def apply(params, x):
        return nnx.merge(graph, params, rest)(x)

    x = np.random.default_rng(0).integers(0, TOKENS, (BATCH, TIME))
    params = goes_on(GPT(), state, x, apply)
    assert jax.tree.structure(params) == jax.tree.structure(state)
    nnx.update(module, params)
    close(module(x), apply(params, x))


def test_like_is_a_module_a_state_or_a_pure_dict():
    module, model = NNXGPT(nnx.Rngs(0)), GPT()
    state = nnx.state(module, nnx.Param)
    weights = {name: w.numpy() for name, w in model.state_dict().items()}
    made = {
        kind: port_of(model, like=like)(weights)
        for kind, like in {
            "module": module,
            "state": state,
            "pure": nnx.to_pure_dict(state),
        }.items()
    }
    for kind in ("module", "state"):
        assert jax.tree.structure(made[kind]) == jax.tree.structure(state)
    trees = nnx.to_pure_dict(made["state"]), made["pure"]
    for one, other in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_array_equal(one, other)


class ViTBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(SIZE), nn.LayerNorm(SIZE)
        self.attn = nn.MultiheadAttention(SIZE, HEADS, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(SIZE, 2 * SIZE), nn.Tanh(), nn.Linear(2 * SIZE, SIZE)
        )

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, SIZE))
        self.pos_embed = nn.Parameter(torch.randn(1, 5, SIZE))
        self.patch_embed = nn.Conv2d(3, SIZE, 2, 2)
        self.blocks = nn.Sequential(ViTBlock(), ViTBlock())
        self.norm = nn.LayerNorm(SIZE)
        self.head = nn.Linear(SIZE, 5)

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), 1, SIZE), x], 1)
        return self.head(self.norm(self.blocks(x + self.pos_embed))[:, 0])


class EncoderBlock(linen.Module):
    @linen.compact
    def __call__(self, x):
        y = linen.LayerNorm(epsilon=1e-5, use_fast_variance=False)(x)
        x = x + linen.MultiHeadDotProductAttention(HEADS)(y)
        y = linen.LayerNorm(epsilon=1e-5, use_fast_variance=False)(x)
        return x + linen.Dense(SIZE)(jnp.tanh(linen.Dense(2 * SIZE)(y)))


class FlaxViT(linen.Module):
    @linen.compact
    def __call__(self, x):
        token = self.param("cls_token", linen.initializers.zeros, (1, 1, SIZE))
        positions = self.param("PosEmbed", linen.initializers.zeros, (1, 5, SIZE))
        x = linen.Conv(SIZE, (2, 2), (2, 2))(x).reshape(len(x), -1, SIZE)
        x = jnp.concatenate([jnp.tile(token, (len(x), 1, 1)), x], 1)
        x = x + jnp.tile(positions, (len(x), 1, 1))
        for _ in range(2):
            x = EncoderBlock()(x)
        x = linen.LayerNorm(epsilon=1e-5, use_fast_variance=False)(x)
        return linen.Dense(5)(x[:, 0])


def test_a_vision_transformer():
    x = random(BATCH, 3, 4, 4)
    module = FlaxViT()
    like = init(module, np.moveaxis(x, 1, -1))
    goes_on(ViT(), like, x, module.apply, lambda x: np.moveaxis(x, 1, -1))


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, SIZE)
        self.lstm = nn.LSTM(SIZE, 5, batch_first=True, bidirectional=True)
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        return self.head(self.lstm(self.embedding(x))[0])


class FlaxTagger(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Embed(TOKENS, SIZE, param_dtype=float)(x)
        directions = [
            linen.RNN(linen.OptimizedLSTMCell(5, param_dtype=float, name=name))
            for name in ("l0", "l0_reverse")
        ]
        return linen.Dense(3)(linen.Bidirectional(*directions)(x))


def test_a_bidirectional_tagger_in_linen():
    module = FlaxTagger()
    x = np.random.default_rng(0).integers(0, TOKENS, (BATCH, TIME))
    like = init(module, x)

    def apply(tree, x):
        params = {
            name: torch_layers.one_bias(layer) if name.startswith("l0") else layer
            for name, layer in tree["params"].items()
        }
        return module.apply({"params": params}, x)

    params = goes_on(Tagger(), like, x, apply)
    assert params["params"].keys() == like["params"].keys()


class NNXTagger(nnx.Module):
    def __init__(self, rngs, bias=True):
        def direction():
            cell = nnx.OptimizedLSTMCell(SIZE, 5, param_dtype=float, rngs=rngs)
            return nnx.RNN(torch_layers.both_biases(cell) if bias else cell, rngs=rngs)

        self.embedding = nnx.Embed(TOKENS, SIZE, dtype=float, rngs=rngs)
        self.lstm = nnx.Bidirectional(direction(), direction(), rngs=rngs)
        self.head = nnx.Linear(10, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.lstm(self.embedding(x)))


@pytest.mark.slow
def test_a_bidirectional_tagger_in_nnx():
    module = NNXTagger(nnx.Rngs(0))
    x = np.random.default_rng(0).integers(0, TOKENS, (BATCH, TIME))
    graph, _, rest = nnx.split(module, nnx.Param, ...)

    def apply(params, x):
        own = jax.tree.map(lambda leaf: leaf, rest)  # the keys are advanced
        return nnx.merge(graph, params, own)(x)

    goes_on(Tagger(), module, x, apply)
    with pytest.raises(ValueError, match=r"lstm\.l0 .*, lstm\.l0_reverse"):
        port_of(Tagger(), like=NNXTagger(nnx.Rngs(0), bias=False))


def names(text):
    return [_words(name.replace("/", ".")) for name in text.split()]


# The names of layers of equal shapes in torch, and in Flax in the order of torch's.
PAIRED = [
    ("a", "Other_7"),
    ("layers.0 layers.2 layers.4", "layers_0 layers_1 layers_2"),
    ("fc9 fc10", "Dense_0/x Dense_1/x"),
    ("b.0.q b.0.k b.1.q b.1.k", "h_0/q h_0/k h_1/q h_1/k"),
    ("b.0.0 b.0.2 b.1.1 b.1.3", "b_0/c_0 b_0/c_1 b_1/c_0 b_1/c_1"),
    ("norm b.0.norm b.1.norm", "LayerNorm_0 Block_0/LayerNorm_0 Block_1/LayerNorm_0"),
    ("x.q x.k", "model/y/q model/y/k"),
    ("stem.conv block1.conv", "stem_conv block1_conv"),
    ("lstm.l0 lstm.l0_reverse", "forward_rnn/cell backward_rnn/cell"),
]
# Those between which the names do not decide.
AMBIGUOUS = [
    ("a", "b c"),
    ("a b", "c d"),
    ("a.bc ab.c", "a_bc ab_c"),
    ("q k v", "query key value"),
    ("b.0.x b.1.x c", "b_0/x b_1/x b_2/x"),
    ("b.0.x b.0.y b.1.x", "b_0/x b_1/x b_1/y"),
    ("a.1 a_1", "b_0 b_1"),
    ("stem mid.0 mid.1", "Dense_0 Dense_1 out"),
    ("a.0 a.1 b.0 b.1 b.2", "p_0 p_1 q_0 q_1 q_2"),
]


@pytest.mark.parametrize(("ours", "theirs"), PAIRED)
def test_names_decide(ours, theirs):
    theirs = names(theirs)
    order = np.random.default_rng(0).permutation(len(theirs))
    pairs = _paired(names(ours), [theirs[i] for i in order])
    assert sorted((i, order[j]) for i, j in pairs) == [
        (i, i) for i in range(len(order))
    ]


@pytest.mark.parametrize(("ours", "theirs"), AMBIGUOUS)
def test_names_do_not_decide(ours, theirs):
    assert _paired(names(ours), names(theirs)) == []


def test_numbers_in_another_order_do_not_decide():
    branch = nn.ModuleDict({f"conv{i}": nn.Linear(3, 5) for i in range(2)})
    model = nn.ModuleDict({"branch0": branch, "branch1": copy.deepcopy(branch)})
    crossed = {f"conv{i}_branch{j}": DENSE for i in range(2) for j in range(2)}
    with pytest.raises(ValueError, match=r"branch0\.conv0 .* and conv0_branch0"):
        port_of(model, like=crossed)
    same = {f"branch{j}_conv{i}": DENSE for i in range(2) for j in range(2)}
    assert port_of(model, like=same)
    heads = nn.ModuleDict({"layers": nn.Sequential(nn.Linear(3, 5), nn.Linear(3, 5))})
    model = nn.ModuleDict({"heads": nn.Sequential(heads, copy.deepcopy(heads))})
    two = {"0": DENSE, "1": DENSE}
    crossed = {"layers": {n: {"heads": two} for n in "01"}}
    with pytest.raises(ValueError, match=r"heads\.0\.layers\.0 .* layers/0/heads/0"):
        port_of(model, like=crossed)
    assert port_of(model, like={"heads": {n: {"layers": two} for n in "01"}})


def linear(bias=True):
    return nn.ModuleDict({"fc": nn.Linear(3, 5, bias=bias)})


DENSE = {"kernel": np.ones((3, 5)), "bias": np.ones(5)}
KERNEL = {"kernel": np.ones((3, 5))}
TURNED = {"kernel": np.ones((5, 3)), "bias": np.ones(5)}
BESIDE = nn.ModuleDict({"fc": nn.Linear(3, 5, bias=False)})
BESIDE.gain = nn.Parameter(torch.ones(5))
UNFIT = [
    (
        linear(),
        {"a": KERNEL},
        ValueError,
        r"are fc \(kernel .* and a \(kernel \(3, 5\)",
    ),
    (linear(False), {"a": DENSE}, ValueError, r"are fc .* and a \(bias .*, kernel"),
    (
        linear(),
        {"a": DENSE, "b": {"c": np.ones(2)}},
        ValueError,
        r"are none of .* b \(c",
    ),
    (linear(), {"a": TURNED}, ValueError, r"kernel \(3, 5\).* kernel \(5, 3\)"),
    (linear(), {"a": DENSE, "b": DENSE}, ValueError, r"are fc .* and a \(.*, b \(bias"),
    # A parameter beside layers is none of a layer's leaves.
    (BESIDE, {"a": DENSE}, ValueError, r"gain \(\(5,\)\), fc .* and a \(bias"),
    (BESIDE, {"a": KERNEL, "shift": np.ones(5)}, ValueError, "gain .* root .shift"),
    (linear(), {"a": {"kernel": "text"}}, TypeError, r"a str at \['a'\]\['kernel'\]"),
    (linear(), {"long" * 200: DENSE, "b": DENSE}, ValueError, "are fc"),
    (
        nn.ModuleDict({"long" * 200 + str(i): nn.Linear(3, 4) for i in range(9)}),
        {"a": DENSE},
        ValueError,
        "and 8 more of the model",
    ),
]


@pytest.mark.parametrize(("model", "like", "error", "says"), UNFIT)
def test_what_does_not_fit_is_listed(model, like, error, says):
    with pytest.raises(error, match=says) as raised:
        port_of(model, like=like)
    assert len(str(raised.value)) < 600


def test_a_parameter_beside_layers_keeps_its_name():
    like = {"a": KERNEL, "Gain": np.ones(5)}
    tree = port_of(BESIDE, like=like)(
        {"fc.weight": np.zeros((5, 3)), "gain": np.arange(5)}
    )
    assert shapes(tree) == shapes(like)
    np.testing.assert_array_equal(tree["Gain"], np.arange(5))
