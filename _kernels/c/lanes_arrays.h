/* Between arrays and a block of rows as lanes, in one real type: labels and numbers by row, logits and
 * results by class; included once for each type.
 *
 * Logits side by side are read in place, any others are brought into a tile, class-major.
 */
#define V(name) PASTE(REAL, name)

/* Labels as lanes, -1 where a row is ignored, and whether it is not; returns how many are, or -1 if a label
 * is out of range. In halves of 32 bits, as no row has more classes: as many lanes as a vector of float32
 * has. */
#define LABELS_OF(type, clip)                                               \
    for (ptrdiff_t i = 0; i < n; i++) {                                     \
        int64_t label = (int64_t)clip(*(const type *)(from + i * stride));  \
        int32_t low = (int32_t)label, high = (int32_t)(label >> 32);        \
        int32_t is_ignored = (low == ignored_low) & (high == ignored_high); \
        int32_t is_class = ((uint32_t)low < n_classes) & (high == 0);       \
        to[i] = is_ignored ? -1 : low;                                      \
        live[i] = !is_ignored;                                              \
        n_ignored += is_ignored;                                            \
        bad |= !(is_ignored | is_class);                                    \
    }
#define LABELS_RUN(type, clip)                     \
    do {                                           \
        if (stride == (ptrdiff_t)sizeof(type)) {   \
            const ptrdiff_t stride = sizeof(type); \
            LABELS_OF(type, clip)                  \
        } else {                                   \
            LABELS_OF(type, clip)                  \
        }                                          \
    } while (0)
#define CLIPPED(label) ((label) > INT64_MAX ? INT64_MIN : (int64_t)(label))

static ptrdiff_t V(labels_run)(const softmax_job *job, const char *from, ptrdiff_t stride, ptrdiff_t n,
                               V(bits) *restrict to, V(real) *restrict live)
{
    int32_t ignored_low = (int32_t)job->ignore_index, ignored_high = (int32_t)(job->ignore_index >> 32);
    uint32_t n_classes = (uint32_t)job->n_classes;
    int32_t bad = 0, n_ignored = 0;
    switch (job->target.dtype) {
    case DTYPE_I8: LABELS_RUN(int8_t, ); break;
    case DTYPE_U8: LABELS_RUN(uint8_t, ); break;
    case DTYPE_I16: LABELS_RUN(int16_t, ); break;
    case DTYPE_U16: LABELS_RUN(uint16_t, ); break;
    case DTYPE_I32: LABELS_RUN(int32_t, ); break;
    case DTYPE_U32: LABELS_RUN(uint32_t, ); break;
    case DTYPE_I64: LABELS_RUN(int64_t, ); break;
    default: LABELS_RUN(uint64_t, CLIPPED);
    }
    return bad ? -1 : n_ignored;
}
#undef CLIPPED
#undef LABELS_RUN
#undef LABELS_OF

/* Labels of n rows from `first` on; returns how many rows count, or -1 if a label is bad. */
static ptrdiff_t V(lane_labels)(const softmax_job *job, ptrdiff_t first, ptrdiff_t n, V(bits) *to,
                                V(real) *live)
{
    const array_view *target = &job->target;
    ptrdiff_t counted = n;
    for (ptrdiff_t done = 0, run; done < n; done += run) {
        const char *from = target->data + view_offset(target, first + done);
        run = V(run_length)(target, first + done, n - done);
        ptrdiff_t n_ignored = V(labels_run)(job, from, V(last_stride)(target), run, to + done, live + done);
        if (n_ignored < 0)
            return -1;
        counted -= n_ignored;
    }
    return counted;
}

#ifndef REAL_IS_F64
/* Of a whole block how many count, or -1; so many at a time that what becomes of them stays in the nearest
 * cache, while those that lie side by side behind them are fetched. */
static ptrdiff_t V(count_labels)(const softmax_job *job, ptrdiff_t block)
{
    enum { AT_ONCE = 512 };
    V(bits) ALIGNED label[AT_ONCE];
    V(real) ALIGNED live[AT_ONCE];
    const array_view *target = &job->target;
    ptrdiff_t first = block * job->block_rows, end = first + job->block_rows, counted = 0;
    end = end < job->n_rows ? end : job->n_rows;
    for (ptrdiff_t n; first < end; first += n) {
        n = end - first < AT_ONCE ? end - first : AT_ONCE;
        if (V(last_stride)(target) == target->itemsize)
            fetch_ahead(target->data + view_offset(target, first), n * target->itemsize, in_order);
        ptrdiff_t found = V(lane_labels)(job, first, n, label, live);
        if (found < 0)
            return -1;
        counted += found;
    }
    return counted;
}
#endif

/* Numbers by row, `otherwise` where there are none */
static void V(read_numbers)(const V(lanes) *rows, const array_view *view, V(real) otherwise, V(real) *to)
{
    if (view->data && V(last_stride)(view) == 0 && V(run_length)(view, rows->first, rows->n) == rows->n)
        otherwise = (V(real))view_real(view, view->data + view_offset(view, rows->first));
    else if (view->data) {
        const V(real) *from = V(items)(view, rows->first, rows->n, to);
        if (from != to)
            memcpy(to, from, sizeof *to * (size_t)rows->n);
        return;
    }
    for (ptrdiff_t lane = 0; lane < rows->width; lane += V(LANES))
        V(store)(to + lane, V(all)(otherwise));
}

