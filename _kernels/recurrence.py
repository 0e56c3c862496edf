"""The steps both Numba twins share: what a pass over a row keeps, how two parts merge, what follows from it.

A pass keeps (m, s): m is the largest logit, the top (first of equals), and s the sum of exp(x - m) over the
others. The top stays out of the sum, so that a loss keeps its relative precision however far its target is
ahead. Coefficients by class add (weight, gap): of the others, sum gamma and sum gamma*(m - x). From these
follow loss and gradient, whose entries are alpha*p - scale*gamma but at the top and at the label, where
1 - p may be far below the rounding of p.

`steps` makes the steps for one real type and one machine. `jit` compiles a function to be inlined; `ops` has
what each machine does in its own way, on numbers or on vectors of them:
    fma, absolute
    maximum(a, b), minimum(a, b)    a > b ? a : b, a < b ? a : b
    where(condition, a, b)          a choice without a branch
    exp(d), expm1(d)                for d <= 0 (and a little over); exp is 0 at -inf, NaN at NaN
    log1p(t)                        for t >= 0; NaN at NaN
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def steps(jit: Callable[..., Any], ops: Any, real: Callable[[float], Any]) -> SimpleNamespace:
    """Return the steps for one real type, float32 or float64 of NumPy."""
    zero, one, two = real(0), real(1), real(2)
    infinity, nan, small = real(float("inf")), real(float("nan")), real(1e-3)
    fma, absolute, maximum, minimum, where = ops.fma, ops.absolute, ops.maximum, ops.minimum, ops.where
    exp, expm1, log1p = ops.exp, ops.expm1, ops.log1p

    # ---- of a row ----

    @jit
    def share(x, m):
        """exp(x - m) for x <= m: 0 for -inf, whatever m."""
        return where(x == -infinity, zero, exp(x - m))

    @jit
    def merge(m, s, other_m, other_s):
        """Add the others' classes of two parts of a row, the earlier part first."""
        high, low = maximum(other_m, m), minimum(m, other_m)
        return high, fma(s, share(m, high), fma(other_s, share(other_m, high), share(low, high)))

    @jit
    def reference(m):
        """Return what gaps are taken from: m, or 0 as long as every logit is -inf and none the top."""
        return where(m > -infinity, m, zero)

    @jit
    def gap_of(gamma, m, x):
        """gamma*(m - x), and 0 where gamma is 0, whatever x."""
        return where(gamma == zero, zero, gamma * (reference(m) - x))

    @jit
    def merge_gaps(m, weight, gap, top_weight, other_m, other_weight, other_gap, other_top_weight):
        """Merge (weight, gap) and the top's gamma of two parts of a row, the earlier part first."""
        other_is_top = other_m > m
        high, low = maximum(other_m, m), where(other_is_top, m, other_m)
        low_top_weight = where(other_is_top, top_weight, other_top_weight)
        rises = gap_of(weight, high, reference(m)) + gap_of(other_weight, high, reference(other_m))
        return (
            weight + other_weight + low_top_weight,
            gap + other_gap + rises + gap_of(low_top_weight, high, low),
            where(other_is_top, other_top_weight, top_weight),
        )

    @jit
    def softmax_of(m, s):
        """Return log1p of the others' sum, lse, p of the top and of the others.

        All but lse are NaN in a row that is poisoned: by NaN, by +inf, by -inf only.
        """
        others = where(absolute(m) < infinity, s, nan)
        log1p_others = log1p(others)
        lse = where(others == others, m + log1p_others, m + s * zero)
        p_top = one / (one + others)
        return log1p_others, lse, p_top, others * p_top

    @jit
    def softmax_from(m, s, lse):
        """Return the same where lse is given, `s` being needed only where the top is very likely."""
        ahead = where(absolute(lse) < infinity, m - lse, nan)
        rest, p_top = -expm1(ahead), exp(ahead)
        return -ahead, lse, p_top, where(rest > small, rest, s * p_top)

    @jit
    def loss_of(m, log1p_others, lse, weight, gap, top_weight, beta, target_logit, z_loss):
        """beta*(lse - target_logit) + sum gamma*(lse - x) + z_loss*lse**2; 0*inf = 0, but NaN stays."""
        poison = zero * log1p_others
        loss = where(beta == zero, poison, beta * ((m - target_logit) + log1p_others))
        loss = loss + ((weight + top_weight) * log1p_others + gap)
        return loss if z_loss == zero else loss + (lse * z_loss * lse + poison)

    @jit
    def gradient_of(
        m, log1p_others, lse, p_top, p_others, weight, top_weight, beta, label_gamma, target_logit, z_loss
    ):
        """Return alpha, and the entries at the top and at the label, all to be multiplied by scale.

        The top's is for rows with coefficients by class whose label is another class; the label's holds
        wherever the label is, be it one of several tops.
        """
        z_slope = lse * (two * z_loss) if z_loss != zero else zero * lse
        alpha = beta + (weight + top_weight) + z_slope
        at_top = p_top * (weight + z_slope + beta) - p_others * top_weight
        own = beta + label_gamma
        if_top = p_top * (weight + z_slope + (top_weight - label_gamma)) - p_others * own
        p = exp(target_logit - m) * p_top
        return alpha, at_top, where(target_logit == m, if_top, alpha * p - own)

    # ---- of an element ----

    @jit
    def softplus(x):
        """log(1 + exp(x))."""
        return maximum(x, zero) + log1p(exp(-absolute(x)))

    @jit
    def sigmoid(x):
        """1/(1 + exp(-x))."""
        e = exp(-absolute(x))
        return where(x < zero, e, one) / (one + e)

    return SimpleNamespace(
        share=share,
        merge=merge,
        reference=reference,
        gap_of=gap_of,
        merge_gaps=merge_gaps,
        softmax_of=softmax_of,
        softmax_from=softmax_from,
        loss_of=loss_of,
        gradient_of=gradient_of,
        exp=exp,
        softplus=softplus,
        sigmoid=sigmoid,
    )
