/* Exponentials of a row's few classes, of which only ratios are wanted: in losses and gradients any factor
 * that a row's exponentials have in common cancels. Included once for each real type.
 *
 * That is a freedom which floats of AVX-512 use: 2^f is one of sixteen factors, which a register holds, times
 * a polynomial of three terms. The factors are those of 2^0 to 2^(15/16) times 2^0.04595: there all sixteen
 * are within 0.13 ulp of floats (by themselves within 0.4), so that a product is as good as elementary.h's
 * six terms are, 0.15 ulp before rounding. With nothing to multiply and add but five times for eight, a
 * forward pass over images takes 0.89 of the time.
 */
#define V(name) PASTE(REAL, name)

#if defined VECTOR_AVX512 && !defined REAL_IS_F64
enum { RATIO_BITS = 4, RATIO_PARTS = 1 << RATIO_BITS };

/* Of each factor, the mantissa less what its number adds to it */
static const int32_t ALIGNED f32_ratio_parts[] = {0x42491,  0x1fe49,  0x1a50,   -0x1846a, -0x2dad4, -0x3e5bb,
                                                  -0x4a1c7, -0x50b7a, -0x51f2f, -0x4d917, -0x43538, -0x32f6c,
                                                  -0x1c35c, 0x137e,   0x259dd,  0x514b1};
/* (2^f - 1)/f for |f| <= 1/32 */
static const float f32_ratio_terms[] = {0x1.c6af32p-5f, 0x1.ebfff2p-3f, 0x1.62e43p-1f};

/* What exp(x)*2^-k needs of k */
INLINE f32_exp_scale f32_ratio_scale_of(f32_vector k)
{
    f32_exp_scale scale = f32_exp_scale_of(k);
    scale.magic -= MAGIC - MAGIC / RATIO_PARTS; /* leaves the factor's number in the lowest bits */
    return scale;
}

INLINE void f32_exps_in_ratio(f32_vector *x, int n, const f32_exp_scale *scale, int step, int zeros,
                              f32_ivector *is_lost)
{
    const f32_vector least = f32_all(MAGIC / RATIO_PARTS + 1); /* the exponent's place is at least 1 */
    const f32_ivector most =
        (f32_ivector)f32_all(MAGIC / RATIO_PARTS) | ((EXPONENT_BIAS + 1) * 2 * RATIO_PARTS - 1);
    f32_vector shifted[8], factor[8], p[8];
    f32_mask is_normal[8];
    for (int j = 0; j < n && !zeros; j++)
        x[j] = f32_max(scale[j * step].floor + 0.6931473f, x[j]);
    f32_exp_rounded(x, shifted, n, scale, step);
    for (int j = 0; j < n; j++) {
        is_normal[j] = f32_not_below(shifted[j], least);
        /* What is too large becomes NaN: no factor's mantissa is that of infinity. */
        f32_ivector power = f32_min_bits((f32_ivector)shifted[j], most) << (MANTISSA_BITS - RATIO_BITS);
        f32_ivector part = (f32_ivector)f32_spread((const float *)f32_ratio_parts, (f32_ivector)shifted[j]);
        factor[j] = (f32_vector)(power + part);
        p[j] = f32_all(f32_ratio_terms[0]);
    }
    for (int k = 1; k < 3; k++)
        for (int j = 0; j < n; j++)
            p[j] = f32_fma(p[j], x[j], f32_all(f32_ratio_terms[k]));
    for (int j = 0; j < n; j++) {
        p[j] *= x[j];
        x[j] = zeros ? f32_fma_kept(is_normal[j], p[j], factor[j], factor[j])
                     : f32_fma(p[j], factor[j], factor[j]);
    }
    for (int j = 0; j < (step ? n : 1); j++)
        is_lost[j] = f32_all_bits(0);
}
#else
INLINE V(exp_scale) V(ratio_scale_of)(V(vector) k) { return V(exp_scale_of)(k); }
INLINE void V(exps_in_ratio)(V(vector) *x, int n, const V(exp_scale) *scale, int step, int zeros,
                             V(ivector) *is_lost)
{
    (void)zeros;
    V(exps_fine)(x, n, scale, step, is_lost);
}
#endif
INLINE V(vector) V(exp_in_ratio)(V(vector) x, V(exp_scale) scale)
{
    V(ivector) is_lost;
    V(exps_in_ratio)(&x, 1, &scale, 0, 1, &is_lost);
    return x;
}
#undef V
