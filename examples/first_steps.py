"""Fit a line to ten features with RMSprop: the classic first example, in JAX.

    python examples/first_steps.py

ends with a line like

    epoch 100: loss 0.0099

The lines of the same program in torch stand in the comments.
"""

import jax
import jax.numpy as jnp
import optax

from optax_rmsprop import rmsprop


def predict(params, features):
    return features @ params["weight"] + params["bias"]


def loss_of(params, features, targets):
    return jnp.mean((predict(params, features) - targets) ** 2)


def main(epochs=100):
    """Train, print the loss every 10 epochs, and return the last one."""
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
    def train_step(params, state):
        # loss = torch.nn.functional.mse_loss(model(features).squeeze(1), targets)
        # optimizer.zero_grad(); loss.backward()
        loss, grads = jax.value_and_grad(loss_of)(params, features, targets)
        # optimizer.step()
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    for epoch in range(1, epochs + 1):
        params, state, loss = train_step(params, state)
        if epoch % 10 == 0:
            print(f"epoch {epoch:3}: loss {loss:.4f}")
    return float(loss)


if __name__ == "__main__":
    main()
