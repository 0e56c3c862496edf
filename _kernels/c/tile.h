/* Tiles: short runs of an array as contiguous reals in the cache, and back; included once for each real type.
 *
 * The kernels proper know one real type and contiguous memory. An array that is so already is used where it
 * lies; any other dtype or stride is converted a tile at a time, which costs a pass through the nearest cache
 * and no memory of the batch's size.
 */
#define V(name) PASTE(REAL, name)

static const dtype_code V(dtype) = sizeof(V(real)) == 8 ? DTYPE_F64 : DTYPE_F32;
enum {
    V(LINE) = 64 / sizeof(V(real)),
    V(CHUNK) = 8192 / sizeof(V(real)) /* a tile */
};

INLINE int V(is_real)(const array_view *view) { return view->dtype == V(dtype); }

/* Whether every second real is of the array, along its classes */
INLINE int V(has_seconds)(const array_view *view)
{
    return V(is_real)(view) && view->class_stride == 2 * (ptrdiff_t)sizeof(V(real));
}

#define LOAD_EACH(type, convert, distance) \
    for (ptrdiff_t i = 0; i < n; i++)      \
    to[i] = (V(real))convert(*(const type *)(from + i * (distance)))
/* Distances that compilers have instructions for, in vectors, apart from any other */
#define RUN(type, convert)                                         \
    do {                                                           \
        if (stride == (ptrdiff_t)sizeof(type))                     \
            LOAD_EACH(type, convert, (ptrdiff_t)sizeof(type));     \
        else if (stride == 2 * (ptrdiff_t)sizeof(type))            \
            LOAD_EACH(type, convert, 2 * (ptrdiff_t)sizeof(type)); \
        else if (stride == -(ptrdiff_t)sizeof(type))               \
            LOAD_EACH(type, convert, -(ptrdiff_t)sizeof(type));    \
        else                                                       \
            LOAD_EACH(type, convert, stride);                      \
    } while (0)

#if defined VECTOR_X86 && !defined REAL_IS_F64
/* By instruction, eight at a time; return how many. */
static ptrdiff_t load_halves(const char *from, ptrdiff_t n, float *to)
{
    for (ptrdiff_t i = 0; i + 8 <= n; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + 2 * i))));
    return n / 8 * 8;
}

