"""Train a recurrent network to write Python's documentation, letter by letter.

    pip install -e ".[examples]"
    python examples/char_model.py

learns from the topics of `help()`, prints how it writes, and ends with a line like

    held-out loss 2.03 bits a character (xz, knowing the training text: 1.79), figure in
    [...]/char_model.png

The recipe is char-rnn's (karpathy/char-rnn, train.lua): learning rate 2e-3, decay 0.95,
128 units, 50 sequences of 50 characters, over which the loss is summed, and the hidden
state carried on. Gradients are clipped at 5 as there, but by their norm.
"""

import lzma
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits import new_figure, parse
from flax import nnx

from optax_rmsprop import diagnose, rmsprop

RATE, DECAY, EPS, CLIP = 2e-3, 0.95, 1e-8, 5.0
TX = optax.chain(optax.clip_by_global_norm(CLIP), rmsprop(RATE, DECAY, EPS))
UNITS, SEQUENCES, LENGTH, LOOK_EVERY = 128, 50, 50, 20
STEPS = 800
LAYERS = {"embed": "embedding", "cell": "GRU", "head": "output"}
PROMISED_BITS = 2.3


def texts() -> tuple[str, str]:
    """What to train on, and what is held out. No paragraph is in both."""
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

    def __call__(self, hidden: jax.Array, text: jax.Array):
        """The last hidden state, and logits of what follows each character in time."""
        hidden, outputs = jax.lax.scan(self.cell, hidden, self.embed(text.T))
        return hidden, self.head(outputs)


def loss_of(model: Writer, hidden: jax.Array, text: jax.Array):
    """Nats of a sequence, and the last hidden state."""
    hidden, logits = model(hidden, text[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:].T)
    return losses.sum(0).mean(), hidden


evaluate = nnx.jit(loss_of)


def bits(nats: jax.Array, length: int) -> float:
    """Of a character, given the loss of a sequence."""
    return float(nats) / length / np.log(2)


@nnx.jit
def train_step(
    model: Writer, optimizer: nnx.Optimizer, hidden: jax.Array, text: jax.Array
) -> tuple[jax.Array, jax.Array]:
    gradient = nnx.value_and_grad(loss_of, has_aux=True)
    (loss, hidden), grads = gradient(model, hidden, text)
    optimizer.update(model, grads)
    return loss, hidden


@nnx.jit
def step_sizes(optimizer: nnx.Optimizer) -> jax.Array:
    """The first, fifth and ninth decile of each layer's effective step sizes."""
    sizes = diagnose(optimizer.opt_state, RATE, EPS).step_size
    layers = (jax.tree.leaves(sizes[name]) for name in LAYERS)
    flat = (jnp.concatenate([leaf.ravel() for leaf in layer]) for layer in layers)
    return jnp.stack([jnp.quantile(f, jnp.array([0.1, 0.5, 0.9])) for f in flat])


@partial(nnx.jit, static_argnames="length")
def write(model: Writer, begin: jax.Array, key: jax.Array, length: int) -> jax.Array:
    def one(carry: tuple[jax.Array, jax.Array], key: jax.Array):
        hidden, logits = model(*carry)
        letter = jax.random.categorical(key, logits[0])
        return (hidden, letter[:, None]), letter[0]

    carry = jnp.zeros((1, UNITS)), begin
    return jax.lax.scan(one, carry, jax.random.split(key, length))[1]


def in_rows(text: np.ndarray) -> np.ndarray:
    return text[: len(text) // SEQUENCES * SEQUENCES].reshape(SEQUENCES, -1)


def train(model: Writer, text: np.ndarray, held_out: np.ndarray, steps: int):
    """Losses in bits a character, [step, held-out loss] now and then, step sizes."""
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    start, in_epoch = jnp.zeros((SEQUENCES, UNITS)), (text.shape[1] - 1) // LENGTH
    losses, looks, sizes, hidden = [], [], [], start
    for step in range(steps):
        at = step % in_epoch * LENGTH
        batch = text[:, at : at + LENGTH + 1]
        loss, hidden = train_step(model, optimizer, hidden if at else start, batch)
        losses.append(bits(loss, LENGTH))
        if (step + 1) % LOOK_EVERY == 0 or step + 1 == steps:
            loss, _ = evaluate(model, start, held_out)
            looks.append((step + 1, bits(loss, held_out.shape[1] - 1)))
            sizes.append(step_sizes(optimizer))
            print("step {}: {:.3f} bits a character, held out".format(*looks[-1]))
    return np.array(losses), np.array(looks), np.array(sizes)


def draw(losses: np.ndarray, looks: np.ndarray, sizes: np.ndarray, path: Path) -> None:
    figure = new_figure(3.8)
    left, *panels = figure.subplots(1, 4, width_ratios=(2.2, 1, 1, 1))
    left.plot(1 + np.arange(len(losses)), losses, "C5", lw=0.8, label="training")
    left.plot(*looks.T, "C0.-", label="held out")
    left.set(title="loss", xlabel="step", ylabel="bits a character")
    left.legend()
    for number, (axes, name) in enumerate(zip(panels, LAYERS.values(), strict=True)):
        low, median, high = sizes[:, number].T
        axes.fill_between(looks[:, 0], low, high, color="C0", alpha=0.25, lw=0)
        axes.plot(looks[:, 0], median, "C0")
        axes.set(title=name, xlabel="step", yscale="log")
        axes.set_ylim(sizes.min() / 2, sizes.max() * 2)
        axes.tick_params(labelleft=number == 0)
    panels[0].set_ylabel("step / gradient: median and 80 %")
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> float:
    """Train, write, draw, report; return the held-out loss in bits a character."""
    of_step = f"of {SEQUENCES * LENGTH} characters each"
    options = parse(__doc__, __file__, argv, steps=(STEPS, of_step))
    parts = texts()
    letters = sorted(set("".join(parts)))
    number = {letter: n for n, letter in enumerate(letters)}
    ids = (np.array([number[x] for x in part], np.int32) for part in parts)
    model = Writer(len(letters), nnx.Rngs(0))
    losses, looks, sizes = train(model, *map(in_rows, ids), options.steps)
    draw(losses, looks, sizes, options.output)
    begin, key = jnp.full((1, 1), number["\n"]), jax.random.key(0)
    written = np.asarray(write(model, begin, key, length=300))
    print("".join(letters[n] for n in written))
    packed = [len(lzma.compress(x.encode())) for x in (parts[0], "".join(parts))]
    print(
        f"held-out loss {looks[-1, 1]:.2f} bits a character (xz, knowing the training "
        f"text: {8 * (packed[1] - packed[0]) / len(parts[1]):.2f}), figure in "
        f"{options.output}"
    )
    if options.steps == STEPS and not looks[-1, 1] < PROMISED_BITS:
        raise SystemExit(f"expected less than {PROMISED_BITS} bits: please report it")
    return looks[-1, 1]


if __name__ == "__main__":
    main()
