"""Train a recurrent network to write Python's documentation, letter by letter.

    pip install -e ".[examples]"
    python examples/char_model.py

learns from the topics of `help()`, prints what it writes, and ends with a line like

    held-out loss 2.03 bits a character (xz, knowing the training text: 1.79)

The recipe is char-rnn's (karpathy/char-rnn, train.lua): learning rate 2e-3, decay 0.95,
128 units, 50 sequences of 50 characters, over which the loss is summed, and the hidden
state carried on. Gradients are clipped at 5 as there, but by their norm.
"""

import lzma
from pathlib import Path
from pydoc_data.topics import topics

import _common
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from optax_rmsprop import diagnose, rmsprop

RATE, DECAY, EPS, CLIP = 2e-3, 0.95, 1e-8, 5.0
TX = optax.chain(optax.clip_by_global_norm(CLIP), rmsprop(RATE, DECAY, EPS))
UNITS, SEQUENCES, LENGTH, LOOK_EVERY = 128, 50, 50, 20
Pair = tuple[jax.Array, jax.Array]
LAYERS = {"embed": "embedding", "cell": "GRU", "head": "output"}


def texts() -> tuple[str, str]:
    """The text to train on and the one that is held out. No paragraph is in both."""
    paragraphs = "\n\n".join(topics.values()).split("\n\n")
    # Many topics repeat others, some with another indentation.
    distinct = {" ".join(p.split()): p for p in paragraphs}
    text = "\n\n".join(distinct.values())
    cut = text.index("\n\n", len(text) * 9 // 10)
    return text[:cut], text[cut:]


class Writer(nnx.Module):
    def __init__(self, characters: int, rngs: nnx.Rngs):
        self.embed = nnx.Embed(characters, UNITS, rngs=rngs)
        self.cell = nnx.GRUCell(UNITS, UNITS, rngs=rngs)
        self.head = nnx.Linear(UNITS, characters, rngs=rngs)

    def __call__(self, hidden: jax.Array, text: jax.Array) -> Pair:
        """The last hidden state, and logits of what follows each character in time."""
        hidden, outputs = jax.lax.scan(self.cell, hidden, self.embed(text.T))
        return hidden, self.head(outputs)


@nnx.jit
def loss_of(model: Writer, hidden: jax.Array, text: jax.Array) -> Pair:
    """Nats of a sequence, and the last hidden state."""
    hidden, logits = model(hidden, text[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:].T)
    return losses.sum(0).mean(), hidden


@nnx.jit
def train_step(
    model: Writer, optimizer: nnx.Optimizer, hidden: jax.Array, text: jax.Array
) -> Pair:
    gradient = nnx.value_and_grad(loss_of, has_aux=True)
    (loss, hidden), grads = gradient(model, hidden, text)
    optimizer.update(model, grads)
    return loss, hidden


@nnx.jit
def step_sizes(optimizer: nnx.Optimizer) -> jax.Array:
    """The median of each layer's effective step sizes."""
    sizes = diagnose(optimizer.opt_state, RATE, EPS).step_size
    layers = (jax.tree.leaves(sizes[name]) for name in LAYERS)
    flat = (jnp.concatenate([leaf.ravel() for leaf in layer]) for layer in layers)
    return jnp.stack([*map(jnp.median, flat)])


@nnx.jit
def write(model: Writer, begin: jax.Array, key: jax.Array) -> jax.Array:
    def one(last: Pair, key: jax.Array) -> tuple[Pair, jax.Array]:
        hidden, logits = model(*last)
        letter = jax.random.categorical(key, logits[0])
        return (hidden, letter[:, None]), letter[0]

    first = jnp.zeros((1, UNITS)), begin
    return jax.lax.scan(one, first, jax.random.split(key, 300))[1]


def train(
    model: Writer, text: np.ndarray, held_out: np.ndarray, steps: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Losses in bits a character, [step, held-out loss] now and then, step sizes."""
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    start, in_epoch = jnp.zeros((SEQUENCES, UNITS)), (text.shape[1] - 1) // LENGTH
    losses, looks, sizes, hidden = [], [], [], start
    for step in range(steps):
        at = step % in_epoch * LENGTH
        batch = text[:, at : at + LENGTH + 1]
        loss, hidden = train_step(model, optimizer, hidden if at else start, batch)
        losses.append(float(loss) / LENGTH / np.log(2))
        if (step + 1) % LOOK_EVERY == 0 or step + 1 == steps:
            loss, _ = loss_of(model, start, held_out)
            bits = float(loss) / (held_out.shape[1] - 1) / np.log(2)
            looks.append((step + 1, bits))
            sizes.append(step_sizes(optimizer))
            print(f"step {step + 1}: {bits:.3f} bits a character", flush=True)
    return np.array(losses), np.array(looks), np.array(sizes)


def draw(losses: np.ndarray, looks: np.ndarray, sizes: np.ndarray, path: Path) -> None:
    figure = _common.new_figure(3.8)
    left, right = figure.subplots(1, 2)
    left.plot(1 + np.arange(len(losses)), losses, "C5", lw=0.8, label="training")
    left.plot(*looks.T, "C0.-", label="held out")
    left.set(title="loss", xlabel="step", ylabel="bits a character")
    right.semilogy(looks[:, 0], sizes, label=list(LAYERS.values()))
    right.set(title="step / gradient: median", xlabel="step")
    left.legend()
    right.legend()
    _common.save_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
    options = _common.parse_options(__doc__, argv, steps=(800, "of 2500 characters"))
    parts = texts()
    letters = sorted(set("".join(parts)))
    number = {letter: n for n, letter in enumerate(letters)}
    ids = [np.array([number[x] for x in part], np.int32) for part in parts]
    rows = [x[: len(x) // SEQUENCES * SEQUENCES].reshape(SEQUENCES, -1) for x in ids]
    model = Writer(len(letters), nnx.Rngs(0))
    curves = train(model, *rows, options.steps)
    written = write(model, jnp.full((1, 1), number["\n"]), jax.random.key(0))
    print("".join(letters[n] for n in np.asarray(written)))
    packed = [len(lzma.compress(x.encode())) for x in (parts[0], "".join(parts))]
    xz = 8 * (packed[1] - packed[0]) / len(parts[1])
    text = f"held-out loss {curves[1][-1, 1]:.2f} bits a character"
    print(f"{text} (xz, knowing the training text: {xz:.2f})")
    if options.output:
        draw(*curves, options.output)


if __name__ == "__main__":
    main()