/* The lines of a vector of labels, of up to eight bytes each; no rows' if `labels` is NULL */
INLINE void V(fetch_labels)(const V(lanes) *rows, const char *labels, ptrdiff_t lane)
{
    for (int i = 0; labels && i < (8 * V(LANES) + 63) / 64; i++)
        __builtin_prefetch(labels + lane * rows->job->target.itemsize + 64 * i);
}

/* Labels and what goes with them; returns how many rows count, or -1 if a label is bad. */
static ptrdiff_t V(prepare)(V(lanes) *rows)
{
    const softmax_job *job = rows->job;
    ptrdiff_t counted = rows->n;
    if (job->target_kind == LABELS) {
        counted = V(lane_labels)(rows->job, rows->first, rows->n, rows->label, rows->live);
        rows->labels_ahead = job->target.data + view_offset(&job->target, rows->first) +
                             rows->n * V(last_stride)(&job->target);
    } else {
        memset(rows->label, -1, sizeof *rows->label * (size_t)rows->n);
        for (ptrdiff_t i = 0; i < rows->n; i++)
            rows->live[i] = 1;
    }
    for (ptrdiff_t i = rows->n; i < rows->width; i++)
        rows->label[i] = -1, rows->live[i] = rows->beta[i] = 0;
    for (ptrdiff_t i = 0; i < rows->n && counted >= 0 && job->beta; i++)
        rows->beta[i] = rows->label[i] < 0 ? 0 : (V(real))job->beta[rows->label[i]];
    if (job->second_pass == GRADIENT)
        V(read_numbers)(rows, &job->scale, 1, rows->scale);
    return counted;
}

/* What else sums and finish need where the loss is not plain */
static void V(prepare_more)(V(lanes) *rows)
{
    const softmax_job *job = rows->job;
    for (ptrdiff_t i = 0; i < rows->width && !job->beta; i++)
        rows->beta[i] = 1;
    for (ptrdiff_t i = 0; i < rows->n && job->target_kind == LABELS && job->gamma; i++)
        rows->label_gamma[i] = rows->label[i] < 0 ? 0 : (V(real))job->gamma[rows->label[i]];
    if (job->lse_in.data) {
        const double *lse = f64_items(&job->lse_in, rows->first, rows->n, rows->lse_in);
        if (lse != rows->lse_in)
            memcpy(rows->lse_in, lse, sizeof *lse * (size_t)rows->n);
    }
}

/* Do the block's rows lie side by side, as reals that fill whole vectors? */
INLINE int V(are_beside)(const V(lanes) *rows, const array_view *view)
{
    return V(is_real)(view) && V(last_stride)(view) == (ptrdiff_t)sizeof(V(real)) && rows->n == rows->width &&
           V(run_length)(view, rows->first, rows->n) == rows->n;
}

/* Do they lie one after another, without gaps? */
INLINE int V(are_flat)(const V(lanes) *rows, const array_view *view)
{
    return V(is_real)(view) && view->class_stride == view->itemsize &&
           V(last_stride)(view) == rows->job->n_classes * view->itemsize &&
           V(run_length)(view, rows->first, rows->n) == rows->n;
}

INLINE char *V(place)(const array_view *view, ptrdiff_t row, ptrdiff_t c)
{
    return view->data + view_offset(view, row) + c * view->class_stride;
}

INLINE ptrdiff_t V(tile_stride)(const V(lanes) *rows) { return rows->width + V(LINE); }

/* One run of rows with classes next to each other, in any dtype, to lanes or from them */
enum { V(NARROW) = 64 };
static void V(narrow_run)(const array_view *view, char *place, ptrdiff_t n, ptrdiff_t n_classes,
                          V(real) *lanes, ptrdiff_t lanes_stride, int stores)
{
    V(real) ALIGNED buffer[V(LANES) *V(NARROW)];
    ptrdiff_t stride = V(last_stride)(view), row_bytes = n_classes * view->itemsize, group;
    for (ptrdiff_t i = 0; i < n; i += group, lanes += group) {
        group = n - i < V(LANES) ? n - i : V(LANES);
        /* Rows without gaps are converted as one. */
        ptrdiff_t n_runs = stride == row_bytes ? 1 : group, run = group * n_classes / n_runs;
        if (stores)
            V(lanes_to_rows)(lanes, lanes_stride, group, n_classes, buffer, n_classes);
        for (ptrdiff_t j = 0; j < n_runs; j++) {
            char *at = place + (i + j) * stride;
            if (stores)
                V(store_run)(view->dtype, at, view->itemsize, run, buffer + j * n_classes);
            else
                V(load_run)(view->dtype, at, view->itemsize, run, buffer + j * n_classes);
        }
        if (!stores)
            V(rows_to_lanes)(buffer, n_classes, group, n_classes, lanes, lanes_stride);
    }
}

