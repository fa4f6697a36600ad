"""Where the published settings come from, as links."""

import itertools
from pathlib import Path

from generated import rows_of, table
from words import Words

# What the optimizers under "Published settings" are for; where the languages differ, in
# English and in Chinese.
PURPOSES = {
    "efficientnet": "EfficientNet",
    "mnasnet": "MnasNet",
    "inception_v3": ("Inception v3 on a TPU", "TPU 上的 Inception v3"),
    "inception_v4": ("Inception v4 on a TPU", "TPU 上的 Inception v4"),
    "mobilenet_v1": ("MobileNet v1 on a TPU", "TPU 上的 MobileNet v1"),
    "mobilenet_v2": (
        "MobileNet v2, slim on one GPU",
        "MobileNet v2，slim，单块 GPU",
    ),
    "mobilenet_v3": (
        "MobileNetV3, torchvision's weights",
        "MobileNetV3，torchvision 的权重",
    ),
    "amoebanet": "AmoebaNet",
    "impala": ("IMPALA on DeepMind Lab", "DeepMind Lab 上的 IMPALA"),
    "dqn": (
        "DQN in Nature, a copy of the authors' code",
        "Nature 论文中的 DQN，作者代码的副本",
    ),
    "dopamine": ("Dopamine's DQN in TensorFlow", "Dopamine 的 TensorFlow 版 DQN"),
    "dqn_zoo": ("DQN Zoo's DQN", "DQN Zoo 的 DQN"),
    "a2c": (
        "A2C of Stable-Baselines3, its default",
        "Stable-Baselines3 的 A2C，默认设置",
    ),
    "a2c_like_tensorflow": (
        "the same with `RMSpropTFLike`",
        "同上，改用 `RMSpropTFLike`",
    ),
    "dpo": ("DPO, its authors' code", "DPO，作者的代码"),
}
# Articles, pages, and files on GitHub after the names of owner and repository.
SOURCES = {
    "efficientnet": (
        "tensorflow/tpu/models/official/efficientnet/main.py",
        "tensorflow/tpu/models/official/efficientnet/utils.py",
        "arXiv:1905.11946",
    ),
    "mnasnet": (
        "tensorflow/tpu/models/official/mnasnet/configs/mnasnet_config.py",
        "tensorflow/tpu/models/official/mnasnet/mnas_utils.py",
    ),
    "inception_v3": ("tensorflow/tpu/models/experimental/inception/inception_v3.py",),
    "inception_v4": ("tensorflow/tpu/models/experimental/inception/inception_v4.py",),
    "mobilenet_v1": (
        "tensorflow/tpu/models/official/mobilenet/mobilenet.py",
        "tensorflow/tpu/models/official/mobilenet/configs/default.yaml",
    ),
    "mobilenet_v2": (
        "tensorflow/models/research/slim/nets/mobilenet/README.md",
        "tensorflow/models/research/slim/train_image_classifier.py",
    ),
    "mobilenet_v3": (
        "pytorch/vision/references/classification/README.md",
        "pytorch/vision/references/classification/train.py",
    ),
    "amoebanet": ("tensorflow/tpu/models/official/amoeba_net/amoeba_net_model.py",),
    "impala": ("google-deepmind/scalable_agent/experiment.py", "arXiv:1802.01561"),
    "dqn": (
        "kuz/DeepMind-Atari-Deep-Q-Learner/dqn/NeuralQLearner.lua",
        "kuz/DeepMind-Atari-Deep-Q-Learner/run_gpu",
    ),
    "dopamine": ("google/dopamine/dopamine/tf/agents/dqn/configs/dqn_nature.gin",),
    "dqn_zoo": ("google-deepmind/dqn_zoo/dqn_zoo/dqn/run_atari.py",),
    "a2c": ("DLR-RM/stable-baselines3/stable_baselines3/a2c/a2c.py",),
    "a2c_like_tensorflow": ("DLR-RM/stable-baselines3/docs/modules/a2c.rst",),
    "dpo": (
        "eric-mitchell/direct-preference-optimization/config/config.yaml",
        "eric-mitchell/direct-preference-optimization/trainers.py",
    ),
    "hinton": (
        "https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf",
    ),
    "graves": ("arXiv:1308.0850",),
    "char_rnn": ("karpathy/char-rnn/train.lua",),
    "a3c": ("https://github.com/muupan/async-rl/wiki",),
    "qmix": ("oxwhirl/pymarl/src/config/default.yaml",),
    "wgan": ("martinarjovsky/WassersteinGAN/main.py",),
    "inception_v3_paper": ("arXiv:1512.00567",),
}


def address(source):
    if source.startswith("https:"):
        return source
    if source.startswith("arXiv:"):
        return f"https://arxiv.org/abs/{source.removeprefix('arXiv:')}"
    owner, repository, path = source.split("/", 2)
    return f"https://github.com/{owner}/{repository}/blob/HEAD/{path}"


def linked(text, source):
    return f"[{text}]({address(source)})"


def repository_of(source):
    """The owner and the repository of a file; an article is its own."""
    return "/".join(source.split("/")[:2])


def cited(sources, words):
    """Articles, and after each repository its files."""
    parts = []
    for repository, files in itertools.groupby(sources, repository_of):
        if repository.startswith("arXiv:"):
            parts.append(linked(repository, repository))
            continue
        links = words.listed(linked(f"`{Path(file).name}`", file) for file in files)
        parts.append(f"{repository}{words.colon}{links}")
    return words.semicolon.join(parts)


@table("sources")
def sources(language):
    """What each published setting is for, and where it is from."""
    words = Words(language)
    rows = [
        [f"`{name}`", words.of(purpose), cited(SOURCES[name], words)]
        for name, purpose in PURPOSES.items()
    ]
    header = ["设置", "用于", "来源"] if words.chinese else ["setting", "for", "source"]
    return rows_of(header, rows)
