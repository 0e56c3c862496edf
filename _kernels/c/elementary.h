/* exp and log1p of a vector, inlined, about 1 ulp each; included once for each real type.
 *
 * exp(x) = 2^n * 2^f with n = round(x*log2(e)) and |f| <= 1/2. The integer n is added to a large constant,
 * which rounds it and leaves it in the low bits, and those shifted to the exponent's place are the factor
 * 2^n. A scale 2^-k costs nothing then: k is subtracted from the constant. (A factor, not an addition to the
 * exponent of 2^f: that would turn NaN into numbers.)
 *
 * f = x*LOG2E - n in one fused step is exact but for its last bit, for the base 2^LOG2E, which is e but for
 * the rounding of LOG2E: 0.1 ulp for each nat of x, in a row for each nat below the largest, as long as all
 * of the row has one base.
 */
#define V(name) PASTE(REAL, name)

#ifdef REAL_IS_F64
#define MAGIC 0x1.8p52
#define LOG2E 0x1.71547652b82fep0
#define MANTISSA_BITS 52
#define EXPONENT_BIAS 1023
#define LN2_A 0x1.62e42fefa39efp-1
#define LN2_1 0x1.62e42feep-1
#define LN2_2 0x1.a39ef356p-33
#define LN2_3 0x1.93c7673007e5fp-65
#else
#define MAGIC 0x1.8p23f
#define LOG2E 0x1.715476p0f
#define MANTISSA_BITS 23
#define EXPONENT_BIAS 127
#define LN2_A 0x1.62e43p-1f
#define LN2_1 0x1.62p-1f
#define LN2_2 0x1.c8p-10f
#define LN2_3 0x1.7f7d1cp-20f
#endif

/* How many of f's highest bits are looked up in a row's sum, where registers can be a table: the polynomial
 * of the rest has three terms (float64 four, of four parts two) less, for a look-up and an addition of
 * integers. */
#if defined VECTOR_AVX512 && defined REAL_IS_F64
#define PART_BITS 4
#elif defined VECTOR_AVX512
#define PART_BITS 5
#elif defined VECTOR_AVX2 && defined REAL_IS_F64
#define PART_BITS 2
#elif defined VECTOR_AVX2
#define PART_BITS 3
#else
#define PART_BITS 0
#endif
#define PARTS (1 << PART_BITS)

/* The largest |x| whose f is exact to the last bit: beyond it x is first taken relative to its row's largest,
 * a subtraction which is exact there. */
#if defined REAL_IS_F64 && defined VECTOR_FMA
#define DIRECT (0x1p30 / PARTS)
#elif defined REAL_IS_F64
#define DIRECT 0x1p19
#elif defined VECTOR_FMA
#define DIRECT (0x1p21f / PARTS)
#else
#define DIRECT 0x1p15f
#endif

/* The base of a row's exponentials, as its logarithm */
#ifdef VECTOR_FMA
#define LOG2_BASE ((double)LOG2E)
#else
#define LOG2_BASE 0x1.71547652b82fep0
#endif

#ifndef VECTOR_FMA
/* x - n*ln2, ln2 in three parts whose products are exact */
INLINE V(vector) V(reduced)(V(vector) x, V(vector) n) { return ((x - n * LN2_1) - n * LN2_2) - n * LN2_3; }
#endif

/* 2^f for |f| <= 1/2, minimax: relative error 0.8 ulp before rounding; one term longer (`is_fine`) 0.07 ulp
 * (0.02 of float64): for short rows, whose few terms' errors do not average out. */
#ifdef REAL_IS_F64
static const double f64_exp2_terms[] = {0x1.e3a76cecb450bp-28,
                                        0x1.b671aae394b99p-24,
                                        0x1.62c148885ff7cp-20,
                                        0x1.ffcb58d33d341p-17,
                                        0x1.4309126bad01ap-13,
                                        0x1.5d87fe9b8b9c2p-10,
                                        0x1.3b2ab6fbd6e65p-7,
                                        0x1.c6b08d703e198p-5,
                                        0x1.ebfbdff82c431p-3,
                                        0x1.62e42fefa3a12p-1,
                                        1};
