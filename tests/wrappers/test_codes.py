"""The 8-bit codes: unbiased, of any range, never NaN from what is finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_rmsprop.wrappers import _codes
from optax_rmsprop.wrappers._codes import (
    NON_NEGATIVE,
    SIGNED,
    UNKNOWN,
    WINDOWS,
    Format,
    decode,
    encode,
    first_format,
    next_format,
)
from optax_rmsprop.wrappers._rounding import LONG, random_axis_bits, random_bits

MANY = 40_000


@jax.jit
def encoded(x, to, seed):
    """Codes of one array, their format, and that for the next numbers."""
    (axis_bits,) = random_axis_bits(jax.random.key(seed), [x.shape])
    codes, *extremes = encode(x, to, axis_bits)
    return codes, to, next_format(to, *extremes)


@jax.jit
def first(x, seed=0):
    wide = x.astype(jnp.float32)
    return encoded(x, first_format(wide.min(), wide.max()), seed)


def following(x, last, seed=1):
    return encoded(x, last[2], seed)


next_format = jax.jit(next_format)


def decoded(codes, of, _, dtype="float32"):
    return decode(codes, of, jnp.dtype(dtype))


def kept(x, seed=0):
    return np.asarray(decoded(*first(x, seed)), np.float64)


def zeros(shape):
    return first(jnp.zeros(shape))


def standard_errors(values, number):
    """By how many standard errors the mean of values misses a number."""
    return abs(values.mean() - number) / (values.std() / np.sqrt(values.size) + 1e-300)


# With 15 values at 5 standard errors, one in a hundred thousand such tables fails; the
# seed is fixed.
ODDS = 5.0
FRACTIONS = [1.0, 0.9, 0.71, 0.33, 0.1, 3e-2, 1.7e-3, 2.3e-5, 1.1e-7]


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("signs", [(1,), (1, -1)], ids=["non-negative", "signed"])
def test_the_mean_of_what_is_kept_is_the_number(signs, fraction):
    x = np.full(MANY, fraction)
    x = np.concatenate([*(sign * x for sign in signs), [signs[-1]]])
    stored = kept(jnp.asarray(x, jnp.float32))
    for i, sign in enumerate(signs):
        part = stored[i * MANY : (i + 1) * MANY]
        assert standard_errors(part, np.float32(sign * fraction)) < ODDS
        assert part.std() > 0 or part[0] == np.float32(sign * fraction)


def test_rounding_to_the_nearest_would_fail_this():
    x = np.concatenate([np.full(MANY, 0.71), [1]])
    levels = np.unique(kept(jnp.asarray(x, jnp.float32))[:MANY])
    assert len(levels) == 2
    nearest = levels[np.argmin(np.abs(levels - 0.71))]
    noise = np.random.default_rng(0).normal(0, np.ptp(levels) / 2, MANY)
    assert standard_errors(nearest + noise, 0.71) > ODDS


@pytest.mark.parametrize("size", [1e-30, 1e-18, 3e-7, 1.0, 7e4, 1e12])
@pytest.mark.parametrize("signs", [(1,), (1, -1)], ids=["non-negative", "signed"])
def test_the_first_numbers_are_unbiased_at_any_size(signs, size):
    x = np.outer(signs, np.full(MANY, 1.3 * size)).astype(np.float32)
    codes = zeros(x.shape)
    for _ in range(3):  # two windows in turn: the first ends at 2⁻⁶²
        codes = following(x, codes)
    stored = np.asarray(decoded(*codes), np.float64)
    for part, number in zip(stored, x[:, 0], strict=True):
        assert standard_errors(part, number) < ODDS


def test_the_next_numbers_know_the_kind_and_the_scale():
    positive = np.linspace(1, 2, 64, dtype=np.float32)
    for x, kind in ((positive, NON_NEGATIVE), (positive - 1.5, SIGNED)):
        codes = following(x, zeros(x.shape))
        assert codes[1].kind == UNKNOWN
        codes = following(x, following(x, codes))
        assert codes[1].kind == kind
        np.testing.assert_allclose(decoded(*codes), x, atol=0.15)


def test_the_worked_examples_of_the_module():
    format = Format(jnp.int32(NON_NEGATIVE), jnp.int32(0))
    levels = decode(jnp.arange(1, 14, dtype=jnp.uint8), format, jnp.dtype("float32"))
    expected = [0, 1, 3, 7, 15, 31, 63, 127, 255, 383, 511, 767, 1023]
    np.testing.assert_array_equal(levels, expected)
    assert set(np.unique(encoded(jnp.full(MANY, 5.0), format, 0)[0])) == {3, 4}
    assert first_format(jnp.float32(0), jnp.float32(3)) == (NON_NEGATIVE, -34)
    x = jnp.array([0.0, 3.0])
    unknown = Format(jnp.int32(UNKNOWN), jnp.int32(WINDOWS[0]))
    codes, _, found = encoded(x, unknown, 0)
    assert (codes.tolist(), found) == ([128, 192], (NON_NEGATIVE, -33))
    codes, _, same = encoded(x, found, 0)
    assert (codes.tolist(), same) == ([2, 161], found)


# Per kind: where x is relative to the largest number, and the distance of its levels.
DISTANCES = [
    ((1,), 0, 0.03, 0.07),
    ((1,), -10, 0.08, 0.16),
    ((1,), -35, 1.0, 2.01),
    ((1, -1), 0, 0.06, 0.13),
    ((1, -1), -10, 0.15, 0.3),
    ((1, -1), -27, 1.0, 2.01),
]


@pytest.mark.parametrize(("signs", "octave", "least", "most"), DISTANCES)
def test_levels_are_as_far_apart_as_the_docstring_says(signs, octave, least, most):
    numbers = 2.0**octave * np.linspace(1, 1.99, 200)
    x = np.concatenate([np.repeat(numbers, 200), [1.99 * signs[-1]]])
    stored = kept(jnp.asarray(x, jnp.float32))[:-1].reshape(200, 200)
    gaps = (stored.max(axis=1) - stored.min(axis=1)) / numbers
    assert least < np.median(gaps[gaps > 0]) < most


def test_what_lies_on_a_level_stays_there():
    x = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    for numbers in (x, x**2):
        codes = first(numbers)
        for seed in range(1, 20):
            again = following(decoded(*codes), codes, seed)
            assert again[1].exponent == codes[1].exponent
            np.testing.assert_array_equal(again[0], codes[0])


@pytest.mark.parametrize("scale", [1.0, 2.0**-40, 2.0**9])
def test_an_array_of_one_power_of_two_is_exact(scale):
    for seed in range(10):  # initial_scale=1 as in TensorFlow
        np.testing.assert_array_equal(kept(np.full(4096, scale), seed), scale)


def test_thirty_binades_in_one_array():
    x = 2.0 ** np.arange(-30, 1, dtype=np.float32)
    for numbers in (x, np.where(np.arange(31) % 2, x, -x)):
        stored = kept(np.repeat(numbers, 100)).reshape(31, 100)
        assert np.isfinite(stored).all()
        assert (np.abs(stored) <= 2.01 * np.abs(numbers[:, None]) + 2.0**-27).all()
    assert (kept(np.repeat(x, 100)) > 0).all()


def test_non_negative_numbers_never_become_zero():
    x = np.concatenate([10.0 ** np.arange(-38.0, 0), [0]]).astype(np.float32)
    stored = kept(x)
    assert (stored > 0).all()
    assert stored[-1] < 1e-10 * stored.max()


def test_zeros_stay_zeros():
    codes = zeros((3, 5))
    for _ in range(5):
        codes = following(jnp.zeros((3, 5)), codes)
        assert (decoded(*codes) == 0).all()


@pytest.mark.parametrize("factor", [1e-25, 1e-6, 1e6, 1e30])
def test_the_scale_follows(factor):
    x = np.random.default_rng(0).normal(size=4096).astype(np.float32)
    for before in (x, x**2):
        numbers = (before * factor * 1e-3).astype(np.float32)
        codes = following(before, following(before, zeros(x.shape)))
        for _ in range(20):
            codes = following(numbers, codes)
            assert np.isfinite(decoded(*codes)).all()
        np.testing.assert_allclose(
            decoded(*codes), numbers, rtol=0.3, atol=1e-3 * np.abs(numbers).max()
        )


@pytest.mark.parametrize("signs", [(1,), (1, -1)], ids=["non-negative", "signed"])
def test_the_largest_numbers_of_float32(signs):
    x = np.outer(signs, np.linspace(1e38, 2e38, 1000)).astype(np.float32)
    codes = first(x)
    for seed in range(5):
        np.testing.assert_allclose(decoded(*codes), x, rtol=0.2)
        codes = following(x, codes, seed)
    finite = first(np.full((2, 50), np.finfo(np.float32).max, np.float32))
    assert np.isfinite(decoded(*finite)).all()


def test_a_spike_is_held_at_the_end_of_the_range_and_then_known():
    x = np.full(4096, 0.5, np.float32)
    spiked = x.copy()
    spiked[7] = 1e20
    codes = following(x, following(x, zeros(x.shape)))
    codes = following(spiked, codes)
    assert 2 < decoded(*codes)[7] < 1e20
    np.testing.assert_allclose(np.delete(decoded(*codes), 7), 0.5, rtol=0.2)
    for _ in range(20):
        codes = following(spiked, codes)
    np.testing.assert_allclose(decoded(*codes)[7], 1e20, rtol=0.2)


def test_an_array_that_was_non_negative_can_become_signed():
    x = np.linspace(1, 2, 100, dtype=np.float32)
    codes = following(x, following(x, zeros(x.shape)))
    x = np.concatenate([-x[:50], x[50:]])  # JAX may still be reading the old array
    codes = following(x, codes)
    stored = np.asarray(decoded(*codes))
    np.testing.assert_array_equal(stored[:50], 0)  # for one step
    np.testing.assert_allclose(stored[50:], x[50:], rtol=0.2)
    for _ in range(3):
        codes = following(x, codes)
    assert codes[1].kind == SIGNED
    np.testing.assert_allclose(decoded(*codes), x, rtol=0.3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_nan_and_leave_the_others_alone(bad):
    x = np.linspace(1, 2, 100, dtype=np.float32)
    for numbers in (x, x - 1.5):
        codes = zeros(x.shape)
        for _ in range(3):
            codes = following(numbers, codes)
        exponent = codes[1].exponent
        numbers = np.concatenate([numbers[:3], [bad], numbers[4:]]).astype(np.float32)
        for _ in range(5):
            codes = following(numbers, codes)
            assert np.isnan(decoded(*codes)[3])
            assert codes[1].exponent == exponent
            np.testing.assert_allclose(
                np.delete(decoded(*codes), 3), np.delete(numbers, 3), atol=0.2
            )
    assert np.isnan(kept(numbers)[3])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_codes_decode_to_the_dtype_of_the_array_and_stay_finite(dtype):
    largest = float(jnp.finfo(dtype).max)
    x = jnp.asarray([largest, 0.99 * largest, -largest, 0], dtype)
    for numbers in (x, abs(x)):
        codes = first(numbers)
        for seed in range(10):
            numbers_kept = decoded(*codes, dtype)
            assert numbers_kept.dtype == dtype
            assert jnp.isfinite(numbers_kept).all()
            codes = following(numbers, codes, seed)


def test_random_bits_are_uniform_and_differ_from_step_to_step():
    shape = (100, 100)
    keys = map(jax.random.key, range(20))
    axis_bits = [random_axis_bits(key, [shape])[0] for key in keys]
    bits = np.stack([random_bits(shape, 15, numbers) for numbers in axis_bits])
    uniform = (bits + 0.5) / 2**15
    assert abs(uniform.mean() - 0.5) < 5 * np.sqrt(1 / 12 / bits.size)
    assert abs(uniform.var() - 1 / 12) < 5 * np.sqrt(1 / 180 / bits.size)
    flat = uniform.reshape(20, -1) - 0.5
    for a, b in [(flat[1:], flat[:-1]), (flat[:, 1:], flat[:, :-1])]:
        assert abs(np.mean(a * b) * 12) < 5 / np.sqrt(a.size)


@pytest.mark.parametrize("few", [-1e-3, -1e-30])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_few_tiny_numbers_of_the_other_sign_do_not_set_the_scale(few, sign):
    x = sign * np.where(np.arange(4096) == 7, few, 1000).astype(np.float32)
    codes = zeros(x.shape)
    for seed in range(8):
        codes = following(x, codes, seed)
        ratio = np.delete(np.asarray(decoded(*codes)) / x, 7)
        assert ratio.min() >= 0.5
        assert ratio.max() <= 2


@pytest.mark.parametrize("steps", range(4))
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e3, 1e12])
@pytest.mark.parametrize("signs", [(1, 1), (1, -1)], ids=["non-negative", "signed"])
def test_after_zeros_numbers_of_any_size_are_known_in_two_steps(steps, size, signs):
    x = np.outer(signs, np.full(100, size)).astype(np.float32)
    codes = zeros(x.shape)
    for _ in range(steps):
        codes = following(jnp.zeros(x.shape), codes)
    for seed in range(3):
        codes = following(x, codes, seed)
    np.testing.assert_allclose(decoded(*codes), x, rtol=0.2)


def formats(kind, exponent, size):
    return Format(*(jnp.full(size, x, jnp.int32) for x in (kind, exponent)))


@pytest.mark.parametrize(
    ("kind", "zero", "octaves"), [(NON_NEGATIVE, 1, 40), (SIGNED, 128, 32)]
)
def test_the_scale_stays_with_three_to_seven_octaves_to_spare(kind, zero, octaves):
    highest = jnp.arange(zero + 2, 256, dtype=jnp.int32)
    lowest = jnp.full(highest.shape, 2 if kind == NON_NEGATIVE else 127, jnp.int32)
    one = Format(jnp.int32(kind), jnp.int32(0))
    levels = decode(highest.astype(jnp.uint8), one, jnp.dtype("float32"))
    octave = np.floor(np.log2(np.asarray(levels) + 1)).astype(int)
    new = next_format(formats(kind, 10, highest.size), lowest, highest)
    spare = octaves - octave
    assert {2, 3, 7, 8} <= set(spare.tolist())
    np.testing.assert_array_equal(new.kind, kind)
    moved = 10 + octave + 5 - octaves
    expected = np.where((spare >= 3) & (spare <= 7), 10, moved)
    np.testing.assert_array_equal(new.exponent, expected)


@pytest.mark.parametrize("kind", [UNKNOWN, NON_NEGATIVE, SIGNED])
def test_a_nan_keeps_the_kind_and_the_scale_but_not_the_window(kind):
    highest = jnp.arange(256, dtype=jnp.int32)
    last = formats(kind, WINDOWS[1], 256)
    new = next_format(last, jnp.zeros_like(highest), highest)
    np.testing.assert_array_equal(new.kind, last.kind)
    exponent = WINDOWS[0] if kind == UNKNOWN else WINDOWS[1]
    np.testing.assert_array_equal(new.exponent, exponent)


@pytest.mark.parametrize("kind", [UNKNOWN, NON_NEGATIVE, SIGNED])
def test_numbers_beyond_the_range_have_the_last_codes(kind):
    x = jnp.asarray([3e38, -3e38])
    (axis_bits,) = random_axis_bits(jax.random.key(0), [x.shape])
    to = Format(jnp.int32(kind), jnp.int32(-62))
    codes, lowest, highest = encode(x, to, axis_bits)
    np.testing.assert_array_equal(codes, [255, 1])
    assert (lowest, highest) == (1, 255)


@pytest.mark.parametrize(
    "extremes", [_codes._extremes_of_floats, _codes._extremes_in_one_reduction]
)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5, 7)])
@pytest.mark.parametrize("span", [(0, 1), (3, 200), (255, 256)])
def test_tpus_and_gpus_find_the_same_extremes(extremes, shape, span):
    codes = np.random.default_rng(0).integers(*span, shape, np.uint8)
    lowest, highest = extremes(jnp.asarray(codes))
    assert (lowest, highest) == (int(codes.min()), int(codes.max()))
    assert lowest.dtype == highest.dtype == jnp.int32


def test_what_one_window_missed_is_looked_for_in_the_other():
    def after(window, code):
        code = jnp.asarray([code], jnp.int32)
        return next_format(formats(UNKNOWN, window, 1), jnp.asarray([128]), code)

    assert after(WINDOWS[1], 255) == (UNKNOWN, WINDOWS[0])
    assert after(WINDOWS[0], 128) == (UNKNOWN, WINDOWS[1])
    assert after(WINDOWS[1], 254).kind == NON_NEGATIVE
    assert after(WINDOWS[0], 255).kind == NON_NEGATIVE


def test_minus_zero_is_no_negative_number():
    x = np.concatenate([np.linspace(1, 2, 99), [-0.0]]).astype(np.float32)
    assert first(x)[2].kind == NON_NEGATIVE


@pytest.mark.parametrize("shape", [(LONG + 5,), (LONG + 5, 2), (64, 1024)])
def test_random_bits_differ_by_key_and_by_array(shape):
    runs = []
    for seed in range(4):
        for axis_bits in random_axis_bits(jax.random.key(seed), [shape, shape]):
            bits = np.asarray(random_bits(shape, 15, axis_bits)).ravel()
            runs.append((bits + 0.5) / 2**15 - 0.5)
    limit = 6 / np.sqrt(runs[0].size)
    for i, run in enumerate(runs):
        assert abs(np.mean(run[1:] * run[:-1]) * 12) < limit or len(shape) > 1
        for other in runs[:i]:
            assert abs(np.mean(run * other) * 12) < limit
