"""Fit a line to ten features with RMSprop: the classic first example, in JAX.

    python examples/first_steps.py

ends with a line like

    epoch 100: loss 0.0099

The lines of the same program in torch stand in the comments.
"""

from pathlib import Path

import _common
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_rmsprop import rmsprop

Params = dict[str, jax.Array]


def predict(params: Params, features: jax.Array) -> jax.Array:
    return features @ params["weight"] + params["bias"]


def loss_of(params: Params, features: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.mean((predict(params, features) - targets) ** 2)


def draw(history: list[tuple[jax.Array, jax.Array]], path: Path) -> None:
    losses, weights = map(np.array, zip(*history, strict=True))
    figure = _common.new_figure(3.6)
    left, right = figure.subplots(1, 2)
    left.semilogy(losses)
    left.set(xlabel="epoch", ylabel="mean squared error", title="Loss")
    right.plot(weights, "C0-", linewidth=1)
    right.hlines(np.arange(-5.0, 5.0) / 5, 0, len(history), "C5", linestyles=":")
    right.set(xlabel="epoch", title="The ten weights and their true values")
    _common.save_figure(figure, path)


def main(argv: list[str] | None = None) -> float:
    """Train, print the loss every 10 epochs, and return the last one."""
    options = _common.parse_options(
        __doc__, argv, epochs=(100, "steps over all the data")
    )
    # features, noise = torch.randn(100, 10), torch.randn(100)
    # targets = features @ torch.arange(-5.0, 5.0) / 5 + 0.1 * noise
    keys = jax.random.split(jax.random.key(0))
    features = jax.random.normal(keys[0], (100, 10))
    noise = jax.random.normal(keys[1], (100,))
    targets = features @ jnp.arange(-5.0, 5.0) / 5 + 0.1 * noise

    # model = torch.nn.Linear(10, 1)
    params = {"weight": jnp.zeros(10), "bias": jnp.zeros(())}

    # optimizer = torch.optim.RMSprop(model.parameters(), lr=0.01, alpha=0.99, eps=1e-8)
    optimizer = rmsprop(learning_rate=0.01, decay=0.99, eps=1e-8)
    state = optimizer.init(params)

    @jax.jit
    def train_step(
        params: Params, state: optax.OptState
    ) -> tuple[Params, optax.OptState, jax.Array]:
        # loss = torch.nn.functional.mse_loss(model(features).squeeze(1), targets)
        # optimizer.zero_grad(); loss.backward()
        loss, grads = jax.value_and_grad(loss_of)(params, features, targets)
        # optimizer.step()
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    history = []
    for epoch in range(1, options.epochs + 1):
        params, state, loss = train_step(params, state)
        history.append((loss, params["weight"]))
        if epoch % 10 == 0:
            print(f"epoch {epoch:3}: loss {loss:.4f}")
    if options.output:
        draw(history, options.output)
    return float(loss)


if __name__ == "__main__":
    main()
