"""Train actor-critic agents to balance a pole, with two dialects of RMSprop.

    pip install -e ".[examples]"
    python examples/a2c_cartpole.py

trains five agents with torch's RMSprop and five with TensorFlow's, all in one compiled
call, and ends with a line like

    return after 500k steps, mean of 5 seeds: torch 500 (500 to 500), TensorFlow 500
    (500 to 500); figure in [...]/a2c_cartpole.png

Both learn. torch's are faster, but some of its seeds forget for long what they knew;
TensorFlow's average begins at 1, so that its first steps are short.

The learning rate and its linear decay, decay, eps, clipping, discount and five steps an
update are those of A2C in openai/baselines (baselines/a2c/a2c.py). The networks are
Stable-Baselines3's; eight environments, 500k steps and no entropy bonus are its zoo's
for CartPole-v1 (DLR-RM/rl-baselines3-zoo, hyperparams/a2c.yml).
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cartpole import LONGEST, begin, play
from digits import new_figure, parse
from flax import nnx

from optax_rmsprop import dialects

ENVIRONMENTS, STEPS, DISCOUNT = 8, 5, 0.99
WINDOW = LONGEST // STEPS  # updates, in which every environment ends an episode
WINDOWS = 125
DIALECTS = {"torch": dialects.torch, "TensorFlow": dialects.stable_baselines3}
COLORS = ("C1", "C0")
PROMISED_RETURN = 400


class Agent(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        def layer(inputs: int, outputs: int, scale: float) -> nnx.Linear:
            init = nnx.initializers.orthogonal(scale)
            return nnx.Linear(inputs, outputs, kernel_init=init, rngs=rngs)

        def network(outputs: int, scale: float) -> nnx.Sequential:
            layers = layer(4, 64, 2**0.5), nnx.tanh, layer(64, 64, 2**0.5), nnx.tanh
            return nnx.Sequential(*layers, layer(64, outputs, scale))

        self.policy, self.value = network(2, 0.01), network(1, 1.0)

    def __call__(self, poles: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.policy(poles), self.value(poles)[..., 0]


def targets_of(values: jax.Array, fell: jax.Array, ended: jax.Array) -> jax.Array:
    """Discounted rewards, 1 a step, given the values of the states reached."""

    def back(later: jax.Array, step: tuple[jax.Array, ...]):
        value, fell, ended = step
        # The time limit is no failure: what would have come after it counts.
        target = 1 + DISCOUNT * jnp.where(fell, 0, jnp.where(ended, value, later))
        return target, target

    return jax.lax.scan(back, values[-1], (values, fell, ended), reverse=True)[1]


def train(tx: optax.GradientTransformation, updates: int, key: jax.Array) -> jax.Array:
    """Returns of the episodes that ended, their sum and number: (updates, 2)."""
    first, poles, key = jax.random.split(key, 3)
    graph, params = nnx.split(Agent(nnx.Rngs(first)))

    def step(params: nnx.State, environments: tuple[jax.Array, ...], key: jax.Array):
        of_action, of_begin = jax.random.split(key)
        logits, _ = nnx.merge(graph, params)(environments[0])
        actions = jax.random.categorical(of_action, logits)
        keys = jax.random.split(of_begin, ENVIRONMENTS)
        now, seen = jax.vmap(play)(*environments, actions, keys)
        return now, (environments[0], actions, *seen)

    def update(carry: tuple, key: jax.Array):
        params, opt_state, environments = carry
        keys = jax.random.split(key, STEPS)
        environments, seen = jax.lax.scan(partial(step, params), environments, keys)
        poles, actions, reached, fell, ended, ages = seen
        targets = targets_of(nnx.merge(graph, params)(reached)[1], fell, ended)

        def loss(params: nnx.State) -> jax.Array:
            logits, values = nnx.merge(graph, params)(poles)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, actions)
            advantages = targets - jax.lax.stop_gradient(values)
            return (advantages * losses + 0.5 * (targets - values) ** 2).mean()

        changes, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        params = optax.apply_updates(params, changes)
        returns = jnp.stack([jnp.where(ended, ages, 0).sum(), ended.sum()])
        return (params, opt_state, environments), returns

    poles = jax.vmap(begin)(jax.random.split(poles, ENVIRONMENTS))
    environments = poles, jnp.zeros(ENVIRONMENTS, jnp.int32)
    carry = params, tx.init(params), environments
    return jax.lax.scan(update, carry, jax.random.split(key, updates))[1]


def optimizer(dialect, updates: int) -> optax.GradientTransformation:
    rate = optax.linear_schedule(7e-4, 0.0, updates)
    clip = optax.clip_by_global_norm(0.5)
    return optax.chain(clip, dialect(rate, alpha=0.99, eps=1e-5))


@partial(jax.jit, static_argnames=("updates", "seeds"))
def train_all(updates: int, seeds: int) -> dict[str, jax.Array]:
    """Mean return of the episodes that ended in a window: (seeds, windows) each."""
    keys, curves = jax.random.split(jax.random.key(0), seeds), {}
    for name, dialect in DIALECTS.items():
        run = partial(train, optimizer(dialect, updates), updates)
        sums = jax.vmap(run)(keys).reshape(seeds, -1, WINDOW, 2).sum(2)
        curves[name] = sums[..., 0] / sums[..., 1]
    return curves


def draw(curves: dict[str, np.ndarray], steps: np.ndarray, path: Path) -> None:
    figure = new_figure(3.8)
    panels = figure.subplots(1, len(curves), sharex=True, sharey=True)
    for color, axes, (name, seeds) in zip(COLORS, panels, curves.items(), strict=True):
        axes.plot(steps / 1000, seeds.T, color=color, alpha=0.35, lw=0.8)
        axes.plot(steps / 1000, seeds.mean(0), color=color, lw=2.2)
        axes.set(title=f"RMSprop as in {name}", xlabel="thousand steps")
    panels[0].set(ylabel="return (steps until it falls)", ylim=(0, LONGEST + 10))
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> dict[str, np.ndarray]:
    """Train all, draw, report; return the curves."""
    window = WINDOW * STEPS * ENVIRONMENTS
    numbers = {
        "windows": (WINDOWS, f"of {window} steps each"),
        "seeds": (5, "agents of each dialect"),
    }
    options = parse(__doc__, __file__, argv, **numbers)
    steps = window * np.arange(1, options.windows + 1)
    curves = train_all(options.windows * WINDOW, options.seeds)
    curves = {name: np.asarray(curves[name]) for name in DIALECTS}
    draw(curves, steps, options.output)
    for at in sorted({*range(24, options.windows, 25), options.windows - 1}):
        each = (
            f"{name} {r[:, at].mean():.0f} ({r[:, at].min():.0f} to "
            f"{r[:, at].max():.0f})"
            for name, r in curves.items()
        )
        line = f"return after {steps[at] // 1000}k steps, mean of {options.seeds} seeds"
        last = f"; figure in {options.output}" if at == options.windows - 1 else ""
        print(f"{line}: {', '.join(each)}{last}")
    worst = min(r[:, -1].mean() for r in curves.values())
    if options.windows == WINDOWS and not worst >= PROMISED_RETURN:
        raise SystemExit(f"expected at least {PROMISED_RETURN}: please report it")
    return curves


if __name__ == "__main__":
    main()
