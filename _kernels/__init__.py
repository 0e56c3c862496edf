"""The kernel contract: what a backend is given, what it returns and what it may rely on. Stated here, once.

A backend is an object with a `name` and the methods below; the protocol `Kernels` in `logitloss._backends` gives
their signatures and `reference.py` their meaning, line by line. Kernels know nothing of the package above them:
reductions, class weights, label smoothing and upstream gradients reach them as numbers per class and per row.

What a kernel is given
----------------------
NumPy arrays, validated: native byte order, aligned, but with any strides (0 and negative too), read-only or
memory-mapped, of any number of dimensions and more than 2**31 elements. `logits` (`log_probabilities`) are
float16, bfloat16, float32 or float64 and have the classes, at least one, on their last axis; the leading axes are
the rows, none of them meaning one row. Rows, and elements where there are no rows, count in C order of the shape.
float16 and bfloat16 load as float32. R stands for the result type: float32 for them and for float32, float64 for
float64. `num_threads` is an int of at least 1; the result does not depend on it, to the last bit.

What a kernel fills
-------------------
An output belongs to the caller, has any strides, and is filled completely; None means not wanted. Inputs are never
written, but `grad` (and `out` where it has the logits' dtype) may be the logits themselves, element for element.
Totals are float64 sums of the unrounded losses. No kernel reads outside a row: a bad label, or a value outside its
range, ends the work, its row (element) number is returned, the first of them all, and the outputs are unspecified.

Rules of value
--------------
- A coefficient of 0 takes its term away: 0 * inf = 0.
- A row that holds NaN or +inf, or -inf only, is poisoned: loss and gradient are NaN, whatever its coefficients.
  Its lse is what the definition gives: NaN, else +inf, else -inf.
- An ignored row has loss 0, hit 0 and gradient 0 whatever it holds, and an lse like any other row.
- lse - x is (largest - x) + log1p(others), the largest (first of equals) left out of the others' sum: so the loss
  of a row keeps its relative precision however far the target is ahead. In the gradient the largest class's
  1 - p is others / (1 + others), never a difference of rounded numbers.

The operations
--------------
label_weight(target, weight, ignore_index, n_classes, num_threads) -> (sum, first_bad)
    The sum over rows not ignored of weight[label], or of 1 where weight is None; first_bad is -1 when all labels are
    in [0, n_classes). target: any integer dtype. weight: float64[n_classes], contiguous, or None.

cross_entropy(logits, target, ignore_index, beta, gamma, z_loss, scale, lse_in, loss, lse, hit, grad, num_threads)
        -> (total, counted, first_bad)
    target: any integer dtype, rows' shape. beta, gamma: float64[n_classes], contiguous; None means ones and zeros.
    loss[i] = beta[y]*(lse - x_y) + sum_c gamma[c]*(lse - x_c) + z_loss*lse**2             R, rows' shape
    grad[i] = scale[i]*((beta[y] + sum(gamma) + 2*z_loss*lse)*p_c - beta[y]*[c == y] - gamma[c])   logits' dtype, shape
    lse: float64, rows' shape. hit: uint8, rows' shape, 1 where the largest logit (first of equals) is the
    target's; 0 in a row with NaN. scale: float64, rows' shape (often of strides 0), or None for ones.
    lse_in: float64, rows' shape, or None. It is used where grad is the only output: p = exp(x - lse_in) saves the
    first pass, 1 - p of the largest class is the sum of the others' p, and total is unspecified. A row whose lse_in is
    not finite is poisoned. counted is the number of rows not ignored.

soft_cross_entropy(logits, target, weight, target_scale, target_offset, z_loss, scale, lse_in, loss, lse, grad,
        num_threads) -> total
    The same with class probabilities. target: any of the four float dtypes, logits' shape. With
    g = weight[c]*(target_scale*target + target_offset), weight float64[n_classes] contiguous or None for ones:
    loss[i] = sum_c g_c*(lse - x_c) + z_loss*lse**2;  grad[i] = scale[i]*((sum(g) + 2*z_loss*lse)*p_c - g_c)

logsumexp(logits, lse, num_threads)         lse: float64, rows' shape
softmax(logits, out, log, num_threads)      out: logits' dtype and shape; its logarithm if log
entropy(logits, out, num_threads)           out: float64, rows' shape; sum_c p_c*(lse - x_c)
nll(log_probabilities, target, ignore_index, weight, loss, num_threads) -> (total, counted, first_bad)
    loss[i] = -weight[y]*log_probabilities[i, y], 0 where ignored; shapes and types as in cross_entropy.

The rest works element by element, on any shape:

binary_cross_entropy_with_logits(logits, target, weight, pos_weight, label_scale, label_offset, signed, scale,
        loss, grad, num_threads) -> (total, first_bad)
    All arrays have the logits' shape (often by strides of 0); target is of any real or bool dtype; weight,
    pos_weight and scale are of any real dtype, or None for ones. With y = label_scale*target + label_offset:
    loss = weight*((1-y)*softplus(x) + pos_weight*y*softplus(-x))                               R
    grad = scale*weight*((1-y)*sigmoid(x) - pos_weight*y*sigmoid(-x))                           logits' dtype
    first_bad is -1, or with signed the first target other than -1 and +1.
binary_cross_entropy(probabilities, target, weight, loss, num_threads) -> (total, first_bad)
    loss = -weight*(y*log(p) + (1-y)*log(1-p)), each logarithm at least -100; bad: p or y not in [0, 1].
kl_div(log_probabilities, target, log_target, loss, num_threads) -> total
    loss = t*(log(t) - input), or with log_target exp(t)*(t - input); 0 where t (exp(t)) is 0 and input is no NaN.
sigmoid(logits, out, log, num_threads)      out: logits' dtype and shape; its logarithm if log
"""

if __name__ == "_kernels":
    raise ImportError(
        "_kernels is the source folder of logitloss._kernels: import it under that name (this one would make a second "
        "copy of every kernel)"
    )