static const double f64_exp2_fine_terms[] = {
    0x1.e80e102deef7fp-32, 0x1.e611a244666eap-28, 0x1.b5260e1e7251fp-24, 0x1.62bfcddd35308p-20,
    0x1.ffcbfbf896b77p-17, 0x1.4309130c01a37p-13, 0x1.5d87fe78b3bfdp-10, 0x1.3b2ab6fba11f3p-7,
    0x1.c6b08d704a0d4p-5,  0x1.ebfbdff82c59cp-3,  0x1.62e42fefa39efp-1,  1};
#else
static const float f32_exp2_terms[] = {0x1.5bda40p-10f, 0x1.3ce8acp-7f, 0x1.c6b6d8p-5f,
                                       0x1.ebf9c2p-3f,  0x1.62e42ap-1f, 1};
static const float f32_exp2_fine_terms[] = {
    0x1.3eb2a0p-13f, 0x1.5f0b86p-10f, 0x1.3b320ap-7f, 0x1.c6af76p-5f, 0x1.ebfbd6p-3f, 0x1.62e430p-1f, 1};
#endif

/* Of each part, the mantissa of 2^(i/PARTS) less what i adds to it; and 2^f for |f| <= 1/2/PARTS: relative
 * error 0.45 ulp before rounding, 0.3 of eight parts, 0.07 of float64 (0.03 of four parts) */
#if PART_BITS == 4
static const int64_t ALIGNED f64_parts[] = {0x0,
                                            -0x4aa7930676f1,
                                            -0x8d47c382ae85,
                                            -0xc785918a9dc8,
                                            -0xf901f5ce48eb,
                                            -0x12159b3edcbde,
                                            -0x140252ac9d5d9,
                                            -0x154f822b7abd7,
                                            -0x15f619980c433,
                                            -0x15eeb8c14fe79,
                                            -0x1531abdd55f25,
                                            -0x13b6e7d5c0f70,
                                            -0x1176066a52c53,
                                            -0xe664227aad64,
                                            -0xa7e723045b79,
                                            -0x5b505d5b6f26};
static const double f64_part_terms[] = {0x1.430a49610efc6p-13,
                                        0x1.5d89be4c12513p-10,
                                        0x1.3b2ab6fb09b31p-7,
                                        0x1.c6b08d6e8a384p-5,
                                        0x1.ebfbdff82c594p-3,
                                        0x1.62e42fefa39fdp-1,
                                        1};
#elif PART_BITS == 2
static const int64_t ALIGNED f64_parts[] = {0x0, -0xf901f5ce48eb, -0x15f619980c433, -0x1176066a52c53};
static const double f64_part_terms[] = {0x1.62f42ff813501p-20, 0x1.ffeb435b51452p-17, 0x1.430910e6af5b8p-13,
                                        0x1.5d87fdb9aa2cfp-10, 0x1.3b2ab6fbb201dp-7,  0x1.c6b08d7050cbdp-5,
                                        0x1.ebfbdff82c58ap-3,  0x1.62e42fefa39edp-1,  1};
#elif PART_BITS == 5
static const int32_t ALIGNED f32_parts[] = {
    0x0,      -0x13279, -0x2553d, -0x367f1, -0x46a3e, -0x55bc6, -0x63c2d, -0x70b10,
    -0x7c810, -0x872c6, -0x90ace, -0x98fbd, -0xa0129, -0xa5ea5, -0xaa7c1, -0xadc0a,
    -0xafb0d, -0xb0451, -0xaf75c, -0xad3b3, -0xa98d6, -0xa4642, -0x9db74, -0x957e2,
    -0x8bb03, -0x80448, -0x73321, -0x646f9, -0x53f39, -0x41b46, -0x2da83, -0x17c4d};
static const float f32_part_terms[] = {0x1.ebfcccp-3f, 0x1.62e584p-1f, 1};
#elif PART_BITS == 3
static const int32_t ALIGNED f32_parts[] = {0x0,      -0x46a3e, -0x7c810, -0xa0129,
                                            -0xafb0d, -0xa98d6, -0x8bb03, -0x53f39};
static const float f32_part_terms[] = {0x1.c6bb7ap-5f, 0x1.ec0f92p-3f, 0x1.62e430p-1f, 1};
#endif

