"""Facts about the originals of the dialects, which no code can tell."""

from sources import SOURCES, linked

LUA, _ = SOURCES["dqn"]
(GRAVES,) = SOURCES["graves"]

# Where each original is; where the languages differ, in English and in Chinese.
ORIGINALS = {
    "bitsandbytes": (
        "`bitsandbytes.optim.RMSprop`, 32 bits",
        "`bitsandbytes.optim.RMSprop`，32 位",
    ),
    "chainer": "`chainer.optimizers.RMSprop`",
    "dqn2015": (
        f"the {linked('Lua code', LUA)} of DQN in Nature",
        f"Nature 论文中 DQN 的 {linked('Lua 代码', LUA)}",
    ),
    "graves2013": (
        f"{linked(GRAVES, GRAVES)}; `chainer.optimizers.RMSpropGraves`",
        f"{linked(GRAVES, GRAVES)}；`chainer.optimizers.RMSpropGraves`",
    ),
    "jax_example_libraries": (
        "`rmsprop`, `rmsprop_momentum` of `jax.example_libraries.optimizers`",
        "`jax.example_libraries.optimizers` 的 `rmsprop`、`rmsprop_momentum`",
    ),
    "keras": (
        "Keras 3's `keras.optimizers.RMSprop`",
        "Keras 3 的 `keras.optimizers.RMSprop`",
    ),
    "mindspore": "`mindspore.nn.RMSProp`",
    "mlx": "`mlx.optimizers.RMSprop`",
    "optax": "`optax.rmsprop`",
    "optimisers_jl": (
        "`RMSProp` of Julia's Optimisers.jl and Flux",
        "Julia 的 Optimisers.jl 与 Flux 的 `RMSProp`",
    ),
    "paddle": "`paddle.optimizer.RMSProp`",
    "stable_baselines3": (
        "Stable-Baselines3's `RMSpropTFLike`",
        "Stable-Baselines3 的 `RMSpropTFLike`",
    ),
    "tensorflow": "`tf.compat.v1.train.RMSPropOptimizer`",
    "tf_keras": (
        "`tf.keras.optimizers.RMSprop` up to TensorFlow 2.10; "
        "`tf.keras.optimizers.legacy.RMSprop`",
        "TensorFlow 2.10 及更早的 `tf.keras.optimizers.RMSprop`；"
        "`tf.keras.optimizers.legacy.RMSprop`",
    ),
    "timm": ('timm\'s `RMSpropTF` ("rmsproptf")', "timm 的 `RMSpropTF`（“rmsproptf”）"),
    "torch": "`torch.optim.RMSprop`",
}
# The frameworks' own names of the averages of g² and of g, and of the momentum.
SLOTS = {
    "bitsandbytes": ("`state1`", "none", "none"),
    "chainer": ("`ms`", "none", "none"),
    "dqn2015": ("`g2`", "`g`", "none"),
    "graves2013": ("`n`", "`g`", "`delta`, negative"),
    "jax_example_libraries": ("`avg_sq_grad`", "none", "`mom`"),
    "keras": ("`velocity`", "`average_gradient`", "`momentum`"),
    "mindspore": ("`mean_square`", "`mean_grad`", "`moment`"),
    "mlx": ("`v`", "none", "none"),
    "optax": ("`nu`", "`mu`", "`trace`, negative"),
    "optimisers_jl": ("`quad`", "`lin`", "none"),
    "paddle": ("`mean_square`", "`mean_grad`", "`momentum`"),
    "stable_baselines3": ("`square_avg`", "`grad_avg`", "`momentum_buffer`"),
    "tensorflow": ("`rms`", "`mg`", "`momentum`"),
    "tf_keras": ("`rms`", "`mg`", "`momentum`"),
    "timm": ("`square_avg`", "`grad_avg`", "`momentum_buffer`"),
    "torch": ("`square_avg`", "`grad_avg`", "`momentum_buffer`"),
}
# Ours, where the framework requires a learning rate.
LEARNING_RATES = {
    "jax_example_libraries": 1e-3,
    "mlx": 1e-2,
    "optax": 1e-2,
    "paddle": 1e-3,
    "tensorflow": 1e-3,
}
