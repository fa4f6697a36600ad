"""The character model: what is held out, its loss, the step sizes that it draws."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

nnx = pytest.importorskip("flax.nnx")


@pytest.fixture(scope="module")
def example(import_example):
    return import_example("char_model")


def paragraphs_of(text):
    return {" ".join(p.split()) for p in text.split("\n\n")} - {""}


def test_nothing_held_out_is_trained_on(example):
    text, held_out = example.texts()
    assert len(held_out) == pytest.approx(0.1 * len(text + held_out), rel=0.1)
    assert not paragraphs_of(text) & paragraphs_of(held_out)
    everything = "\n\n".join(example.topics.values())
    assert paragraphs_of(everything) == paragraphs_of(text) | paragraphs_of(held_out)
    # Without care the held-out topics would be known in good part.
    cut = everything.index("\n\n", len(everything) * 9 // 10)
    known = paragraphs_of(everything[:cut]) & paragraphs_of(everything[cut:])
    assert len(known) > 20


@pytest.mark.slow
def test_losses_are_those_of_the_next_character(example):
    model = example.Writer(7, nnx.Rngs(0))
    text = np.random.default_rng(0).integers(7, size=(3, 6)).astype(np.int32)
    hidden = jnp.zeros((3, example.UNITS))
    loss, last = example.loss_of(model, hidden, text)
    expected = 0.0
    for row in text:
        h = hidden[:1]
        for letter, following in itertools.pairwise(row):
            h, _ = model.cell(h, model.embed(jnp.array([letter])))
            expected -= jax.nn.log_softmax(model.head(h))[0, following]
    assert float(loss) == pytest.approx(float(expected) / 3, rel=1e-5)
    # The state goes on: two halves are the whole, and without it they are not.
    first, middle = example.loss_of(model, hidden, text[:, :4])
    second, end = example.loss_of(model, middle, text[:, 3:])
    afresh, _ = example.loss_of(model, hidden, text[:, 3:])
    assert float(first + second) == pytest.approx(float(loss), rel=1e-5)
    assert float(first + afresh) != pytest.approx(float(loss), rel=1e-3)
    np.testing.assert_allclose(end, last, atol=1e-6)


@pytest.mark.slow
def test_step_sizes_are_those_of_the_optimizer(example):
    """A gradient's step is its step size times the gradient."""
    model = example.Writer(7, nnx.Rngs(0))
    tx = example.TX
    params = nnx.state(model, nnx.Param)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = jax.tree.map(jnp.copy, params)
    text = np.random.default_rng(0).integers(7, size=(3, 6)).astype(np.int32)
    hidden = jnp.zeros((3, example.UNITS))
    gradient = nnx.grad(lambda model: example.loss_of(model, hidden, text)[0])(model)
    norm = math.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(gradient)))
    example.train_step(model, optimizer, hidden, text)
    shown = example.step_sizes(optimizer)
    assert shown.shape == (3,)
    after = nnx.state(model, nnx.Param)
    for layer, median in zip(example.LAYERS, shown, strict=True):
        flat = [
            np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree[layer])])
            for tree in (before, after, gradient)
        ]
        clipped = flat[2] * min(1, example.CLIP / norm)
        moved = np.abs(clipped) > 1e-6
        sizes = (flat[0] - flat[1])[moved] / clipped[moved]
        expected = example.RATE / (np.sqrt(0.05) * np.abs(clipped) + example.EPS)
        np.testing.assert_allclose(sizes, expected[moved], rtol=1e-3)
        np.testing.assert_allclose(median, np.median(expected), rtol=1e-3)