/* In place for n <= 8 vectors step by step, as the chain of one is longer than a processor looks ahead. Many
 * terms go even and odd powers by themselves, for half the latency. */
INLINE void V(polynomial)(const V(real) *terms, int n_terms, V(vector) *f, int n)
{
    const int at_once = n_terms > 9 ? 2 : 1;
    V(vector) p[2][8], step[8];
    for (int j = 0; j < n; j++) {
        step[j] = at_once == 2 ? f[j] * f[j] : f[j];
        p[0][j] = V(all)(terms[0]);
        p[1][j] = V(all)(terms[1]);
    }
#pragma GCC unroll 16
    for (int k = at_once; k < n_terms; k++)
#pragma GCC unroll 8
        for (int j = 0; j < n; j++)
            p[k % at_once][j] = V(fma)(p[k % at_once][j], step[j], V(all)(terms[k]));
    for (int j = 0; j < n; j++)
        f[j] = at_once == 2 ? V(fma)(p[n_terms % 2][j], f[j], p[1 - n_terms % 2][j]) : p[0][j];
}

INLINE void V(exp2_units)(V(vector) *f, int n, int is_fine)
{
    if (is_fine)
        V(polynomial)(V(exp2_fine_terms), sizeof V(exp2_fine_terms) / sizeof(V(real)), f, n);
    else
        V(polynomial)(V(exp2_terms), sizeof V(exp2_terms) / sizeof(V(real)), f, n);
}

INLINE V(vector) V(exp2_unit)(V(vector) f)
{
    V(exp2_units)(&f, 1, sizeof(V(real)) == 8);
    return f;
}

/* x*log2_base - n */
INLINE V(vector) V(fraction)(V(vector) x, V(vector) n, double log2_base)
{
#ifdef VECTOR_FMA
    return V(fma)(x, V(all)((V(real))log2_base), -n);
#else
    (void)log2_base;
    return V(reduced)(x, n) * LOG2E;
#endif
}

/* 2^n for integers n in the exponent's range; less gives 0 */
INLINE V(vector) V(power_of_2)(V(vector) n)
{
    V(vector) bounded = V(max)(n, V(all)(-EXPONENT_BIAS));
    return (V(vector))((V(ivector))(bounded + (MAGIC + EXPONENT_BIAS)) << MANTISSA_BITS);
}

/* What exp(x)*2^-k needs of k: the rounding constant, and the x at which the exponent's place holds 0, a
 * factor of 0: under it the result would be no normal number. */
typedef struct {
    V(vector) magic, floor;
} V(exp_scale);

INLINE V(exp_scale) V(exp_scale_of)(V(vector) k)
{
    V(exp_scale) scale = {(MAGIC + EXPONENT_BIAS) - k,
                          (k - V(all)(EXPONENT_BIAS)) * V(all)((V(real))0x1.62e42fefa39efp-1)};
    return scale;
}

/* To x the fraction of x*log2_base, to `shifted` the whole, whose low bits are the exponent's place. `scale`
 * is that of all if `step` is 0, or there is one for each if it is 1. */
INLINE void V(exp_rounded)(V(vector) *x, V(vector) *shifted, int n, const V(exp_scale) *scale, int step)
{
    for (int j = 0; j < n; j++)
        shifted[j] = V(fma)(x[j], V(all)(LOG2E), scale[j * step].magic);
    for (int j = 0; j < n; j++)
        x[j] = V(fraction)(x[j], shifted[j] - scale[j * step].magic, LOG2_BASE);
}

/* The rounding constant that leaves parts in the low bits, too */
INLINE V(vector) V(parts_magic)(V(exp_scale) scale) { return scale.magic - (MAGIC - MAGIC / PARTS); }

/* 2^n times the part of 2 that the lowest bits say */
INLINE V(vector) V(power_of_parts)(V(vector) shifted)
{
    V(ivector) power = (V(ivector))shifted << (MANTISSA_BITS - PART_BITS);
#if PART_BITS
    power += V(look_up)(V(parts), (V(ivector))shifted);
#endif
    return (V(vector))power;
}

/* exp(x)*2^-k (in a row's base) of n <= 8 vectors, in place but for a factor `power`, by parts, for a row's
 * sum; for x <= (k + EXPONENT_BIAS)*ln2 that are at least the floor or NaN, |k*ln2| <= DIRECT */
