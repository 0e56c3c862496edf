/* Vector operations of one real type; included by vector.h once for each. V(name) is f32_name or f64_name. */
#define V(name) PASTE(REAL, name)

#ifdef REAL_IS_F64
typedef double V(real);
typedef int64_t V(bits);
#define INTRINSIC(name) _mm512_##name##_pd
#define MASKED(name) _mm512_##name##_pd_mask
#define MASK __mmask8
#define INTRINSIC_256(name) _mm256_##name##_pd
#else
typedef float V(real);
typedef int32_t V(bits);
#define INTRINSIC(name) _mm512_##name##_ps
#define MASKED(name) _mm512_##name##_ps_mask
#define MASK __mmask16
#define INTRINSIC_256(name) _mm256_##name##_ps
#endif

typedef V(real) V(vector) __attribute__((vector_size(VECTOR_BYTES)));
typedef V(bits) V(ivector) __attribute__((vector_size(VECTOR_BYTES)));
typedef V(real) V(unaligned) __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(V(real))), may_alias));
enum { V(LANES) = VECTOR_BYTES / sizeof(V(real)) };

INLINE V(vector) V(load)(const V(real) *p) { return *(const V(unaligned) *)p; }
INLINE void V(store)(V(real) *p, V(vector) v) { *(V(unaligned) *)p = v; }
INLINE V(vector) V(all)(V(real) value) { return value - (V(vector)){0}; }

/* Integer vectors of the same width: exponents, and lane numbers in comparisons. */
INLINE V(ivector) V(all_bits)(V(bits) value) { return value - (V(ivector)){0}; }

/* 0, 1, 2, ... */
INLINE V(vector) V(numbers)(void)
{
    V(vector) number;
    for (int i = 0; i < V(LANES); i++)
        number[i] = (V(real))i;
    return number;
}

