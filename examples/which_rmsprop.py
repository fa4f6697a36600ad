"""A torch recipe whose optimizer nobody remembers: find it from 40 of its steps.

    pip install -e ".[examples,parity]"
    python examples/which_rmsprop.py

trains a network on scikit-learn's digits in torch, with timm's RMSprop and settings
that are drawn at random, and records the optimizer. Then it forgets which it was:

    7.6e-06  dialects.tensorflow(learning_rate, epsilon=0.008, momentum=0.56)

timm itself needs torchvision, so its RMSpropTF stands here in a few lines of torch.
"""

from typing import Any

import _common
import numpy as np
import torch

from optax_rmsprop.identify import identify, record


class RMSpropTF(torch.optim.Optimizer):
    """timm's, without weight decay."""

    def __init__(self, params: Any, **options: float):
        super().__init__(params, options)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                slots = self.state[p]
                if not slots:
                    slots["square_avg"] = torch.ones_like(p)
                    slots["momentum_buffer"] = torch.zeros_like(p)
                square = slots["square_avg"]
                square.add_(p.grad.pow(2) - square, alpha=1 - group["alpha"])
                root = square.add(group["eps"]).sqrt_()
                buffer = slots["momentum_buffer"].mul_(group["momentum"])
                p.sub_(buffer.addcdiv_(p.grad, root, value=group["lr"]))


def main(argv: list[str] | None = None) -> None:
    options = _common.parse_options(
        __doc__, argv, steps=(40, "to record"), seed=(1, "of settings and batches")
    )
    images, _, labels, _ = _common.split_digits()
    rng = np.random.default_rng(options.seed)
    torch.manual_seed(options.seed)
    network = torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(64, 32),
        torch.nn.ReLU(),
        torch.nn.Linear(32, 10),
    )
    optimizer = RMSpropTF(
        network.parameters(),
        lr=0.01,
        alpha=round(rng.uniform(0.8, 0.99), 2),
        eps=round(10 ** rng.uniform(-4, -2), 4),
        momentum=round(rng.uniform(0.5, 0.95), 2),
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.5)
    with record(optimizer, options.steps) as recorder:
        for _ in range(options.steps):
            batch = rng.integers(len(labels), size=64)
            loss = _common.torch_step(
                network, optimizer, scheduler, images[batch], labels[batch]
            )
    settings = ", ".join(f"{k} {v:g}" for k, v in optimizer.defaults.items())
    print(
        f"loss {loss:.3f} after {options.steps} steps of timm's RMSpropTF: {settings}"
    )

    # From here on nothing is known but the recording.
    print("identify fits every form of RMSprop: some seconds", flush=True)
    found = identify(*recorder.recording)
    print(found)
    if found:
        print(f"{found[0].error:.1e}  {found[0].call}")
    if options.output:
        found.draw(options.output)


if __name__ == "__main__":
    main()
