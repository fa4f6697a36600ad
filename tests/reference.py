"""RMSprop in NumPy, in float64 unless told otherwise, one line of arithmetic a line."""

import numpy as np


def rmsprop(
    params,
    gradients,
    learning_rate=1e-2,
    decay=0.99,
    eps=1e-8,
    *,
    momentum=0.0,
    nesterov=False,
    centered=False,
    weight_decay=0.0,
    decoupled_weight_decay=False,
    initial_scale=0.0,
    eps_in_sqrt=False,
    lr_in_momentum=False,
    bias_correction=False,
    maximize=False,
):
    """Yield the parameters and every average after each of the gradients.

    One array of parameters, not a tree. `learning_rate` and `weight_decay` are numbers
    or functions of the number of updates made. Exact where float64 is: the variance is
    averaged itself.
    """
    p = np.array(params)
    nu, mu, b = np.full_like(p, initial_scale), np.zeros_like(p), np.zeros_like(p)
    var = nu.copy()
    for t, g in enumerate(gradients, start=1):
        lr = learning_rate(t - 1) if callable(learning_rate) else learning_rate
        wd = weight_decay(t - 1) if callable(weight_decay) else weight_decay
        a = (1 - decay) / (1 - decay**t) if bias_correction else 1 - decay
        g = -g if maximize else g
        if not decoupled_weight_decay:
            g = g + wd * p
        nu = (1 - a) * nu + a * g**2
        var = (1 - a) * (var + a * (g - mu) ** 2)
        mu = mu + a * (g - mu)
        moment = var if centered else nu
        root = np.sqrt(moment + eps) if eps_in_sqrt else np.sqrt(moment) + eps
        u = np.divide(g, root, out=np.zeros_like(g), where=root != 0)
        u = lr * u if lr_in_momentum else u
        b = momentum * b + u
        step = u + momentum * b if nesterov else b
        step = step if lr_in_momentum else lr * step
        if decoupled_weight_decay:
            step = step + lr * wd * p
        p = p - step
        yield p, {"nu": nu, "mu": mu, "var": var, "trace": b}