#ifdef VECTOR_AVX512
/* ---- masks are registers of bits */
typedef MASK V(mask);
INLINE V(vector) V(fma)(V(vector) a, V(vector) b, V(vector) c) { return INTRINSIC(fmadd)(a, b, c); }
INLINE V(mask) V(greater)(V(vector) a, V(vector) b) { return MASKED(cmp)(a, b, _CMP_GT_OQ); }
INLINE V(mask) V(equal)(V(vector) a, V(vector) b) { return MASKED(cmp)(a, b, _CMP_EQ_OQ); }
INLINE V(mask) V(nonzero)(V(vector) a) { return MASKED(cmp)(a, V(all)(0), _CMP_NEQ_UQ); }
INLINE uint64_t V(lane_bits)(V(mask) mask) { return mask; }
INLINE int V(any)(V(mask) mask) { return mask != 0; }
INLINE V(vector) V(keep)(V(mask) mask, V(vector) a) { return INTRINSIC(maskz_mov)(mask, a); }
INLINE V(vector) V(drop)(V(mask) mask, V(vector) a) { return INTRINSIC(maskz_mov)((V(mask))~mask, a); }
INLINE V(vector) V(choose)(V(mask) mask, V(vector) a, V(vector) b)
{
    return INTRINSIC(mask_blend)(mask, b, a);
}
/* a > b ? a : b, hence b where one of them is NaN. */
INLINE V(vector) V(max)(V(vector) a, V(vector) b) { return INTRINSIC(max)(a, b); }
/* a + b in the mask, else a */
INLINE V(vector) V(add_kept)(V(mask) mask, V(vector) a, V(vector) b)
{
    return INTRINSIC(mask_add)(a, mask, a, b);
}
/* a*2^n of whole n, 0 for those that are no normal number's exponent */
INLINE V(vector) V(scale_normal)(V(vector) a, V(vector) n)
{
    const V(real) none = sizeof(V(real)) == 8 ? -1023 : -127;
    return INTRINSIC(maskz_scalef)(MASKED(cmp)(n, V(all)(none), _CMP_NLE_UQ), a, n);
}
#ifdef REAL_IS_F64
INLINE V(mask) V(equal_bits)(V(ivector) a, V(ivector) b)
{
    return _mm512_cmpeq_epi64_mask((__m512i)a, (__m512i)b);
}
INLINE V(mask) V(differ_bits)(V(ivector) a, V(ivector) b)
{
    return _mm512_cmpneq_epi64_mask((__m512i)a, (__m512i)b);
}
INLINE V(mask) V(below_bits)(V(ivector) a, V(ivector) b)
{
    return _mm512_cmplt_epi64_mask((__m512i)a, (__m512i)b);
}
INLINE V(ivector) V(choose_bits)(V(mask) mask, V(ivector) a, V(ivector) b)
{
    return (V(ivector))_mm512_mask_blend_epi64(mask, (__m512i)b, (__m512i)a);
}
#else
INLINE V(mask) V(equal_bits)(V(ivector) a, V(ivector) b)
{
    return _mm512_cmpeq_epi32_mask((__m512i)a, (__m512i)b);
}
INLINE V(mask) V(differ_bits)(V(ivector) a, V(ivector) b)
{
    return _mm512_cmpneq_epi32_mask((__m512i)a, (__m512i)b);
}
INLINE V(mask) V(below_bits)(V(ivector) a, V(ivector) b)
{
    return _mm512_cmplt_epi32_mask((__m512i)a, (__m512i)b);
}
INLINE V(ivector) V(choose_bits)(V(mask) mask, V(ivector) a, V(ivector) b)
{
    return (V(ivector))_mm512_mask_blend_epi32(mask, (__m512i)b, (__m512i)a);
}
#endif
#else
/* ---- masks are vectors of all-ones lanes */
typedef V(ivector) V(mask);
INLINE V(vector) V(fma)(V(vector) a, V(vector) b, V(vector) c)
{
#ifdef VECTOR_AVX2
    return INTRINSIC_256(fmadd)(a, b, c);
#else
    return a * b + c;
#endif
}
INLINE V(mask) V(greater)(V(vector) a, V(vector) b) { return (V(mask))(a > b); }
INLINE V(mask) V(equal)(V(vector) a, V(vector) b) { return (V(mask))(a == b); }
INLINE V(mask) V(nonzero)(V(vector) a) { return (V(mask))(a != V(all)(0)); }
/* A bit for each lane */
INLINE uint64_t V(lane_bits)(V(mask) mask)
{
#if defined VECTOR_AVX2
    return (unsigned)INTRINSIC_256(movemask)((V(vector))mask);
#else
    uint64_t found = 0;
    for (int i = 0; i < V(LANES); i++)
        found |= (uint64_t)(mask[i] & 1) << i;
    return found;
#endif
}
INLINE int V(any)(V(mask) mask) { return V(lane_bits)(mask) != 0; }
INLINE V(vector) V(keep)(V(mask) mask, V(vector) a) { return (V(vector))(mask & (V(mask))a); }
/* The lanes that are not in the mask; said so, the compiler makes no slower blend of it. */
INLINE V(vector) V(drop)(V(mask) mask, V(vector) a)
{
#ifdef VECTOR_AVX2
    return INTRINSIC_256(andnot)((V(vector))mask, a);
#else
    return V(keep)(~mask, a);
#endif
}
INLINE V(ivector) V(choose_bits)(V(mask) mask, V(ivector) a, V(ivector) b)
{
    return (mask & a) | (~mask & b);
}
INLINE V(vector) V(choose)(V(mask) mask, V(vector) a, V(vector) b)
{
#ifdef VECTOR_AVX2
    return INTRINSIC_256(blendv)(b, a, (V(vector))mask);
#else
    return (V(vector))V(choose_bits)(mask, (V(ivector))a, (V(ivector))b);
#endif
}
INLINE V(vector) V(max)(V(vector) a, V(vector) b)
{
#ifdef VECTOR_AVX2
    return INTRINSIC_256(max)(a, b);
#else
    return V(choose)(V(greater)(a, b), a, b);
#endif
}
INLINE V(mask) V(equal_bits)(V(ivector) a, V(ivector) b) { return (V(mask))(a == b); }
INLINE V(mask) V(below_bits)(V(ivector) a, V(ivector) b) { return (V(mask))(a < b); }
#endif

/* n, and one more in the mask's lanes */
INLINE V(ivector) V(add_one)(V(mask) mask, V(ivector) n)
{
#ifdef VECTOR_AVX512
    return V(choose_bits)(mask, n + 1, n);
#else
    return n - mask;
#endif
}

/* How often masks' lanes were set, of n masks of at most 64 lanes at once: AVX-512 has more to spare outside
 * its vectors. */