/* Does a class of many rows fill lines of its own? */
INLINE int V(has_runs)(const array_view *view)
{
    ptrdiff_t step = labs(V(last_stride)(view));
    return step < 64 && step < labs(view->class_stride);
}

/* n_classes of the block's rows as lanes, *stride reals from class to class: in place or in `tile` */
static const V(real) *V(lanes_of)(const V(lanes) *rows, const array_view *view, ptrdiff_t first_class,
                                  ptrdiff_t n_classes, V(real) *tile, ptrdiff_t *stride)
{
    if (V(are_beside)(rows, view)) {
        *stride = view->class_stride / (ptrdiff_t)sizeof(V(real));
        return (const V(real) *)V(place)(view, rows->first, first_class);
    }
    *stride = V(tile_stride)(rows);
    for (ptrdiff_t done = 0, n; done < rows->n; done += n) {
        char *from = V(place)(view, rows->first + done, first_class);
        n = V(run_length)(view, rows->first + done, rows->n - done);
        if (view->class_stride == view->itemsize && V(is_real)(view))
            V(rows_to_lanes)((const V(real) *)from, V(last_stride)(view) / (ptrdiff_t)sizeof(V(real)), n,
                             n_classes, tile + done, *stride);
        else if (view->class_stride == view->itemsize && n_classes <= V(NARROW))
            V(narrow_run)(view, from, n, n_classes, tile + done, *stride, 0);
        else
            for (ptrdiff_t c = 0; c < n_classes; c++) {
                const char *run = from + c * view->class_stride;
                if (V(has_runs)(view)) /* those of the next block */
                    V(prefetch_run)(run + n * V(last_stride)(view), V(last_stride)(view), n);
                V(load_run)(view->dtype, run, V(last_stride)(view), n, tile + c * *stride + done);
            }
    }
    for (ptrdiff_t c = 0; c < n_classes; c++)
        for (ptrdiff_t i = rows->n; i < rows->width; i++)
            tile[c * *stride + i] = 0;
    return tile;
}

/* gamma of the same classes: by class (*stride 0), by lane, or NULL for zeros */
static const V(real) *V(gamma_of)(V(lanes) *rows, ptrdiff_t first_class, ptrdiff_t n_classes,
                                  ptrdiff_t *stride)
{
    const softmax_job *job = rows->job;
    const V(real) *weight = job->gamma_real ? (const V(real) *)job->gamma_real + first_class : NULL;
    *stride = 0;
    if (job->target_kind != PROBABILITIES)
        return weight;
    const V(real) *t = V(lanes_of)(rows, &job->target, first_class, n_classes, rows->gamma_tile, stride);
    if (!weight && job->target_scale == 1 && job->target_offset == 0 && *stride != 0)
        return t; /* (a stride of 0 says that there is one for all rows) */
    V(real) target_scale = (V(real))job->target_scale, offset = (V(real))job->target_offset;
    ptrdiff_t to = V(tile_stride)(rows);
    for (ptrdiff_t c = 0; c < n_classes; c++)
        for (ptrdiff_t i = 0; i < rows->n; i++)
            rows->gamma_tile[c * to + i] =
                (weight ? weight[c] : 1) * (target_scale * t[c * *stride + i] + offset);
    *stride = to;
    return rows->gamma_tile;
}

/* How many classes a tile holds for all rows of the block, or all that there are */
static ptrdiff_t V(classes_in_tile)(const V(lanes) *rows)
{
    ptrdiff_t n = V(LANES_TILE) / V(tile_stride)(rows) / V(SWEEP) *V(SWEEP);
    return n < rows->job->n_classes ? n : rows->job->n_classes;
}

/* n_classes of all rows from lanes in x_tile to where they belong */
static void V(put_lanes)(V(lanes) *rows, ptrdiff_t first_class, ptrdiff_t n_classes, int streams)
{
    const array_view *out = &rows->job->out;
    ptrdiff_t stride = V(tile_stride)(rows), row_stride = V(last_stride)(out) / (ptrdiff_t)sizeof(V(real));
    for (ptrdiff_t done = 0, n; done < rows->n; done += n) {
        char *to = V(place)(out, rows->first + done, first_class);
        const V(real) *lanes = rows->x_tile + done;
        n = V(run_length)(out, rows->first + done, rows->n - done);
        if (out->class_stride == out->itemsize && V(is_real)(out) && streams && row_stride == n_classes) {
            V(lanes_to_rows)(lanes, stride, n, n_classes, rows->gamma_tile, n_classes);
            V(stream_run)((V(real) *)to, n * n_classes, rows->gamma_tile);
        } else if (out->class_stride == out->itemsize && V(is_real)(out)) {
            V(lanes_to_rows)(lanes, stride, n, n_classes, (V(real) *)to, row_stride);
        } else if (out->class_stride == out->itemsize && n_classes <= V(NARROW)) {
            V(narrow_run)(out, to, n, n_classes, rows->x_tile + done, stride, 1);
        } else {
            for (ptrdiff_t c = 0; c < n_classes; c++)
                V(store_run)(out->dtype, to + c * out->class_stride, V(last_stride)(out), n,
                             lanes + c * stride);
        }
    }
}

#undef V
