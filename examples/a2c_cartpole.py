"""Train actor-critic agents to balance a pole, with two dialects of RMSprop.

    pip install -e ".[examples]"
    python examples/a2c_cartpole.py

trains five agents at once with torch's RMSprop and five with TensorFlow's, and ends
with a line of their mean return to the nearest 50, because machines differ by less:

    after 500k steps: torch 500, TensorFlow 500

Both learn. torch's are faster; TensorFlow's average begins at 1, so its first steps are
short. The settings are those of openai/baselines (baselines/a2c/a2c.py), the networks
and the rest those of Stable-Baselines3 (rl-baselines3-zoo, hyperparams/a2c.yml).
"""

from functools import partial

import _common
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen

from optax_rmsprop import dialects

SEEDS, ENVIRONMENTS, STEPS, LONGEST, DISCOUNT = 5, 8, 5, 500, 0.99
WINDOW = 100  # updates, of 4000 steps: every environment ends an episode
DIALECTS = {"torch": dialects.torch, "TensorFlow": dialects.stable_baselines3}
Arrays = tuple[jax.Array, ...]


def swing(pole: jax.Array, action: jax.Array) -> jax.Array:
    """gym's CartPole-v1 by 0.02 s: cart position and speed, pole angle and speed."""
    _, speed, angle, spin = pole
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    push = (jnp.where(action == 1, 10.0, -10.0) + 0.05 * spin**2 * sin) / 1.1
    turn = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
    return pole + 0.02 * jnp.stack([speed, push - 0.05 * turn * cos / 1.1, spin, turn])


begin = partial(jax.random.uniform, shape=(4,), minval=-0.05, maxval=0.05)


def play(
    pole: jax.Array, age: jax.Array, action: jax.Array, key: jax.Array
) -> tuple[Arrays, Arrays]:
    """The next pole and age; the pole reached, if it fell, if it ended, its return."""
    pole, age = swing(pole, action), age + 1
    fell = (jnp.abs(pole[0]) > 2.4) | (jnp.abs(pole[2]) > 12 * jnp.pi / 180)
    ended = fell | (age == LONGEST)
    now = jnp.where(ended, begin(key), pole), jnp.where(ended, 0, age)
    return now, (pole, fell, ended, age)


class Agent(linen.Module):
    @linen.compact
    def __call__(self, poles: jax.Array) -> tuple[jax.Array, jax.Array]:
        def network(outputs: int, scale: float) -> jax.Array:
            x, orthogonal = poles, linen.initializers.orthogonal
            for _ in range(2):
                x = linen.tanh(linen.Dense(64, kernel_init=orthogonal(2**0.5))(x))
            return linen.Dense(outputs, kernel_init=orthogonal(scale))(x)

        return network(2, 0.01), network(1, 1.0)[..., 0]


def targets_of(values: jax.Array, fell: jax.Array, ended: jax.Array) -> jax.Array:
    """Discounted rewards, 1 a step, given the values of the states reached."""
    targets = [values[-1]]
    for t in reversed(range(STEPS)):
        # The time limit is not a failure: the value of the state reached counts.
        later = jnp.where(ended[t], values[t], targets[0])
        targets.insert(0, 1 + DISCOUNT * jnp.where(fell[t], 0, later))
    return jnp.stack(targets[:-1])


def start(windows: int, key: jax.Array) -> tuple[dict, Arrays, jax.Array]:
    """Parameters, environments, and keys of the updates, for one seed."""
    of_agent, of_poles, key = jax.random.split(key, 3)
    poles = jax.vmap(begin)(jax.random.split(of_poles, ENVIRONMENTS))
    params, ages = Agent().init(of_agent, poles), jnp.zeros(ENVIRONMENTS, jnp.int32)
    return params, (poles, ages), jax.random.split(key, (windows, WINDOW))


def train(name: str, params: dict, environments: Arrays, keys: jax.Array) -> np.ndarray:
    """Mean return of the episodes of a window, by window and seed."""
    rate = optax.linear_schedule(7e-4, 0.0, keys[0].size)
    tx = DIALECTS[name](rate, alpha=0.99, eps=1e-5)
    tx, agent = optax.chain(optax.clip_by_global_norm(0.5), tx), Agent()

    def step(params: dict, environments: Arrays, key: jax.Array) -> tuple:
        of_action, of_begin = jax.random.split(key)
        logits, _ = agent.apply(params, environments[0])
        actions = jax.random.categorical(of_action, logits)
        keys = jax.random.split(of_begin, ENVIRONMENTS)
        now, seen = jax.vmap(play)(*environments, actions, keys)
        return now, (environments[0], actions, *seen)

    def update(run: tuple, key: jax.Array) -> tuple[tuple, Arrays]:
        params, opt_state, environments = run
        keys = jax.random.split(key, STEPS)
        environments, seen = jax.lax.scan(partial(step, params), environments, keys)
        poles, actions, reached, fell, ended, ages = seen
        targets = targets_of(agent.apply(params, reached)[1], fell, ended)

        def loss(params: dict) -> jax.Array:
            logits, values = agent.apply(params, poles)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, actions)
            advantages = targets - jax.lax.stop_gradient(values)
            return (advantages * losses + 0.5 * (targets - values) ** 2).mean()

        changes, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        params = optax.apply_updates(params, changes)
        returns = jnp.where(ended, ages, 0).sum(), ended.sum()
        return (params, opt_state, environments), returns

    runs = params, jax.vmap(tx.init)(params), environments
    history, play_all = [], jax.jit(jax.vmap(partial(jax.lax.scan, update)))
    for number in _common.shown(range(keys.shape[1]), f"{name}: window"):
        runs, (returns, episodes) = play_all(runs, keys[:, number])
        history.append(np.sum(returns, axis=1) / np.sum(episodes, axis=1))
    return np.array(history)


def main(argv: list[str] | None = None) -> None:
    options = _common.parse_options(__doc__, argv, windows=(125, "of 4000 steps each"))
    seeds = jax.random.split(jax.random.key(0), SEEDS)
    # Not vmap: with jaxlib 0.10 on two cores, the batches of QR factorizations that
    # `orthogonal` would need can block each other's threads.
    starts = jax.lax.map(partial(start, options.windows), seeds)
    returns = {name: train(name, *starts) for name in DIALECTS}
    steps = 4 * np.arange(1, options.windows + 1)
    ends = {name: 50 * round(last.mean() / 50) for name, (*_, last) in returns.items()}
    each = ", ".join(f"{name} {mean}" for name, mean in ends.items())
    print(f"after {steps[-1]}k steps: {each}")
    if options.output:
        axes = _common.new_figure(3.8).subplots()
        for (name, curves), look in zip(returns.items(), ("C1--", "C0-"), strict=True):
            axes.plot(steps, curves, look, alpha=0.35, lw=0.8)
            axes.plot(steps, curves.mean(1), look, lw=2.2, label=f"as in {name}")
        axes.set(xlabel="thousand steps", ylabel="return (steps until it falls)")
        axes.legend()
        _common.save_figure(axes.figure, options.output)


if __name__ == "__main__":
    main()