#ifdef VECTOR_AVX512
typedef ptrdiff_t V(counter);
INLINE V(counter) V(no_count)(void) { return 0; }
INLINE V(counter) V(count)(V(counter) count, const V(mask) *mask, int n)
{
    uint64_t bits = 0;
    for (int j = 0; j < n; j++)
        bits |= (uint64_t)mask[j] << (j * V(LANES));
    return count + __builtin_popcountll(bits);
}
INLINE ptrdiff_t V(counted)(V(counter) count) { return count; }
#else
typedef V(ivector) V(counter);
INLINE V(counter) V(no_count)(void) { return V(all_bits)(0); }
INLINE V(counter) V(count)(V(counter) count, const V(mask) *mask, int n)
{
    for (int j = 0; j < n; j++)
        count -= mask[j];
    return count;
}
INLINE ptrdiff_t V(counted)(V(counter) count)
{
    ptrdiff_t sum = 0;
    for (int i = 0; i < V(LANES); i++)
        sum += count[i];
    return sum;
}
#endif

/* a < b ? a : b, hence b where one of them is NaN. */
INLINE V(vector) V(min)(V(vector) a, V(vector) b)
{
#if defined VECTOR_AVX512
    return INTRINSIC(min)(a, b);
#elif defined VECTOR_AVX2
    return INTRINSIC_256(min)(a, b);
#else
    return V(choose)(V(greater)(b, a), a, b);
#endif
}

#ifdef VECTOR_AVX512
/* The reals at p in the mask's lanes, `filler` in the others; nothing else is read */
INLINE V(vector) V(load_kept)(const V(real) *p, V(mask) kept, V(real) filler)
{
    return INTRINSIC(mask_loadu)(V(all)(filler), kept, p);
}
#endif

/* The first n reals at p, and `filler` in the lanes behind them; nothing else is read */
INLINE V(vector) V(load_first)(const V(real) *p, ptrdiff_t n, V(real) filler)
{
#if defined VECTOR_AVX512
    unsigned lanes = n < 0 ? 0 : n < V(LANES) ? (unsigned)n : V(LANES);
    return V(load_kept)(p, (MASK)((1u << lanes) - 1), filler);
#elif defined VECTOR_AVX2
    V(mask) first = V(greater)(V(all)((V(real))n), V(numbers)());
    return V(choose)(first, INTRINSIC_256(maskload)(p, (__m256i)first), V(all)(filler));
#else
    V(real) ALIGNED lane[V(LANES)];
    V(store)(lane, V(all)(filler));
    for (int i = 0; i < n && i < V(LANES); i++)
        lane[i] = p[i];
    return V(load)(lane);
#endif
}

/* Of each lane, the real at its place among as many as a vector has */
INLINE V(vector) V(spread)(const V(real) *numbers, V(ivector) at)
{
#if defined VECTOR_AVX512
    return INTRINSIC(permutexvar)((__m512i)at, V(load)(numbers));
#elif defined VECTOR_AVX2 && defined REAL_IS_F64
    return _mm256_i64gather_pd(numbers, (__m256i)at, sizeof(double));
#elif defined VECTOR_AVX2
    return _mm256_permutevar8x32_ps(V(load)(numbers), (__m256i)at);
#else
    V(vector) v;
    for (int i = 0; i < V(LANES); i++)
        v[i] = numbers[at[i]];
    return v;
#endif
}

/* Of each lane's lowest bits, what stands there in a table of two vectors (AVX2: of one) */
#if defined VECTOR_AVX512 && defined REAL_IS_F64
INLINE V(ivector) V(look_up)(const V(bits) *table, V(ivector) at)
{
    const __m512i *t = (const __m512i *)(const void *)table;
    return (V(ivector))_mm512_permutex2var_epi64(t[0], (__m512i)at, t[1]);
}
#elif defined VECTOR_AVX512
INLINE V(ivector) V(look_up)(const V(bits) *table, V(ivector) at)
{
    const __m512i *t = (const __m512i *)(const void *)table;
    return (V(ivector))_mm512_permutex2var_epi32(t[0], (__m512i)at, t[1]);
}
#elif defined VECTOR_AVX2 && defined REAL_IS_F64
INLINE V(ivector) V(look_up)(const V(bits) *table, V(ivector) at)
{
    /* As halves, twice the place and one more */
    __m256i low = _mm256_shuffle_epi32((__m256i)at, 0xa0), even = _mm256_add_epi32(low, low);
    __m256i place = _mm256_or_si256(even, _mm256_set1_epi64x((int64_t)1 << 32));
    return (V(ivector))_mm256_permutevar8x32_epi32(*(const __m256i *)(const void *)table, place);
}
#elif defined VECTOR_AVX2
INLINE V(ivector) V(look_up)(const V(bits) *table, V(ivector) at)
{
    return (V(ivector))_mm256_permutevar8x32_epi32(*(const __m256i *)(const void *)table, (__m256i)at);
}
#endif