static ptrdiff_t store_halves(char *to, ptrdiff_t n, const float *from)
{
    for (ptrdiff_t i = 0; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i *)(to + 2 * i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
    return n / 8 * 8;
}
#endif

/* Of each two reals the first (second) */
INLINE V(vector) V(every_second)(const V(real) *p, int second)
{
    V(vector) a = V(load_pieces)(p, 2 * V(PIECE)), b = V(load_pieces)(p + V(PIECE), 2 * V(PIECE));
#if defined REAL_IS_F64
    return second ? V(interleave_high)(a, b) : V(interleave_low)(a, b);
#elif defined VECTOR_AVX512
    return second ? _mm512_shuffle_ps(a, b, 0xdd) : _mm512_shuffle_ps(a, b, 0x88);
#elif defined VECTOR_AVX2
    return second ? _mm256_shuffle_ps(a, b, 0xdd) : _mm256_shuffle_ps(a, b, 0x88);
#else
    return (V(vector)){a[second], a[2 + second], b[second], b[2 + second]};
#endif
}

/* n > LANES reals, one left out after each but the last: twice as many bytes, which are fetched from twice as
 * far */
static void V(load_seconds)(const V(real) *from, ptrdiff_t n, V(real) *to)
{
    const distances behind = {2 * in_order.first, 2 * in_order.second};
    for (ptrdiff_t i = 0; i < n - V(LANES); i += V(LANES)) {
        fetch_ahead(from + 2 * i, 2 * VECTOR_BYTES, behind);
        V(store)(to + i, V(every_second)(from + 2 * i, 0));
    }
    V(store)(to + n - V(LANES), V(every_second)(from + 2 * (n - V(LANES))-1, 1));
}

/* Each line that holds one of n items, `stride` bytes apart */
INLINE void V(prefetch_run)(const char *from, ptrdiff_t stride, ptrdiff_t n)
{
    ptrdiff_t a_line = stride < 0 ? -64 : 64, step = labs(stride) < 64 ? a_line : stride;
    for (ptrdiff_t at = 0; labs(at) < labs(n * stride); at += step)
        __builtin_prefetch(from + at, 0, 2);
}

/* n items from `from` on, `stride` bytes apart */
static void V(load_run)(dtype_code dtype, const char *from, ptrdiff_t stride, ptrdiff_t n,
                        V(real) *restrict to)
{
#if defined VECTOR_X86 && !defined REAL_IS_F64
    ptrdiff_t done = dtype == DTYPE_F16 && stride == 2 ? load_halves(from, n, to) : 0;
    from += 2 * done, to += done, n -= done;
#endif
    if (dtype == V(dtype) &&stride == 2 * (ptrdiff_t)sizeof(V(real)) && n > V(LANES)) {
        V(load_seconds)((const V(real) *)from, n, to);
        return;
    }
    switch (dtype) {
    case DTYPE_F16: RUN(uint16_t, half_to_float); break;
    case DTYPE_BF16: RUN(uint16_t, bfloat_to_float); break;
    case DTYPE_F32: RUN(float, ); break;
    case DTYPE_F64: RUN(double, ); break;
    case DTYPE_BOOL: RUN(uint8_t, !!); break;
    case DTYPE_I8: RUN(int8_t, ); break;
    case DTYPE_U8: RUN(uint8_t, ); break;
    case DTYPE_I16: RUN(int16_t, ); break;
    case DTYPE_U16: RUN(uint16_t, ); break;
    case DTYPE_I32: RUN(int32_t, ); break;
    case DTYPE_U32: RUN(uint32_t, ); break;
    case DTYPE_I64: RUN(int64_t, ); break;
    case DTYPE_U64: RUN(uint64_t, ); break;
    }
}
#undef RUN
#undef LOAD_EACH

#define RUN(type, convert)                                           \
    do {                                                             \
        if (stride == (ptrdiff_t)sizeof(type))                       \
            for (ptrdiff_t i = 0; i < n; i++)                        \
                ((type *)to)[i] = (type)convert(from[i]);            \
        else                                                         \
            for (ptrdiff_t i = 0; i < n; i++)                        \
                *(type *)(to + i * stride) = (type)convert(from[i]); \
    } while (0)

static void V(store_run)(dtype_code dtype, char *to, ptrdiff_t stride, ptrdiff_t n, const V(real) *from)
{
#if defined VECTOR_X86 && !defined REAL_IS_F64
    ptrdiff_t done = dtype == DTYPE_F16 && stride == 2 ? store_halves(to, n, from) : 0;
    from += done, to += 2 * done, n -= done;
#endif
    switch (dtype) {
    case DTYPE_F16: RUN(uint16_t, float_to_half); break;
    case DTYPE_BF16: RUN(uint16_t, float_to_bfloat); break;
    case DTYPE_F32: RUN(float, ); break;
    case DTYPE_F64: RUN(double, ); break;
    default: RUN(uint8_t, );
    }
}
#undef RUN

/* Items up to the next cache line */
INLINE ptrdiff_t V(to_line)(const V(real) *p) { return -(uintptr_t)p % 64 / sizeof(V(real)); }

/* Fewer than 16 reals */
INLINE void V(copy_few)(V(real) *to, const V(real) *from, ptrdiff_t n)
{
    const size_t size = sizeof(V(real));
    ptrdiff_t c = 0;
    if (n & 8)
        memcpy(to, from, 8 * size), c += 8;
    if (n & 4)
        memcpy(to + c, from + c, 4 * size), c += 4;
    if (n & 2)
        memcpy(to + c, from + c, 2 * size), c += 2;
    if (n & 1)
        to[c] = from[c];
}

/* A contiguous run around the cache, but for the lines at its ends */
static void V(stream_run)(V(real) *to, ptrdiff_t n, const V(real) *from)
{
    ptrdiff_t c = V(to_line)(to) < n ? V(to_line)(to) : n;
    V(copy_few)(to, from, c);
    for (; c + V(LINE) <= n; c += V(LINE))
        for (int j = 0; j < V(LINE); j += V(LANES))
            V(stream)(to + c + j, V(load)(from + c + j));
    V(copy_few)(to + c, from + c, n - c);
}

/* A run where it lies, or copied into `tile` */
INLINE const V(real) *V(run)(const array_view *view, const char *from, ptrdiff_t stride, ptrdiff_t n,
                             V(real) *tile)
{
    if (V(is_real)(view) && stride == (ptrdiff_t)sizeof(V(real)))
        return (const V(real) *)from;
    V(load_run)(view->dtype, from, stride, n, tile);
    return tile;
}

INLINE ptrdiff_t V(run_length)(const array_view *view, ptrdiff_t first, ptrdiff_t n)
{
    ptrdiff_t whole = view->ndim ? view->shape[view->ndim - 1] : 1;
    ptrdiff_t left = whole - first % whole;
    return left < n ? left : n;
}

INLINE ptrdiff_t V(last_stride)(const array_view *view)
{
    return view->ndim ? view->stride[view->ndim - 1] : 0;
}

/* Items first ... first + n - 1 of an array in C order */
static const V(real) *V(items)(const array_view *view, ptrdiff_t first, ptrdiff_t n, V(real) *tile)
{
    ptrdiff_t stride = V(last_stride)(view);
    if (V(run_length)(view, first, n) == n)
        return V(run)(view, view->data + view_offset(view, first), stride, n, tile);
    for (ptrdiff_t done = 0, length; done < n; done += length) {
        length = V(run_length)(view, first + done, n - done);
        V(load_run)(view->dtype, view->data + view_offset(view, first + done), stride, length, tile + done);
    }
    return tile;
}

static void V(store_items)(const array_view *view, ptrdiff_t first, ptrdiff_t n, const V(real) *from)
{
    for (ptrdiff_t done = 0, length; done < n; done += length) {
        length = V(run_length)(view, first + done, n - done);
        V(store_run)(view->dtype, view->data + view_offset(view, first + done), V(last_stride)(view), length,
                     from + done);
    }
}
#undef V