INLINE void V(exp_parts)(V(vector) *x, V(vector) *power, int n, V(exp_scale) scale)
{
    scale.magic = V(parts_magic)(scale);
    V(exp_rounded)(x, power, n, &scale, 0);
    for (int j = 0; j < n; j++)
        power[j] = V(power_of_parts)(power[j]);
#if PART_BITS
    V(polynomial)(V(part_terms), sizeof V(part_terms) / sizeof(V(real)), x, n);
#else
    V(exp2_units)(x, n, 0);
#endif
}
INLINE V(vector) V(exp_scaled)(V(vector) x, V(exp_scale) scale)
{
    V(vector) power;
    x = V(max)(scale.floor, x);
    V(exp_parts)(&x, &power, 1, scale);
    return x * power;
}

#ifndef VECTOR_AVX512
/* What exps_fine does with some of its vectors. From the floor on nothing is under MAGIC, so what is beyond
 * the exponent's place has other bits, which gather in `bits`. */
INLINE void V(exps_fine_of)(V(vector) *x, int n, const V(exp_scale) *scale, int step, V(ivector) *bits)
{
    V(vector) power[8];
    for (int j = 0; j < n; j++)
        x[j] = V(max)(scale[j * step].floor, x[j]);
    V(exp_rounded)(x, power, n, scale, step);
    for (int j = 0; j < n; j++) {
        bits[j * step] |= (V(ivector))power[j];
        power[j] = (V(vector))((V(ivector))power[j] << MANTISSA_BITS);
    }
    V(exp2_units)(x, n, 1);
    for (int j = 0; j < n; j++)
        x[j] *= power[j];
}
#endif

/* The same with the longer polynomial and for every x: 0 at -inf, NaN at NaN. `is_lost`, in steps as those of
 * `scale`, gets all bits where one was NaN or too large, if its result does not say so. */
INLINE void V(exps_fine)(V(vector) *x, int n, const V(exp_scale) *scale, int step, V(ivector) *is_lost)
{
    const int n_lost = step ? n : 1;
#ifdef VECTOR_AVX512
    /* One operation scales by 2^n, whatever n: it needs no bounds (16.4 operations a class became 15.4). */
    V(vector) power[8];
    V(exp_rounded)(x, power, n, scale, step);
    for (int j = 0; j < n; j++)
        power[j] -= MAGIC + EXPONENT_BIAS;
    V(exp2_units)(x, n, 1);
    for (int j = 0; j < n; j++)
        x[j] = V(scale_normal)(x[j], power[j]);
    for (int j = 0; j < n_lost; j++)
        is_lost[j] = V(all_bits)(0);
#else
    const V(ivector) fit = (V(ivector))V(all)(MAGIC) | (2 * EXPONENT_BIAS + 1);
    /* In two parts AVX2's registers hold more of it: short rows gain 7 %. SSE2 loses 5 % by it. */
    const int half = VECTOR_BYTES > 16 && n > 4 ? (n + 1) / 2 : n;
    for (int j = 0; j < n_lost; j++)
        is_lost[j] = fit;
    V(exps_fine_of)(x, half, scale, step, is_lost);
    V(exps_fine_of)(x + half, n - half, scale + half * step, step, is_lost + half * step);
    for (int j = 0; j < n_lost; j++)
        is_lost[j] = is_lost[j] != fit;
#endif
}
INLINE V(vector) V(exp_fine)(V(vector) x, V(exp_scale) scale)
{
    V(ivector) is_lost;
    V(exps_fine)(&x, 1, &scale, 0, &is_lost);
    return x;
}

/* exp(x) of four vectors x <= 0, in place, step by step: the chain of one is longer than a processor looks
 * ahead. To the last subnormal number if `deep`, the power of two then made far above them and brought down
 * in a second product; else what is under 2^-125 (2^-1021) is that, and NaN becomes any number. */