/* Within each 16 bytes, the low (high) halves of a and b, their elements in turn */
INLINE V(vector) V(interleave_low)(V(vector) a, V(vector) b)
{
#if defined VECTOR_AVX512
    return INTRINSIC(unpacklo)(a, b);
#elif defined VECTOR_AVX2
    return INTRINSIC_256(unpacklo)(a, b);
#elif defined REAL_IS_F64
    return (V(vector)){a[0], b[0]};
#else
    return (V(vector)){a[0], b[0], a[1], b[1]};
#endif
}
INLINE V(vector) V(interleave_high)(V(vector) a, V(vector) b)
{
#if defined VECTOR_AVX512
    return INTRINSIC(unpackhi)(a, b);
#elif defined VECTOR_AVX2
    return INTRINSIC_256(unpackhi)(a, b);
#elif defined REAL_IS_F64
    return (V(vector)){a[1], b[1]};
#else
    return (V(vector)){a[2], b[2], a[3], b[3]};
#endif
}

INLINE V(vector) V(abs)(V(vector) a) { return V(max)(a, -a); }

/* A store that leaves the cache alone, where there is one; `p` is aligned to the vector. */
INLINE void V(stream)(V(real) *p, V(vector) v)
{
#if defined VECTOR_AVX512
    INTRINSIC(stream)(p, v);
#elif defined VECTOR_AVX2
    INTRINSIC_256(stream)(p, v);
#else
    V(store)(p, v);
#endif
}

#ifndef REAL_IS_F64
/* As many floats as a vector has doubles, as those and back: one operation, where compilers take three for
 * each half */
typedef float f32_half_vector __attribute__((vector_size(VECTOR_BYTES / 2)));
INLINE f64_vector f32_widened(f32_half_vector floats)
{
#ifdef VECTOR_AVX512
    return _mm512_cvtps_pd((__m256)floats);
#elif defined VECTOR_AVX2
    return _mm256_cvtps_pd((__m128)floats);
#else
    return __builtin_convertvector(floats, f64_vector);
#endif
}
INLINE f32_half_vector f32_narrowed(f64_vector doubles)
{
#ifdef VECTOR_AVX512
    return (f32_half_vector)_mm512_cvtpd_ps(doubles);
#elif defined VECTOR_AVX2
    return (f32_half_vector)_mm256_cvtpd_ps(doubles);
#else
    return __builtin_convertvector(doubles, f32_half_vector);
#endif
}
#endif

/* Sum, exact but for one rounding in double, and largest over the lanes */
INLINE double V(lanes_sum)(V(vector) v)
{
#ifdef REAL_IS_F64
    double lane[f64_LANES];
    memcpy(lane, &v, VECTOR_BYTES);
    for (int width = f64_LANES / 2; width > 1; width /= 2)
        for (int i = 0; i < width; i++)
            lane[i] += lane[i + width];
    return lane[0] + lane[1];
#else
    f32_half_vector part[2];
    memcpy(part, &v, VECTOR_BYTES);
    return f64_lanes_sum(f32_widened(part[0]) + f32_widened(part[1]));
#endif
}
INLINE V(real) V(lanes_max)(V(vector) v)
{
#ifdef VECTOR_AVX512
    return INTRINSIC(reduce_max)(v);
#else
    V(real) lane[V(LANES)];
    memcpy(lane, &v, VECTOR_BYTES);
    for (int width = V(LANES) / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++)
            lane[i] = lane[i + width] > lane[i] ? lane[i + width] : lane[i];
    return lane[0];
#endif
}

/* A sum by lane of many terms: chains of eight additions, and what the sum of chains loses to rounding kept
 * apart, so that the whole is as good as its terms. */
typedef struct {
    V(vector) chain, sum, lost;
} V(long_sum);

INLINE void V(fold)(V(long_sum) *total)
{
    V(vector) sum = total->sum + total->chain, added = sum - total->sum;
    total->lost += (total->sum - (sum - added)) + (total->chain - added);
    total->sum = sum;
    total->chain = V(all)(0);
}
INLINE void V(add_term)(V(long_sum) *total, V(vector) term, ptrdiff_t number)
{
    total->chain += term;
    if (number % 8 == 7)
        V(fold)(total);
}
INLINE V(vector) V(whole)(V(long_sum) *total)
{
    V(fold)(total);
    V(vector) whole = total->sum + total->lost;
    return V(choose)(V(greater)(V(all)(INFINITY), V(abs)(total->sum)), whole, total->sum);
}

#undef V
#undef INTRINSIC
#undef MASKED
#undef MASK
#undef INTRINSIC_256
