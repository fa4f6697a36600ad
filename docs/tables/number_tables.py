"""The tables of numbers in parameters.md and never_nan.md."""

import jax
import jax.numpy as jnp
import numpy as np

from generated import digits, number, rows_of, table
from optax_rmsprop import rmsprop


def lengths(gradients, learning_rate=1.0, **options):
    """The step for each of the gradients along the first axis, in learning rates."""
    tx = rmsprop(learning_rate, **options)

    def step(state, g):
        update, state = tx.update(g, state)
        return state, -update

    gradients = jnp.asarray(gradients, jnp.float32)
    return np.asarray(jax.lax.scan(step, tx.init(gradients[0]), gradients)[1])


def titles(language, english, chinese):
    return chinese if language == "zh" else english


@table("decay", tolerance=0.01)
def decay(language):
    header = titles(
        language,
        ["`decay`", "memory, updates", "noise of the divisor, %", "longest step"],
        ["`decay`", "记忆，更新次数", "分母的噪声，%", "最长的一步"],
    )
    rows = []
    for d in (0.9, 0.99, 0.999):
        noise = np.sqrt((1 - d) / (2 + 2 * d))
        longest = lengths([0.0, 5.0], decay=d, eps=0).max()
        memory = digits(1 / (1 - d))
        rows.append([d, memory, digits(100 * noise), digits(longest, 3)])
    return rows_of(header, rows)


@table("eps_in_sqrt", tolerance=0.01)
def eps_in_sqrt(language):
    header = titles(
        language,
        ["gradient", "1e-4 outside", "1e-8 under", "1e-8 outside", "1e-4 under"],
        ["梯度", "根号外 1e-4", "根号内 1e-8", "根号外 1e-8", "根号内 1e-4"],
    )
    cases = ((1e-4, False), (1e-8, True), (1e-8, False), (1e-4, True))
    sizes = np.array([1.0, 1e-2, 1e-3, 1e-4, 1e-5])
    columns = [
        lengths(np.tile(sizes, (300, 1)), decay=0.9, eps=eps, eps_in_sqrt=under)[-1]
        for eps, under in cases
    ]
    rows = [[number(g), *map(digits, r)] for g, *r in zip(sizes, *columns, strict=True)]
    return rows_of(header, rows)


@table("lr_in_momentum", tolerance=0.01)
def lr_in_momentum(language):
    after = (0, 1, 5, 10, 20, 50)
    header = titles(language, "updates after the fall", "下降之后的更新次数")
    names = titles(language, ("outside", "inside"), ("在缓冲区外", "在缓冲区内"))
    rows = []
    for name, inside in zip(names, (False, True), strict=True):
        steps = lengths(
            np.ones(300),
            lambda count: jnp.where(count < 200, 1.0, 0.1),
            momentum=0.9,
            bias_correction=True,
            lr_in_momentum=inside,
        )
        # Without the buffer's sum of 10, in units of the first learning rate.
        rows.append([name, *(digits(steps[200 + n] / 10) for n in after)])
    return rows_of([header, *after], rows)


@table("centered", tolerance=0.1)  # the variance comes to rest where mu is rounded
def centered(language):
    after = (1, 100, 460, 920, 1380)
    header = titles(language, "updates", "更新次数")
    rows = []
    for eps in (1e-8, 0.01, 0.1):
        steps = lengths(np.ones(1400), centered=True, eps=eps)
        rows.append([f"eps {number(eps)}", *(digits(steps[n - 1]) for n in after)])
    return rows_of([header, *after], rows)


@table("initial_scale", tolerance=0.01)
def initial_scale(language):
    after = (1, 10, 20, 50, 87, 150)
    header = titles(language, "updates", "更新次数")
    template = titles(language, "from {}, gradients of {}", "从 {} 开始，梯度 {}")
    rows = []
    for start, g in ((0.0, 1.0), (0.0, 0.01), (1.0, 0.1), (1.0, 0.01)):
        steps = lengths(np.full(150, g), decay=0.9, initial_scale=start)
        name = template.format(number(start), number(g))
        rows.append([name, *(digits(steps[n - 1]) for n in after)])
    return rows_of([header, *after], rows)


@table("bias_correction", tolerance=0.01)
def bias_correction(language):
    after = (1, 10, 100, 1000)
    header = titles(language, "updates", "更新次数")
    template = titles(language, "decay {}{}", "平滑常数 {}{}")
    rows = []
    for d, corrected in ((0.9, False), (0.99, False), (0.999, False), (0.999, True)):
        steps = lengths(np.ones(1000), decay=d, bias_correction=corrected)
        name = template.format(
            d, titles(language, ", corrected", "，修正") if corrected else ""
        )
        rows.append([name, *(digits(steps[n - 1]) for n in after)])
    return rows_of([header, *after], rows)


@table("float16", tolerance=0.05)
def float16(language):
    """How long a step in float16 is where it should be one learning rate."""
    import never_nan

    sizes = (1e-5, 1e-4, 5e-4, 2e-3, 1.0, 200.0, 300.0)
    rows = []
    for name, make in (("optax", never_nan.theirs), ("here", rmsprop)):
        steps = never_nan.float16_steps(make, np.array(sizes))
        rows.append([name, *map(digits_or_infinite, steps)])
    return rows_of(["gradient", *map(number, sizes)], rows)


def digits_or_infinite(x):
    return digits(x) if np.isfinite(x) else "infinite"
