"""RMSprop of sources that are not run here, line by line in NumPy.

Each yields the parameters after each gradient; learning rates change every step.
"""

import numpy as np


def optimisers_jl(
    params, gradients, etas, rho=0.9, epsilon=1e-8, centred=False, centered=False
):
    """FluxML/Optimisers.jl, src/rules.jl, `apply!(o::RMSProp, ...)`, commit 007b972."""
    x, quad, lin = params, np.zeros_like(params), np.zeros_like(params)
    for dx, eta in zip(gradients, etas, strict=True):
        quad = rho * quad + (1 - rho) * np.abs(dx) ** 2
        if centred or centered:
            lin = rho * lin + (1 - rho) * dx
        x = x - dx * eta / (np.sqrt(quad - np.abs(lin) ** 2) + epsilon)
        yield x


def dqn2015(params, gradients, learning_rates, wc=0.0):
    """kuz/DeepMind-Atari-Deep-Q-Learner, dqn/NeuralQLearner.lua, `qLearnMinibatch`.

    Its dw points uphill (w <- w + deltas): it is the gradient with the other sign.
    """
    w, g, g2 = params, np.zeros_like(params), np.zeros_like(params)
    for gradient, lr in zip(gradients, learning_rates, strict=True):
        dw = -gradient
        dw = dw - wc * w
        g = 0.95 * g + 0.05 * dw
        tmp = dw * dw
        g2 = 0.95 * g2 + 0.05 * tmp
        tmp = g * g
        tmp = tmp * -1
        tmp = tmp + g2
        tmp = tmp + 0.01
        tmp = np.sqrt(tmp)
        deltas = lr * dw / tmp
        w = w + deltas
        yield w


def graves2013(params, gradients, learning_rates, alpha=0.95, momentum=0.9, eps=1e-4):
    """arXiv:1308.0850, eq. 38-41, with the constants of eq. 42-45 by default."""
    w, n, g, delta = params, *(np.zeros_like(params) for _ in range(3))
    for epsilon, lr in zip(gradients, learning_rates, strict=True):
        n = alpha * n + (1 - alpha) * epsilon**2
        g = alpha * g + (1 - alpha) * epsilon
        delta = momentum * delta - lr * epsilon / np.sqrt(n - g**2 + eps)
        w = w + delta
        yield w
