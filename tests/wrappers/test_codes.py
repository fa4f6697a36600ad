"""The 8-bit codes: unbiased, of any range, never NaN from what is finite."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_rmsprop.wrappers import _codes
from optax_rmsprop.wrappers._codes import (
    CENTER,
    COARSE,
    FEWEST,
    FIRST,
    LAST,
    LEVELS_OF_SIGNED,
    MOST,
    NAN,
    NEGATIVE,
    SIGNED,
    UNKNOWN,
    WINDOWS,
    ZERO,
    Format,
    decode,
    encode,
    first_format,
    next_format,
    rows_of,
)
from optax_rmsprop.wrappers._rounding import LONG, random_axis_bits, random_bits

MANY = 40_000


@jax.jit
def encoded(x, to, seed):
    """Codes of one array, their format, and that for the next numbers."""
    (axis_bits,) = random_axis_bits(jax.random.key(seed), (x.shape,))
    codes, *extremes = encode(x, to, axis_bits)
    return codes, to, next_format(to, *extremes)


def first(x, seed=0):
    return encoded(x, first_format(jnp.asarray(x)), seed)


def following(x, last, seed=1):
    return encoded(x, last[2], seed)


def decoded(codes, of, _, dtype="float32"):
    return decode(codes, of, jnp.dtype(dtype))


def kept(x, seed=0):
    return np.asarray(decoded(*first(x, seed)), np.float64)


def zeros(shape, updates=0):
    """Codes of an array that was 0 in init and in so many updates."""
    codes = first(jnp.zeros(shape))
    for _ in range(updates):
        codes = following(jnp.zeros(shape), codes)
    return codes


def standard_errors(values, number):
    """By how many standard errors the mean of values misses a number.

    Levels are exact to the last bits of float32.
    """
    error = values.std() / np.sqrt(values.size) + 1e-6 * abs(number)
    return abs(values.mean() - number) / error


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
        assert part.std() > 0 or part[0] == pytest.approx(sign * fraction, rel=1e-6)


def test_rounding_to_the_nearest_would_fail_this():
    x = np.concatenate([np.full(MANY, 0.71), [1]])
    levels = np.unique(kept(jnp.asarray(x, jnp.float32))[:MANY])
    assert len(levels) == 2
    nearest = levels[np.argmin(np.abs(levels - 0.71))]
    noise = np.random.default_rng(0).normal(0, np.ptp(levels) / 2, MANY)
    assert standard_errors(nearest + noise, 0.71) > ODDS


@pytest.mark.parametrize(
    ("steps", "size"), [(0, 1e-18), (0, 1.0), (0, 1e12), (1, 1e-30), (1, 0.1), (2, 7e4)]
)
@pytest.mark.parametrize("signs", [(1,), (1, -1)], ids=["non-negative", "signed"])
def test_numbers_after_zeros_are_unbiased_from_the_first(signs, size, steps):
    x = np.outer(signs, np.full(MANY, 1.3 * size)).astype(np.float32)
    codes = zeros(x.shape, steps)  # two windows in turn: the first begins at 2⁻⁶²
    for seed in range(3):
        codes = following(x, codes, seed)
        stored = np.asarray(decoded(*codes), np.float64)
        for part, number in zip(stored, x[:, 0], strict=True):
            assert standard_errors(part, number) < ODDS


def test_the_next_numbers_know_the_kind_and_the_range_of_each_row():
    positive = np.linspace(1, 2, 64, dtype=np.float32)
    x = np.stack([positive, positive - 1.5, 0 * positive, 1e-9 * positive])
    codes = following(x, zeros(x.shape))
    np.testing.assert_array_equal(codes[1].levels, UNKNOWN)
    for seed in range(4):
        codes = following(x, codes, seed)
    n = int(244 / 1.35)  # one octave and 0.35 to spare
    levels = codes[1].levels.ravel().tolist()
    assert levels == [pytest.approx(n, abs=2), SIGNED, UNKNOWN, pytest.approx(n, abs=2)]
    stored = np.asarray(decoded(*codes))
    np.testing.assert_allclose(stored[[0, 2, 3]], x[[0, 2, 3]], rtol=1.01 / (n - 2))
    np.testing.assert_allclose(stored[1], x[1], atol=0.5 / LEVELS_OF_SIGNED)


def format_of(levels, lowest, rows=1):
    full = functools.partial(np.full, (rows, 1))
    return Format(full(levels, dtype=np.uint8), full(lowest, dtype=np.int16))


def test_the_worked_examples_of_the_module():
    format = format_of(4, 0)
    levels = decode(jnp.arange(1, 10, dtype=jnp.uint8)[None], format, np.float32)
    (axis_bits,) = random_axis_bits(jax.random.key(0), ((1, MANY),))
    codes, *_ = encode(jnp.full((1, MANY), 2.125), format, axis_bits)
    np.testing.assert_array_equal(levels[0], [1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4])
    values, counts = np.unique(codes, return_counts=True)
    assert values.tolist() == [5, 6]
    assert counts[1] == pytest.approx(MANY / 4, abs=5 * np.sqrt(MANY * 3 / 16))
    x = jnp.repeat(jnp.array([1.0, 4.0]), 64)[None]
    codes, _, found = encoded(x, format_of(UNKNOWN, -62), 0)
    assert (codes.min(), codes.max(), found.levels) == (189, 191, 56)
    assert encoded(x, found, 0)[2].levels == 103


@pytest.mark.parametrize("octaves", [0, 1, 12, 40, 90])
def test_the_range_of_a_row_decides_how_far_apart_its_levels_are(octaves):
    x = np.exp2(np.linspace(-octaves, 0, 513, dtype=np.float32))
    n = np.clip(int(244 / (octaves + 0.35)), FEWEST, MOST)
    assert first(x)[1].levels.item() == n
    stored = kept(x)
    inside = x > 2.0**-80.5
    errors = abs(stored / x - 1)[inside]
    assert 0.3 / n < errors.max() < 1.01 / n or octaves == 0
    np.testing.assert_allclose(stored[~inside], 2.0**-81, rtol=0.35)


def test_signed_levels_are_even_near_0():
    format, k = format_of(SIGNED, 0), jnp.arange(LEVELS_OF_SIGNED + 1)
    levels = decode((CENTER + k).astype(jnp.uint8)[None], format, np.float32)
    np.testing.assert_allclose(levels[0], k / LEVELS_OF_SIGNED, atol=1e-6)
    mirrored = decode((CENTER - k).astype(jnp.uint8)[None], format, np.float32)
    np.testing.assert_array_equal(mirrored, -levels)


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((4096,), (1,)),
        ((512, 256), (512, 1)),
        ((512, 63), (1, 1)),
        ((3, 3, 64, 64), (3, 3, 64, 1)),
        ((512, 16, 3, 3), (512, 1, 1, 1)),
        ((1, 64), (1, 1)),
    ],
)
def test_a_row_has_64_numbers_or_more(shape, rows):
    assert rows_of(shape) == rows


def test_what_lies_on_a_level_stays_there():
    x = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    for numbers in (x, x**2):
        codes = first(numbers)
        for seed in range(1, 20):
            again = encoded(decoded(*codes), codes[1], seed)
            # A level is exact to 3e-5 of the distance to the next.
            assert (np.asarray(again[0]) == codes[0]).mean() > 0.999


@pytest.mark.parametrize("scale", [1.0, 2.0**-40, 2.0**9])
def test_an_array_of_one_power_of_two_is_exact(scale):
    for seed in range(10):  # initial_scale=1 as in TensorFlow
        ratio = kept(np.full(4096, scale), seed) / scale
        assert np.median(abs(ratio - 1)) < 1e-6
        assert abs(ratio.mean() - 1) < 1e-5


def test_thirty_binades_in_one_array():
    x = 2.0 ** np.arange(-30, 1, dtype=np.float32)
    for numbers in (x, np.where(np.arange(31) % 2, x, -x)):
        stored = kept(np.repeat(numbers, 100)).reshape(31, 100)
        assert np.isfinite(stored).all()
        assert (np.abs(stored) <= 2.01 * np.abs(numbers[:, None]) + 2.0**-13).all()
    assert (kept(np.repeat(x, 100)) > 0).all()


def test_only_zeros_of_a_non_negative_row_become_zero():
    x = np.concatenate([10.0 ** np.arange(-37.0, 0), [0]]).astype(np.float32)
    stored = kept(x)
    assert (stored[:-1] > 0).all()
    assert stored[-1] == 0


def test_zeros_do_not_widen_the_range():
    x = np.linspace(1, 2, 128, dtype=np.float32)
    codes, with_zeros = first(x), first(x * (np.arange(128) % 3 > 0))
    for seed in range(3):
        levels = [int(c[1].levels.item()) for c in (codes, with_zeros)]
        assert levels == [pytest.approx(180, abs=10)] * 2
        codes, with_zeros = (
            following(decoded(*c), c, seed) for c in (codes, with_zeros)
        )


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
        # Signed levels are coarse there, because the last one must be finite.
        np.testing.assert_allclose(decoded(*codes), x, rtol=0.5)
        codes = following(x, codes, seed)
    finite = first(np.full((2, 50), np.finfo(np.float32).max, np.float32))
    assert np.isfinite(decoded(*finite)).all()


def test_a_spike_is_held_at_the_end_of_the_range_and_then_known():
    x = np.full(4096, 0.5, np.float32)
    spiked = x.copy()
    spiked[7] = 1e20
    codes = following(x, following(x, zeros(x.shape)))
    codes = following(spiked, codes)
    assert 0.6 < decoded(*codes)[7] < 1e20
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
    for _ in range(4):
        codes = following(x, codes)
    assert codes[1].levels == SIGNED
    np.testing.assert_allclose(decoded(*codes), x, rtol=0.3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_nan_and_leave_the_others_alone(bad):
    x = np.linspace(1, 2, 100, dtype=np.float32)
    for numbers in (x, x - 1.5):
        codes = zeros(x.shape)
        for _ in range(3):
            codes = following(numbers, codes)
        expected = codes[2]
        numbers = np.concatenate([numbers[:3], [bad], numbers[4:]]).astype(np.float32)
        for _ in range(5):
            codes = following(numbers, codes)
            assert np.isnan(decoded(*codes)[3])
            assert codes[1] == expected
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
    axis_bits = [random_axis_bits(key, (shape,))[0] for key in keys]
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
    codes = zeros(x.shape, steps)
    for seed in range(3):
        codes = following(x, codes, seed)
    np.testing.assert_allclose(decoded(*codes), x, rtol=0.2)


def test_a_format_is_kept_while_it_fits():
    """With n = 61, 4 octaves. The upper end is at k = 244, before the coarse levels."""
    last = format_of(61, 0, 5)
    smallest = np.array([[10], [9], [10], [10], [31]])  # 0.15 octaves are 9.2 levels
    largest = np.array([[237], [237], [238], [245], [200]])  # and 0.1 are 6.1
    new = next_format(last, jnp.asarray(FIRST + smallest), jnp.asarray(FIRST + largest))
    kept_rows = (new.levels == 61) & (new.lowest == 0)
    np.testing.assert_array_equal(kept_rows.ravel(), [True, False, False, False, False])
    # Octaves from the smallest to the largest level, and 0.35 to spare.
    fine = np.array([237, 237, 238, 250, 200])
    octaves = (fine - smallest.ravel()) / 61
    np.testing.assert_array_equal(
        new.levels.ravel()[1:], (244 / (octaves + 0.35))[1:] // 1
    )


def test_a_signed_format_is_kept_with_a_quarter_to_one_octave_to_spare():
    last, fine = format_of(SIGNED, 0, 4), LAST - CENTER - COARSE
    spare = np.array([[2], [3], [12], [13]])
    largest = jnp.asarray(CENTER + fine - spare)
    new = next_format(last, jnp.full((4, 1), CENTER), largest)
    np.testing.assert_array_equal(new.levels, SIGNED)
    np.testing.assert_array_equal(new.lowest.ravel() == 0, [False, True, True, False])


@pytest.mark.parametrize("zeros_before", range(4))
def test_a_nan_from_the_first_number_on_leaves_its_row_alone(zeros_before):
    x = np.outer([1, 1, -1], np.linspace(1, 2, 100)).astype(np.float32)
    x[0, 3] = x[2, 3] = np.nan
    codes = zeros(x.shape, zeros_before)
    for seed in range(6):
        codes = following(x, codes, seed)
    np.testing.assert_allclose(decoded(*codes), x, rtol=0.1)
    all_nan = following(np.full_like(x, np.nan), codes)
    np.testing.assert_array_equal(all_nan[2].levels, UNKNOWN)


@pytest.mark.parametrize("levels", [UNKNOWN, SIGNED, FEWEST, MOST])
def test_numbers_beyond_the_range_have_the_last_codes(levels):
    x = jnp.asarray([[3e38, -3e38, 0.0, -0.0]])
    (axis_bits,) = random_axis_bits(jax.random.key(0), (x.shape,))
    codes, lowest, highest = encode(x, format_of(levels, -62 * 2), axis_bits)
    if levels < FEWEST:
        np.testing.assert_array_equal(codes, [[LAST, FIRST, CENTER, CENTER]])
        assert (lowest, highest) == (FIRST, LAST)
    else:
        np.testing.assert_array_equal(codes, [[LAST, NEGATIVE, ZERO, ZERO]])
        assert (lowest, highest) == (LAST, NEGATIVE)


@pytest.mark.parametrize(
    "extremes",
    [
        _codes._extremes_on_cpu,
        _codes._extremes_on_tpu,
        _codes._extremes_in_one_reduction,
    ],
)
@pytest.mark.parametrize("shape", [(1,), (33, 80), (3, 5, 70)])
@pytest.mark.parametrize("span", [(0, 1), (0, 200), (150, 190), (253, 256)])
def test_all_devices_find_the_same_extremes(extremes, shape, span):
    codes = np.random.default_rng(0).integers(*span, shape, np.uint8)
    compiled = jax.jit(extremes, static_argnums=0)
    highest, lowest = compiled(rows_of(shape), jnp.asarray(codes))
    numbers = codes.astype(int)
    known = np.where(numbers == NAN, -1, numbers)
    np.testing.assert_array_equal(highest, known.max(axis=-1, keepdims=True))
    not_zero = np.where(numbers == ZERO, 256, numbers)
    np.testing.assert_array_equal(lowest, not_zero.min(axis=-1, keepdims=True))
    assert lowest.dtype == highest.dtype == jnp.int32


def test_what_one_window_missed_is_looked_for_in_the_other():
    def after(window, code):
        code = jnp.asarray([[code]], jnp.int32)
        return next_format(format_of(UNKNOWN, window), jnp.asarray([[CENTER]]), code)

    assert after(WINDOWS[1], LAST) == (UNKNOWN, WINDOWS[0])
    assert after(WINDOWS[0], CENTER) == (UNKNOWN, WINDOWS[1])
    assert after(WINDOWS[1], LAST - 1).levels >= FEWEST
    assert after(WINDOWS[0], LAST).levels >= FEWEST


def test_minus_zero_is_no_negative_number():
    x = np.concatenate([np.linspace(1, 2, 99), [-0.0]]).astype(np.float32)
    assert first(x)[2].levels >= FEWEST


@pytest.mark.parametrize("shape", [(LONG + 5,), (LONG + 5, 2), (64, 1024)])
def test_random_bits_differ_by_key_and_by_array(shape):
    runs = []
    for seed in range(4):
        for axis_bits in random_axis_bits(jax.random.key(seed), (shape, shape)):
            bits = np.asarray(random_bits(shape, 15, axis_bits)).ravel()
            runs.append((bits + 0.5) / 2**15 - 0.5)
    limit = 6 / np.sqrt(runs[0].size)
    for i, run in enumerate(runs):
        assert abs(np.mean(run[1:] * run[:-1]) * 12) < limit or len(shape) > 1
        for other in runs[:i]:
            assert abs(np.mean(run * other) * 12) < limit
