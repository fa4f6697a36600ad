"""Record checkpoints of several frameworks, and how their runs go on.

    pip install torch==2.13.0 torchvision lightning transformers accelerate gymnasium
    pip install --no-deps timm stable_baselines3
    python tests/peers/record_checkpoints.py

Each function here trains a small model with its framework, for a few steps of RMSprop
in float64, and saves it as the framework does, in recorded/checkpoints/. Then five more
steps follow, with the gradients of `gradient`; recorded/checkpoints.json has the
parameters after them.
"""

import argparse
import json
import shutil
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent / "recorded"
MORE_STEPS = 5
OPTIONS = {"lr": 0.01, "momentum": 0.9, "centered": True}


def gradient(name, shape, step):
    """An array of numbers in [-1, 1] that depends on the name and the step."""
    start = sum(name.encode()) + 100 * step
    return np.sin(np.arange(start, start + np.prod(shape, dtype=int))).reshape(shape)


def bare(name):
    return name.replace("module.", "").replace("_orig_mod.", "")


def end(model, optimizer):
    """The parameters after more steps; those not in the optimizer do not change."""
    from torch.distributed.tensor import distribute_tensor

    for step in range(MORE_STEPS):
        for name, parameter in model.named_parameters():
            value = torch.tensor(gradient(bare(name), tuple(parameter.shape), step))
            if hasattr(parameter, "device_mesh"):
                value = distribute_tensor(value, parameter.device_mesh)
            parameter.grad = value if parameter.requires_grad else None
        optimizer.step()
    return {
        bare(name): getattr(p, "full_tensor", lambda p=p: p)().tolist()
        for name, p in model.named_parameters()
    }


def network():
    torch.manual_seed(0)
    layers = torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2)
    return torch.nn.Sequential(*layers).double()


def train(model, optimizer):
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 3, dtype=torch.float64)).square().mean().backward()
        optimizer.step()


def in_torch(folder):
    """With the names of DistributedDataParallel and torch.compile, and a schedule."""
    model = network()
    compiled = torch.compile(torch.nn.parallel.DistributedDataParallel(model))
    optimizer = torch.optim.RMSprop(compiled.parameters(), **OPTIONS)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    train(model, optimizer)
    scheduler.step()
    saved = {
        "epoch": 1,
        "net": compiled.state_dict(),
        "optim": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "random": {"torch": torch.get_rng_state()},
    }
    torch.save(saved, folder / "torch.pt")
    return compiled, optimizer


def two_groups(model):
    first = {"params": model[0].parameters(), "lr": 0.003}
    return torch.optim.RMSprop([first, {"params": model[1:].parameters()}], **OPTIONS)