INLINE void V(exp_nonpositive)(V(vector) x[4], int deep)
{
    const V(real) lowest = -(V(real))(EXPONENT_BIAS + (deep ? MANTISSA_BITS + 2 : -2)) * (V(real))0.6931472;
    const V(real) magic = MAGIC + (deep ? EXPONENT_BIAS + (EXPONENT_BIAS + 1) / 2 : 0);
    V(vector) shifted[4];
    for (int j = 0; j < 4; j++)
        x[j] = V(max)(V(all)(lowest), x[j]);
    for (int j = 0; j < 4; j++)
        shifted[j] = V(fma)(x[j], V(all)(LOG2E), V(all)(magic));
    for (int j = 0; j < 4; j++)
        x[j] = V(fraction)(x[j], shifted[j] - magic, LOG2_BASE);
    V(exp2_units)(x, 4, 0);
    for (int j = 0; j < 4; j++) {
        V(ivector) power = (V(ivector))shifted[j] << MANTISSA_BITS;
        if (deep)
            x[j] *= (V(vector))power * (sizeof(V(real)) == 8 ? (V(real))0x1p-512 : (V(real))0x1p-64);
        else
            x[j] = (V(vector))((V(ivector))x[j] + power);
    }
}

/* log1p(t) for 0 <= t <= 1, as t plus t times a polynomial in t - 1/2, which is small: so are its errors.
 * Even and odd powers by themselves, for half the latency. */
#ifdef REAL_IS_F64
static const double f64_log1p_terms[] = {
    -0x1.13788517c57adp-16, 0x1.a559f644e23cbp-16, -0x1.1a86e5b7f73bep-16, 0x1.cc425de24e74ap-16,
    -0x1.dd753a72cffc7p-15, 0x1.7891983fc96f3p-14, -0x1.22096dd51788dp-13, 0x1.cf98c8e149ef4p-13,
    -0x1.74d2ea026634p-12,  0x1.2c73e06e26be4p-11, -0x1.e6f12ed14b88ep-11, 0x1.8d3f99e229dp-10,
    -0x1.469c8b2ad1f49p-9,  0x1.0f1192238ef22p-8,  -0x1.c72c62f0cd62ap-8,  0x1.83c50b0c3b617p-7,
    -0x1.50abf6cca9cbbp-6,  0x1.2bec9fba5578ep-5,  -0x1.1540afd54b032p-4,  0x1.0f95b3dc0a107p-3,
    -0x1.2773a5da90bdbp-2,  -0x1.833704d019ed0p-3};
#else
static const float f32_log1p_terms[] = {-0x1.a932f4p-9f, 0x1.584884p-8f, -0x1.ba5cd6p-8f, 0x1.7b53cep-7f,
                                        -0x1.510612p-6f, 0x1.2c1e28p-5f, -0x1.153fb2p-4f, 0x1.0f9550p-3f,
                                        -0x1.2773a6p-2f, -0x1.833704p-3f};
#endif

INLINE V(vector) V(log1p_unit)(V(vector) t)
{
    const V(real) *terms = V(log1p_terms);
    V(vector) u = t - (V(real))0.5, square = u * u, odd = V(all)(terms[0]), even = V(all)(terms[1]);
#pragma GCC unroll 16
    for (int k = 2; k < (int)(sizeof V(log1p_terms) / sizeof *terms); k += 2) {
        odd = V(fma)(odd, square, V(all)(terms[k]));
        even = V(fma)(even, square, V(all)(terms[k + 1]));
    }
    return V(fma)(t, V(fma)(odd, u, even), t);
}

/* log1p(t) for t >= 0, +inf included */
INLINE V(vector) V(log1p_nonnegative)(V(vector) t)
{
    V(vector) one_plus = t + (V(real))1, zero = V(all)(0);
    V(ivector) exponent = ((V(ivector))one_plus >> MANTISSA_BITS) - EXPONENT_BIAS;
    V(vector) mantissa = (V(vector))((V(ivector))one_plus - (exponent << MANTISSA_BITS));
    V(vector) power = (V(vector))(exponent + (V(ivector))V(all)(MAGIC)) - MAGIC;
    V(mask) small = V(greater)(V(all)(1), t);
    V(vector) log = V(log1p_unit)(V(choose)(small, t, mantissa - (V(real))1));
    log = V(fma)(V(choose)(small, zero, power), V(all)(LN2_A), log);
    return V(choose)(V(greater)(V(all)(INFINITY), t), log, t);
}
#undef V
