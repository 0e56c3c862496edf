/* Rows of contiguous classes to class-major lanes and back, in registers; included once for each real type.
 *
 * A vector is taken as pieces of 16 bytes, each from another row, PIECE rows apart: so loads and stores move
 * whole pieces, and a transpose stays within them. Rows that are no whole pieces end with one that overlaps.
 */
#define V(name) PASTE(REAL, name)

enum { V(PIECE) = 16 / sizeof(V(real)) };

/* From four (float64: two) vectors of a class run each, those of each class; it is its own inverse. */
INLINE void V(transpose)(V(vector) *v)
{
#ifdef REAL_IS_F64
    V(vector) low = V(interleave_low)(v[0], v[1]);
    v[1] = V(interleave_high)(v[0], v[1]);
    v[0] = low;
#else
    f64_vector low[2], high[2];
    for (int i = 0; i < 2; i++) {
        low[i] = (f64_vector)V(interleave_low)(v[2 * i], v[2 * i + 1]);
        high[i] = (f64_vector)V(interleave_high)(v[2 * i], v[2 * i + 1]);
    }
    v[0] = (V(vector))f64_interleave_low(low[0], low[1]);
    v[1] = (V(vector))f64_interleave_high(low[0], low[1]);
    v[2] = (V(vector))f64_interleave_low(high[0], high[1]);
    v[3] = (V(vector))f64_interleave_high(high[0], high[1]);
#endif
}

/* The pieces at p, p + stride, ... (in reals) */
INLINE V(vector) V(load_pieces)(const V(real) *p, ptrdiff_t stride)
{
#if defined VECTOR_AVX512
    __m512 v = _mm512_castps128_ps512(_mm_loadu_ps((const float *)p));
    v = _mm512_insertf32x4(v, _mm_loadu_ps((const float *)(p + stride)), 1);
    v = _mm512_insertf32x4(v, _mm_loadu_ps((const float *)(p + 2 * stride)), 2);
    return (V(vector))_mm512_insertf32x4(v, _mm_loadu_ps((const float *)(p + 3 * stride)), 3);
#elif defined VECTOR_AVX2
    __m256 v = _mm256_castps128_ps256(_mm_loadu_ps((const float *)p));
    return (V(vector))_mm256_insertf128_ps(v, _mm_loadu_ps((const float *)(p + stride)), 1);
#else
    (void)stride;
    return V(load)(p);
#endif
}

INLINE void V(store_pieces)(V(real) *p, ptrdiff_t stride, V(vector) v)
{
#if defined VECTOR_AVX512
    _mm_storeu_ps((float *)p, _mm512_castps512_ps128((__m512)v));
    _mm_storeu_ps((float *)(p + stride), _mm512_extractf32x4_ps((__m512)v, 1));
    _mm_storeu_ps((float *)(p + 2 * stride), _mm512_extractf32x4_ps((__m512)v, 2));
    _mm_storeu_ps((float *)(p + 3 * stride), _mm512_extractf32x4_ps((__m512)v, 3));
#elif defined VECTOR_AVX2
    _mm_storeu_ps((float *)p, _mm256_castps256_ps128((__m256)v));
    _mm_storeu_ps((float *)(p + stride), _mm256_extractf128_ps((__m256)v, 1));
#else
    (void)stride;
    V(store)(p, v);
#endif
}

/* n_rows rows of n_classes reals, `stride` apart, to lanes[class*lanes_stride + row]. The last vector of rows
 * need not be whole; rows shorter than a piece go one by one too. */
static void V(rows_to_lanes)(const V(real) *x, ptrdiff_t stride, ptrdiff_t n_rows, ptrdiff_t n_classes,
                             V(real) *lanes, ptrdiff_t lanes_stride)
{
    ptrdiff_t whole = n_classes < V(PIECE) ? 0 : n_rows / V(LANES) *V(LANES), c = 0;
    for (ptrdiff_t done = 0; done < n_classes && whole; done += V(PIECE)) {
        c = done < n_classes - V(PIECE) ? done : n_classes - V(PIECE);
        const V(real) *from = x + c;
        V(real) *to = lanes + c * lanes_stride;
        for (ptrdiff_t i = 0; i < whole; i += V(LANES), from += V(LANES) *stride) {
            V(vector) v[V(PIECE)];
            for (int j = 0; j < V(PIECE); j++)
                v[j] = V(load_pieces)(from + j * stride, V(PIECE) *stride);
            V(transpose)(v);
            for (int j = 0; j < V(PIECE); j++)
                V(store)(to + j * lanes_stride + i, v[j]);
        }
    }
    for (ptrdiff_t i = whole; i < n_rows; i++)
        for (c = 0; c < n_classes; c++)
            lanes[c * lanes_stride + i] = x[i * stride + c];
}

/* And back */
static void V(lanes_to_rows)(const V(real) *lanes, ptrdiff_t lanes_stride, ptrdiff_t n_rows,
                             ptrdiff_t n_classes, V(real) *out, ptrdiff_t stride)
{
    ptrdiff_t whole = n_classes < V(PIECE) ? 0 : n_rows / V(LANES) *V(LANES), c = 0;
    for (ptrdiff_t done = 0; done < n_classes && whole; done += V(PIECE)) {
        c = done < n_classes - V(PIECE) ? done : n_classes - V(PIECE);
        const V(real) *from = lanes + c * lanes_stride;
        V(real) *to = out + c;
        for (ptrdiff_t i = 0; i < whole; i += V(LANES), to += V(LANES) *stride) {
            V(vector) v[V(PIECE)];
            for (int j = 0; j < V(PIECE); j++)
                v[j] = V(load)(from + j * lanes_stride + i);
            V(transpose)(v);
            for (int j = 0; j < V(PIECE); j++)
                V(store_pieces)(to + j * stride, V(PIECE) *stride, v[j]);
        }
    }
    for (ptrdiff_t i = whole; i < n_rows; i++)
        for (c = 0; c < n_classes; c++)
            out[i * stride + c] = lanes[c * lanes_stride + i];
}
#undef V