def distributed(folder):
    """By torch.distributed.checkpoint, flattened."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import format_utils
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    model = network()
    optimizer = two_groups(model)
    train(model, optimizer)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    parts = get_state_dict(model, optimizer, options=options)
    with tempfile.TemporaryDirectory() as directory:
        saved = dict(zip(("model", "optimizer"), parts, strict=True))
        checkpoint.save(saved, checkpoint_id=directory)
        format_utils.dcp_to_torch_save(directory, folder / "distributed.pt")
    return model, optimizer


def fsdp(folder):
    """The full state_dicts of a model that is sharded, whose keys are names."""
    from torch.distributed import fsdp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    model = network()
    fsdp.fully_shard(model)
    optimizer = two_groups(model)
    train(model, optimizer)
    options = StateDictOptions(full_state_dict=True)
    parts = get_state_dict(model, optimizer, options=options)
    torch.save(
        dict(zip(("model", "optimizer"), parts, strict=True)), folder / "fsdp.pt"
    )
    return model, optimizer


def lightning(folder):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch):
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.RMSprop(self.parameters(), **OPTIONS)

    data = torch.utils.data.TensorDataset(torch.randn(24, 3, dtype=torch.float64))
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", **QUIET)
    model = Module()
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=8))
    trainer.save_checkpoint(folder / "lightning.ckpt")
    return model, trainer.optimizers[0]


QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def transformers(folder):
    """The files optimizer.pt and model.safetensors, the latter as torch saves it."""
    import transformers
    from safetensors.torch import load_file

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            return {"loss": self.net(x).square().mean()}

    data = [{"x": x} for x in torch.randn(24, 3, dtype=torch.float64)]
    with tempfile.TemporaryDirectory() as directory:
        arguments = transformers.TrainingArguments(
            directory,
            optim="rmsprop",
            optim_args="momentum=0.9",
            learning_rate=0.01,
            lr_scheduler_type="constant",
            weight_decay=0.1,
            per_device_train_batch_size=8,
            max_steps=3,
            save_steps=3,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(Model(), arguments, train_dataset=data)
        trainer.train()
        (made,) = Path(directory).glob("checkpoint-*")
        optimizer = torch.load(made / "optimizer.pt", weights_only=True)
        weights = load_file(made / "model.safetensors")
    # safetensors does not keep the order of the model.
    assert list(weights) == sorted(weights) != list(trainer.model.state_dict())
    in_order = {name: weights[name] for name in trainer.model.state_dict()}
    saved = {"pytorch_model.bin": in_order, "optimizer.pt": optimizer}
    torch.save(saved, folder / "transformers.pt")
    return trainer.model, trainer.optimizer


def accelerate(folder):
    import accelerate

    model = network()
    accelerator = accelerate.Accelerator(cpu=True)
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest}]
    optimizer = torch.optim.RMSprop(groups, **OPTIONS)
    model, optimizer = accelerator.prepare(model, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        x = torch.randn(8, 3, dtype=torch.float64)
        accelerator.backward(model(x).square().mean())
        optimizer.step()
    with tempfile.TemporaryDirectory() as directory:
        accelerator.save_state(directory, safe_serialization=False)
        names = "pytorch_model.bin", "optimizer.bin"
        saved = {
            name: torch.load(Path(directory) / name, weights_only=True)
            for name in names
        }
    torch.save(saved, folder / "accelerate.pt")
    return model, optimizer


def timm(folder):
    """With its RMSpropTF, and an average of the weights."""
    import timm.optim
    import timm.utils

    torch.manual_seed(0)
    layers = torch.nn.Conv2d(2, 3, 2, bias=False), torch.nn.BatchNorm2d(3)
    head = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 2)
    model = torch.nn.Sequential(*layers, *head).double()
    average = timm.utils.ModelEmaV2(model)
    options = {"opt": "rmsproptf", "weight_decay": 0.1, "momentum": 0.9}
    optimizer = timm.optim.create_optimizer_v2(model, lr=0.01, **options)
    for _ in range(3):
        optimizer.zero_grad()
        x = torch.randn(8, 2, 3, 3, dtype=torch.float64)
        model(x).square().mean().backward()
        optimizer.step()
        average.update(model)
    with tempfile.TemporaryDirectory() as directory:
        arguments = argparse.Namespace(model="small")
        options = {"args": arguments, "model_ema": average}
        saver = timm.utils.CheckpointSaver(
            model, optimizer, checkpoint_dir=directory, recovery_dir="", **options
        )
        saver.save_checkpoint(0, 0.5)
        shutil.copy(Path(directory) / "last.pth.tar", folder / "timm.pth.tar")
    return model, optimizer


def stable_baselines3(folder, name, algorithm, **options):
    """The members of a zip that torch has written; the others are pickled."""
    import stable_baselines3

    agent = getattr(stable_baselines3, algorithm)(
        "MlpPolicy", "CartPole-v1", seed=0, device="cpu", **options
    )
    agent.learn(20)
    policy, optimizer = agent.policy.double(), agent.policy.optimizer
    optimizer.load_state_dict(optimizer.state_dict())  # slots of the parameters' dtype
    with tempfile.TemporaryDirectory() as directory:
        agent.save(Path(directory) / "agent.zip")
        with (
            zipfile.ZipFile(Path(directory) / "agent.zip") as made,
            zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as kept,
        ):
            for member in made.namelist():
                if member.endswith(".pth"):
                    kept.writestr(member, made.read(member))
    return policy, optimizer


def a2c(folder):
    kwargs = {"net_arch": [4], "optimizer_kwargs": {"momentum": 0.9}}
    return stable_baselines3(folder, "a2c.zip", "A2C", policy_kwargs=kwargs)


def dqn(folder):
    kwargs = {"net_arch": [4], "optimizer_class": torch.optim.RMSprop}
    options = {"learning_starts": 4, "train_freq": 4, "policy_kwargs": kwargs}
    return stable_baselines3(folder, "dqn.zip", "DQN", **options)


RUNS = (
    in_torch,
    distributed,
    fsdp,
    lightning,
    transformers,
    accelerate,
    timm,
    a2c,
    dqn,
)
PACKAGES = "torch lightning transformers accelerate timm stable_baselines3 gymnasium"


def main():
    folder = FOLDER / "checkpoints"
    folder.mkdir(exist_ok=True)
    ends = {}
    for run in RUNS:
        before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
        model, optimizer = run(folder)
        (path,) = (
            path
            for path in folder.iterdir()
            if before.get(path) != path.stat().st_mtime_ns
        )
        ends[path.name] = end(model, optimizer)
        print(f"{path.stat().st_size:6} bytes in {path}")
    versions = {name: metadata.version(name) for name in PACKAGES.split()}
    record = {"versions": versions, "ends": ends}
    (FOLDER / "checkpoints.json").write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    main()
