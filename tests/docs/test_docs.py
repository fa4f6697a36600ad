"""The Python blocks and docstring examples run, and links lead to a file."""

import doctest
import importlib
import inspect
import pkgutil
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

import optax_rmsprop
from helpers import skip_without_pinned_host
from optax_rmsprop import carry, wrappers

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")], key=str)
MODULES = [
    importlib.import_module(module.name)
    for module in pkgutil.walk_packages(optax_rmsprop.__path__, "optax_rmsprop.")
]


def needs_torch(text):
    return re.search(r"^[ >]*import .*\btorch\b", text, re.M)


def name_of(name, text):
    """So that `-k torch` finds it."""
    return f"{name}, with torch" if needs_torch(text) else str(name)


def skip_without_torch(text):
    if needs_torch(text):
        pytest.importorskip("torch")


# test_chinese_pages.py compares the blocks of Chinese pages with those of the English.
ENGLISH = [page for page in PAGES if "zh" not in re.split(r"[./-]", str(page))]


# They train networks, or compile many programs.
SLOW = {
    "carry",
    "choosing",
    "faq",
    "identify",
    "low_precision",
    "never_nan",
    "quick_start",
}


NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


def with_output(page):
    """The blocks of Python, each with the block of text behind it, or ""."""
    block = r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?"
    return re.findall(block, page.read_text(), re.M | re.S)


def assert_printed(actual, expected):
    """The same words; the last digits of numbers may differ between machines."""
    words = [NUMBER.sub("#", text).split() for text in (actual, expected)]
    assert words[0] == words[1]
    numbers = [list(map(float, NUMBER.findall(text))) for text in (actual, expected)]
    np.testing.assert_allclose(*numbers, rtol=0.05, atol=1e-3)


def with_blocks():
    for page in ENGLISH:
        marks = [pytest.mark.slow] * (page.stem in SLOW)
        name = name_of(page.relative_to(ROOT), page.read_text())
        yield pytest.param(page, marks=marks, id=name)


@pytest.mark.usefixtures("standard_promotion")  # as users have it
@pytest.mark.parametrize("page", list(with_blocks()))
def test_python_blocks_run(page, tmp_path, monkeypatch, capsys):
    # Some write files, and some read records.
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    monkeypatch.chdir(tmp_path)
    for code, printed in with_output(page):
        skip_without_torch(code)
        if "pinned_host" in code:
            skip_without_pinned_host()
        exec(compile(code, str(page), "exec"), {})
        output = capsys.readouterr().out
        if printed:
            assert_printed(output, printed)


def test_the_readme_on_a_package_index():
    """There it stands without the repository: it has no relative link, nor a clone."""
    hooks = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]
    text = (ROOT / "README.md").read_text()
    for rule in hooks["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        changed = re.sub(rule["pattern"], rule["replacement"], text)
        assert changed != text, rule
        text = changed
    assert not re.findall(r"\]\((?!https?:)", text)
    assert "`pip install optax_rmsprop`" in text


def test_the_readme_has_a_python_block():
    assert with_output(ROOT / "README.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    "module",
    MODULES,
    ids=lambda module: name_of(module.__name__, inspect.getsource(module)),
)
def test_docstring_examples(module):
    skip_without_torch(inspect.getsource(module))
    result = doctest.testmod(module)
    assert result.failed == 0
    public = [getattr(module, name, None) for name in ("rmsprop", "scale_by_stddev")]
    if any(f is not None and f.__module__ == module.__name__ for f in public):
        assert result.attempted > 0


PUBLIC = [
    optax_rmsprop.check_state_shardings,
    optax_rmsprop.compress_state,
    optax_rmsprop.decompress_state,
    optax_rmsprop.diagnose,
    optax_rmsprop.from_keras,
    optax_rmsprop.from_optax,
    optax_rmsprop.from_torch,
    optax_rmsprop.from_torch_checkpoint,
    optax_rmsprop.rmsprop,
    optax_rmsprop.scale_by_rms,
    optax_rmsprop.scale_by_stddev,
    optax_rmsprop.scaled_to_batch,
    optax_rmsprop.state_shardings,
    optax_rmsprop.stochastic_apply_updates,
    optax_rmsprop.to_torch,
    carry.names_of,
    carry.port_of,
    carry.schedule_of,
    carry.to_nnx,
    wrappers.bfloat16_params,
    wrappers.float32_params,
    wrappers.master_weights,
    wrappers.single_pass,
]


@pytest.mark.parametrize("function", PUBLIC, ids=lambda function: function.__name__)
def test_every_argument_is_explained(function):
    text = inspect.getdoc(function)
    explained = re.findall(r"^  (\w+): ", text.split("\nArgs:\n")[1], re.M)
    arguments = list(inspect.signature(function).parameters)
    assert explained[: len(arguments)] == arguments
    sections = re.findall(r"^(Args|Returns|Raises|Example|References):", text, re.M)
    returns = ["Returns"] * (function is not optax_rmsprop.to_torch)
    assert sections == ["Args", *returns, "Raises", "Example", "References"]


def test_public_names():
    assert optax_rmsprop.__all__ == sorted(optax_rmsprop.__all__)
    assert dir(optax_rmsprop) == optax_rmsprop.__all__
    words = re.findall(r"\w+", optax_rmsprop.__doc__)
    assert set(optax_rmsprop.__all__) <= set(words)
    assert set(optax_rmsprop.__all__) == {
        "CompressedState",
        "Diagnosis",
        "ScaleByRmsState",
        "ScaleByStddevState",
        "TorchRun",
        "add_decayed_weights",
        "carry",
        "check_state_shardings",
        "compress_state",
        "decompress_state",
        "diagnose",
        "dialects",
        "from_keras",
        "from_optax",
        "from_torch",
        "from_torch_checkpoint",
        "identify",
        "rmsprop",
        "scale_by_rms",
        "scale_by_stddev",
        "scaled_to_batch",
        "state_shardings",
        "stochastic_apply_updates",
        "to_torch",
        "torch_layers",
        "trace",
        "wrappers",
    }


def test_the_changelog_knows_this_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[(.+?)\]", text, re.M)
    released = [version for version in versions if version != "Unreleased"]
    assert versions == ["Unreleased"] * ("Unreleased" in versions) + released
    assert released[:1] in ([optax_rmsprop.__version__], [])
    assert released or optax_rmsprop.__version__ == "0.1.0"  # which is not released yet
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {optax_rmsprop.__version__}\n" in citation
