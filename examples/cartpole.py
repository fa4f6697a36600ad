"""A pole on a cart, as gym's CartPole-v1 has it, for `examples/a2c_cartpole.py`."""

import jax
import jax.numpy as jnp

LONGEST = 500  # steps of an episode


def swing(pole: jax.Array, action: jax.Array) -> jax.Array:
    """0.02 s of cart position (m), its speed, pole angle (rad) and its speed.

    Barto, Sutton and Anderson 1983, without friction, by Euler's method. The cart
    weighs 1 kg and the pole 0.1; the pole is 1 m long, and the cart pushed by 10 N.
    """
    _, speed, angle, spin = pole
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    push = (jnp.where(action == 1, 10.0, -10.0) + 0.05 * spin**2 * sin) / 1.1
    turn = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
    change = jnp.stack([speed, push - 0.05 * turn * cos / 1.1, spin, turn])
    return pole + 0.02 * change


def begin(key: jax.Array) -> jax.Array:
    return jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05)


def play(
    pole: jax.Array, age: jax.Array, action: jax.Array, key: jax.Array
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """One step, and a new beginning where it ends an episode.

    Returns what goes on (pole, age), and what was seen: (the pole reached, whether it
    fell, whether the episode ended, its age, which is its return).
    """
    pole, age = swing(pole, action), age + 1
    fell = (jnp.abs(pole[0]) > 2.4) | (jnp.abs(pole[2]) > 12 * jnp.pi / 180)
    ended = fell | (age == LONGEST)
    now = jnp.where(ended, begin(key), pole), jnp.where(ended, 0, age)
    return now, (pole, fell, ended, age)
