"""The kernel contract: what a backend is given, what it returns, what it may rely on. Stated here, once.

A backend is an object with a `name` and the methods below; the protocol `Kernels` in `logitloss._backends`
gives their signatures, `reference.py` their meaning line by line. Kernels know nothing of the package above
them: reductions, class weights, smoothing and upstream gradients reach them as numbers per class and row.

What a kernel is given
----------------------
NumPy arrays, validated: native byte order, aligned, but of any strides (0 and negative too), read-only or
memory-mapped, of any number of dimensions and more than 2**31 elements. `logits` (or `log_probabilities`) are
float16, bfloat16, float32 or float64. Their last axis holds the classes, at least one; the leading axes are
the rows, none of them meaning one row. Rows (elements, where there are no classes) count in C order of the
shape. float16 and bfloat16 load as float32. R stands for the result type: float64 for float64, else float32.
`num_threads` is an int of at least 1, and the result does not depend on it, to the last bit.

What a kernel fills
-------------------
An output belongs to the caller, has any strides, and is filled completely; None means not wanted. Inputs are
never written, but `grad`, and `out` where it has the logits' dtype, may be the logits, element for element.
Totals are float64 sums of the unrounded losses. No kernel reads outside a row: a bad label, or a value out of
its range, ends the work; the number of the first such row (element) is returned, outputs are unspecified.

Rules of value
--------------
- A coefficient of 0 takes its term away: 0 * inf = 0, but NaN stays NaN.
- A row that holds NaN or +inf, or -inf only, is poisoned: loss, gradient, softmax and entropy are NaN, with
  any coefficients. Its lse is what the definition gives: NaN, else +inf, else -inf.
- An ignored row has loss 0, figures 0 and gradient 0 whatever it holds, and an lse like any other row.
- The cost of a class, lse - x, is (largest - x) + log1p(others): the largest logit (first of equals) is left
  out of the others' sum, so that a loss keeps its relative precision however far its target is ahead. In a
  gradient, 1 - p of the largest is others / (1 + others), never a difference of rounded numbers.

Operations on rows
------------------
label_weight(target, weight, ignore_index, n_classes, num_threads) -> (sum, first_bad)
    The sum over rows not ignored of weight[label], or of 1 where weight is None. first_bad is -1 when all
    labels are in [0, n_classes). target: any integer dtype. weight: float64[n_classes], contiguous, or None.

cross_entropy(logits, target, ignore_index, beta, gamma, z_loss, scale, lse_in,
              loss, lse, figures, grad, num_threads) -> (total, counted, first_bad)
    loss_i = beta[y]*(lse - x_y) + sum_c gamma[c]*(lse - x_c) + z_loss*lse**2
    grad_i = scale_i*((beta[y] + sum(gamma) + 2*z_loss*lse)*p_c - beta[y]*[c == y] - gamma[c])
    target   any integer dtype, rows' shape
    beta     float64[n_classes], contiguous, or None for ones; gamma the same, None for zeros
    scale    a number, or float64, rows' shape
    lse_in   float64, rows' shape, or None. Used where grad is the only output: p = exp(x - lse_in) saves the
             first pass, 1 - p of the largest class is the sum of the others' p, a row whose lse_in is not
             finite is poisoned, and total is unspecified.
    loss     R, rows' shape
    lse      float64, rows' shape
    figures  float64, rows' shape and a last axis of five, contiguous; wanted only without beta, gamma,
             z_loss, lse_in and grad. Of each row, NaN if it is poisoned, in the order of FIGURES:
             rank                1 and as many classes as come before the target's: those of a larger logit,
                                 and of an equal one and a lower number
             top                 the class of the largest logit, first of equals
             top_probability     its p
             entropy             sum_c p_c*(lse - x_c)
             others_squared      the sum of p_c**2 over all classes but the top
    grad     logits' dtype and shape
    counted  the number of rows not ignored

soft_cross_entropy(logits, target, weight, target_scale, target_offset, z_loss, scale, lse_in,
                   loss, lse, grad, num_threads) -> total
    The same with class probabilities. With g_c = weight[c]*(target_scale*target_c + target_offset):
    loss_i = sum_c g_c*(lse - x_c) + z_loss*lse**2
    grad_i = scale_i*((sum(g) + 2*z_loss*lse)*p_c - g_c)
    target   any of the four float dtypes, logits' shape
    weight   float64[n_classes], contiguous, or None for ones

logsumexp(logits, lse, num_threads)         lse: float64 or R, rows' shape
softmax(logits, out, log, num_threads)      out: logits' dtype and shape; the logarithm if log
entropy(logits, out, num_threads)           out: float64 or R, rows' shape; sum_c p_c*(lse - x_c)

nll(log_probabilities, target, ignore_index, weight, loss, num_threads) -> (total, counted, first_bad)
    loss_i = -weight[y]*log_probabilities[i, y], or 0 if ignored; arguments as in cross_entropy.

Operations on elements, of any shape
------------------------------------
binary_cross_entropy_with_logits(logits, target, weight, pos_weight, label_smoothing, signed, scale,
                                 loss, grad, num_threads) -> (total, first_bad)
    With y = target, or (target + 1)/2 if signed, eps = label_smoothing,
    positive = pos_weight*((1-eps)*y + eps/2) and negative = (1-eps)*(1-y) + eps/2:
    loss = weight*(negative*softplus(x) + positive*softplus(-x))            R
    grad = scale*weight*(negative*sigmoid(x) - positive*sigmoid(-x))        logits' dtype
    All arrays have the logits' shape (often by strides of 0). target: any real or bool dtype;
    weight and pos_weight the same, or None for ones; scale the same, or a number.
    first_bad is -1, or with signed the first target not -1 or +1.

binary_cross_entropy(probabilities, target, weight, loss, num_threads) -> (total, first_bad)
    loss = -weight*(y*log(p) + (1-y)*log(1-p)), each logarithm at least -100. Bad: p or y not in [0, 1].

kl_div(log_probabilities, target, log_target, loss, num_threads) -> total
    loss = t*(log(t) - x), or with log_target exp(t)*(t - x). 0 where t, or exp(t), is 0 and x is not NaN.

sigmoid(logits, out, log, num_threads)      out: logits' dtype and shape; the logarithm if log

Counting, which the Cython backend alone does
---------------------------------------------
count_rows(loss, counted, figures, logits, target, ignored, counts, ranking, num_threads)
    Add rows whose loss is known to `counts`, laid out as `logitloss.evaluate.counts` says, for an evaluation.
    loss     R, of any shape; infinite ones have a bin, and no part in the mean
    counted  bool, contiguous, as many: which rows count; None for all
    figures  of classes, as cross_entropy fills it; a row of rank 0 does not count; or None
    logits, target  of binary labels, the loss's shape, any real dtype; or None. Those equal to `ignored` do
             not count, others outside [0, 1] are counted as bad.
    ranking  int64[2, 65536], to which such logits are added, the negatives' first
"""

# The last axis of `figures`
FIGURES = ("rank", "top", "top_probability", "entropy", "others_squared")

if __name__ == "_kernels":
    raise ImportError(
        "_kernels is the source folder of logitloss._kernels: import it under that name "
        "(this one would make a second copy of every kernel)"
    )
