"""Effective step sizes, computed from the state of an optimizer."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import tree_flatten_with_path
from jax.typing import ArrayLike

from optax_rmsprop import _errors
from optax_rmsprop._numerics import Moment, by_parts, divide
from optax_rmsprop.transforms import ScaleByRmsState, ScaleByStddevState
from optax_rmsprop.wrappers import CompressedState, decompress_state

# Products with the Hessian. In a network on digits, 24 gave four digits.
_STEPS = 32


class Diagnosis(NamedTuple):
    """The result of `diagnose`.

    Attributes:
      step_size: learning_rate / (root + eps), with the structure and shapes of the
        parameters: the factor of each coordinate's gradient in the last update.
      saturation: eps / (root + eps), in [0, 1], in the same structure: the step size
        as a fraction of the largest that eps allows. At 0 the gradient is fully
        normalized. At 1 eps alone determines the step, and the coordinate moves as in
        gradient descent with rate learning_rate / eps (with eps_in_sqrt,
        learning_rate / √eps).
      sharpness: the largest eigenvalue of diag(step_size) H, where H is the Hessian of
        the loss, a scalar. None unless a product with H was given. Above 2, plain
        RMSprop with these step sizes overshoots along the eigenvector by more in each
        update; above 2 (1 + m) with momentum m, and above (2 + 2 m) / (1 + 2 m) with
        nesterov. In training on all data at once it often rises to about that limit
        and stays there.
    """

    step_size: optax.Updates
    saturation: optax.Updates
    sharpness: jax.Array | None = None


@_errors.knows_foreign_names
def diagnose(
    opt_state: optax.OptState,
    learning_rate: optax.ScalarOrSchedule = 1e-2,
    eps: ArrayLike = 1e-8,
    *,
    eps_in_sqrt: bool = False,
    hessian_vector_product: Callable[[Any], Any] | None = None,
) -> Diagnosis:
    """Compute the effective step sizes of a state of RMSprop, and the share of eps.

        root       = √nu                            √var if centered
        step_size  = learning_rate / (root + eps)   eps_in_sqrt: … / √(root² + eps)
        saturation = eps / (root + eps)             eps_in_sqrt: √eps / √(root² + eps)
        sharpness  = λ_max(√step_size H √step_size)        of the Hessian H of the loss

    The state is not changed. `diagnose` may be called within `jax.jit`: if only a few
    numbers of the result are used, such as the median of each array for a log, XLA does
    not store the others. Momentum adds up to 1/(1 - momentum) such steps. Nesterov and
    weight decay are left out.

    Args:
      opt_state: the state of `rmsprop`, `scale_by_rms`, `scale_by_stddev` or a dialect,
        also inside `optax.chain`, `masked`, `inject_hyperparams`, `compress_state` and
        others. With `optax.partition` pass the state of one group,
        `opt_state.inner_states[label]`.
      learning_rate: the optimizer's, in [0, ∞), or its schedule, which is evaluated at
        the last update. With `inject_hyperparams` pass
        `opt_state.hyperparams["learning_rate"]`.
      eps: the optimizer's, in [0, ∞).
      eps_in_sqrt: whether eps is under the root, as in the optimizer.
      hessian_vector_product: None, or a function from v to H v, such as
        `lambda v: jax.jvp(jax.grad(loss), (params,), (v,))[1]`. v has the structure
        and shapes of the step sizes, and the dtype of the averages; H v must have the
        same structure and shapes. To judge the last update, take the parameters that it
        started from. There are 32 products, in one loop: use `jax.jit`.

    Returns:
      A `Diagnosis`: two trees with the structure and shapes of the parameters, in the
      dtype of the averages. In a complex leaf, the real and the imaginary part are the
      step sizes of the two parts. The sharpness is a scalar, or None. It comes from 32
      steps of the Lanczos method, which approaches the eigenvalue from below, up to
      rounding. It is too low if there are negative eigenvalues of a hundred times its
      size or more.

    Raises:
      TypeError: a number or option of the wrong kind; averages in less than float32;
        complex averages, if the sharpness is asked for.
      ValueError: a number out of its range; an `opt_state` without a state of RMSprop,
        with more than one, or of many runs; a negative average of squares; a product
        that is not like its vector.

    Example:
      >>> import jax.numpy as jnp, optax_rmsprop
      >>> tx = optax_rmsprop.rmsprop(learning_rate=0.1, decay=0.75, eps=1.0)
      >>> g = jnp.array([0.0, 6.0])
      >>> _, state = tx.update(g, tx.init(g))
      >>> optax_rmsprop.diagnose(state, 0.1, 1.0).step_size  # roots of 0 and 3
      Array([0.1  , 0.025], dtype=float32)

    References:
      `scale_by_rms`, `scale_by_stddev`: the same roots.
      Cohen et al., arXiv:2207.14484 and arXiv:2410.24206: the sharpness, and why it
      stays at 2.
    """
    learning_rate = _errors.schedule("learning_rate", learning_rate)
    eps = _errors.number("eps", eps)
    _errors.flags(eps_in_sqrt=eps_in_sqrt)
    state = _state_of_averages(opt_state)
    *_, moments = _errors.checked_slots("opt_state", state)  # nu, or mu and var
    _errors.not_negative("opt_state", moments)
    if callable(learning_rate):
        learning_rate = learning_rate(jnp.maximum(state.count - 1, 0))
    largest = jnp.sqrt(eps) if eps_in_sqrt else eps

    def over_root(numerator: ArrayLike, moment: jax.Array) -> jax.Array:
        def leaf(moment: jax.Array) -> jax.Array:
            zero, one, top = (jnp.asarray(x, moment.dtype) for x in (0, 1, numerator))
            # 1 * moment + 0 * 0²: `divide` takes a moment by its parts.
            unchanged = Moment.of(one, moment, zero, zero, zero)
            return divide(top, unchanged, eps, eps_in_sqrt)

        return by_parts(leaf, moment)

    step_size = jax.tree.map(functools.partial(over_root, learning_rate), moments)
    saturation = jax.tree.map(functools.partial(over_root, largest), moments)
    if hessian_vector_product is None:
        return Diagnosis(step_size, saturation)
    return Diagnosis(
        step_size, saturation, _sharpness(step_size, hessian_vector_product)
    )


def _sharpness(step_size: Any, product: Any) -> jax.Array:
    """Compute the largest eigenvalue of √step_size H √step_size.

    This matrix is symmetric, and has the eigenvalues of diag(step_size) H.
    """
    if not callable(product) or isinstance(product, type):
        raise TypeError(
            "`hessian_vector_product` must be None or a function from v to H v, got "
            + _errors.shown(product)
        )
    remedy = "the sharpness needs real parameters: leave out hessian_vector_product"
    for path, leaf in tree_flatten_with_path(step_size)[0]:
        _errors.inexact("opt_state", leaf, path, remedy=remedy, real=True)
    roots = jax.tree.map(jnp.sqrt, step_size)
    # One dtype for all of v: leaves in float32 and float64 have no common sum.
    dtype = np.result_type(np.float32, *(x.dtype for x in jax.tree.leaves(roots)))

    def scaled(v: Any) -> Any:
        v = jax.tree.map(lambda root, x: root * x.astype(root.dtype), roots, v)
        result = product(v)
        _errors.same_tree("hessian_vector_product", result, "its argument", v)
        structures: list[Any] = [jax.tree.structure(tree) for tree in (result, v)]
        if structures[0] != structures[1]:  # None in place of an array
            raise ValueError(
                "`hessian_vector_product` must have the structure of its argument: "
                + _errors.trees(*structures)
            )
        return jax.tree.map(
            lambda root, x: (root * jnp.asarray(x).astype(root.dtype)).astype(dtype),
            roots,
            result,
        )

    start = optax.tree.random_like(jax.random.key(0), roots, dtype=dtype)
    return _largest_eigenvalue(scaled, start)


def _largest_eigenvalue(product: Callable[[Any], Any], start: Any) -> jax.Array:
    """Estimate the largest eigenvalue of a symmetric matrix A by the Lanczos method.

        w     = A v - beta v_before
        alpha = w · v
        w     = w - alpha v
        beta  = |w|;  then v_before, v = v, w / beta

    The alphas are the diagonal, and the betas the other two, of a tridiagonal matrix.
    Its largest eigenvalue is the largest value of v · A v / v · v for the v that are
    combinations of start, A start, A² start and so on. Rounding makes later vectors
    less orthogonal, which repeats eigenvalues, but does not change the largest one.

    `jax.experimental.sparse.linalg.lobpcg_standard` takes four products a step, needs
    more than five numbers in one flat array, and stops early where there are many.
    """

    def normalized(w: Any) -> tuple[Any, jax.Array]:
        norm = optax.tree.norm(w)
        safe = jnp.where(norm > 0, norm, jnp.ones_like(norm))
        return jax.tree.map(lambda x: x / safe, w), norm

    def step(carry: Any, _: None) -> tuple[Any, Any]:
        before, v, beta = carry
        w = product(v)
        alpha = optax.tree.vdot(v, w)
        w = jax.tree.map(lambda w, v, u: w - alpha * v - beta * u, w, v, before)
        after, beta = normalized(w)
        return (v, after, beta), (alpha, beta)

    v, norm = normalized(start)
    first = optax.tree.zeros_like(v), v, jnp.zeros_like(norm)
    _, (alphas, betas) = jax.lax.scan(step, first, length=_STEPS)
    # After a beta of 0, everything is 0. The first alpha, which lies between the
    # eigenvalues, takes the place of these alphas, because 0 may lie above them all.
    goes_on = jnp.append(True, betas[:-1] > 0)
    alphas = jnp.where(goes_on, alphas, alphas[0])
    off_diagonal = jnp.diag(betas[:-1], 1)
    return jnp.linalg.eigvalsh(jnp.diag(alphas) + off_diagonal + off_diagonal.T)[-1]


def _state_of_averages(opt_state: Any) -> ScaleByRmsState | ScaleByStddevState:
    """Find the one state with averages in the state of an optimizer."""
    types = ScaleByRmsState, ScaleByStddevState
    is_leaf = lambda x: isinstance(x, (*types, CompressedState))  # noqa: E731
    found = []
    for node in jax.tree.leaves(opt_state, is_leaf=is_leaf):
        if isinstance(node, CompressedState):
            found.append(_state_of_averages(decompress_state(node)))
        elif isinstance(node, types):
            found.append(node)
    if len(found) != 1:
        raise ValueError(
            "`opt_state` must have one ScaleByRmsState or ScaleByStddevState, got "
            f"{len(found)}; pass the state of rmsprop, and with optax.partition the "
            "state of one group, opt_state.inner_states[label]"
        )
    return found[0]
