/* Rows side by side, one in each lane, in one real type; included once for each.
 *
 * For short rows, and for classes that lie far apart while rows lie next to each other (`axis=1` of images):
 * x is a tile of n_classes by BLOCK_ROWS (or wider) reals, class-major. Within a tile two sweeps over cached
 * memory, one for the largest and one for the exponentials, need no branch at all. Lanes beyond the block's
 * rows hold 0.
 */
#define V(name) PASTE(REAL, name)

/* Statistics of rows 0 ... n_rows - 1 for classes first_class ... first_class + n_classes - 1; `x_stride` and
 * `gamma_stride` are the reals from one class to the next. With gamma_stride 0, gamma is one number a class.
 */
INLINE void V(lanes_statistics_of)(const V(real) *x, ptrdiff_t x_stride, const V(real) *gamma,
                                   ptrdiff_t gamma_stride, ptrdiff_t n_classes, ptrdiff_t n_rows,
                                   ptrdiff_t first_class, row_statistics *rows)
{
    for (ptrdiff_t lane = 0; lane < n_rows; lane += V(LANES), x += V(LANES)) {
        V(vector) largest = V(all)(-INFINITY), zero = V(all)(0);
        V(ivector) top = V(all_bits)(0);
        for (ptrdiff_t c = 0; c < n_classes; c++) {
            V(vector) logit = V(load)(x + c * x_stride);
            V(mask) larger = V(greater)(logit, largest);
            largest = V(choose)(larger, logit, largest);
            top = V(choose_bits)(larger, V(all_bits)((V(bits))c), top);
        }
        V(vector) size = V(abs)(largest);
        V(vector) direct = V(choose)(V(greater)(size, V(all)(DIRECT)), zero, largest);
        V(vector) shift = V(choose)(V(greater)(V(all)(INFINITY), size), largest - direct, zero);
        V(vector) rounding = V(all)(MAGIC);
        V(vector) exponent = (V(fma)(direct, V(all)(LOG2E), rounding) - rounding) - (V(real))V(HEADROOM);
        V(vector) reference = V(choose)(V(greater)(V(all)(INFINITY), size), largest, zero);
        V(exp_scale) scale = V(exp_scale_of)(exponent);
        V(long_sum) sum = {zero, zero, zero}, weight = sum, gap = sum;
        for (ptrdiff_t c = 0; c < n_classes; c++) {
            V(vector) logit = V(load)(x + c * x_stride);
            V(mask) is_top = V(equal_bits)(top, V(all_bits)((V(bits))c));
            V(add_term)(&sum, V(choose)(is_top, zero, V(exp_scaled)(logit - shift, scale)), c);
            if (gamma) {
                V(vector) g = gamma_stride ? V(load)(gamma + c * gamma_stride + lane) : V(all)(gamma[c]);
                V(add_term)(&weight, V(choose)(is_top, zero, g), c);
                V(add_term)(&gap, V(keep)(V(nonzero)(g), g * (reference - logit)), c);
            }
        }
        V(real) ALIGNED found[6][V(LANES)];
        V(bits) ALIGNED tops[V(LANES)];
        V(store)(found[0], largest);
        V(store)(found[1], V(whole)(&sum));
        V(store)(found[2], shift);
        V(store)(found[3], exponent);
        V(store)(found[4], V(whole)(&weight));
        V(store)(found[5], V(whole)(&gap));
        memcpy(tops, &top, sizeof tops);
        for (ptrdiff_t i = 0; i < V(LANES) &&lane + i < n_rows; i++) {
            row_statistics *row = rows + lane + i;
            *row = (row_statistics){.largest = found[0][i],
                                    .sum = {found[1][i], 0},
                                    .shift = found[2][i],
                                    .exponent = found[3][i],
                                    .weight = {found[4][i], 0},
                                    .gap = {found[5][i], 0},
                                    .top = first_class + tops[i]};
            if (gamma)
                row->top_weight = gamma_stride ? gamma[tops[i] * gamma_stride + lane + i] : gamma[tops[i]];
            if (isinf(row->largest)) {
                row->sum = (compensated){0, 0};
                for (ptrdiff_t c = 0; c < n_classes; c++)
                    row->sum.sum += isnan(x[c * x_stride + i]) ? NAN : 0;
            }
        }
    }
}

/* The second pass of a tile's lanes; arrays as in row_softmax, `live` 0 for rows whose result is 0. */
typedef struct {
    V(real) ALIGNED shift[BLOCK_ROWS], exponent[BLOCK_ROWS], factor[BLOCK_ROWS], gamma_factor[BLOCK_ROWS];
    V(real) ALIGNED largest[BLOCK_ROWS], log1p_others[BLOCK_ROWS], live[BLOCK_ROWS];
} V(map_lanes);

/* Results to `out`, or for the entropy their sums over classes added to `sums`. */
INLINE void V(lanes_map)(second_pass pass, const V(real) *x, ptrdiff_t x_stride, const V(real) *gamma,
                         ptrdiff_t gamma_stride, V(real) *out, ptrdiff_t out_stride, ptrdiff_t n_classes,
                         ptrdiff_t n_rows, const V(map_lanes) *rows, V(real) *sums)
{
    for (ptrdiff_t lane = 0; lane < n_rows; lane += V(LANES)) {
        V(map_row) row = {
            V(load)(rows->shift + lane),        V(load)(rows->factor + lane),
            V(load)(rows->gamma_factor + lane), V(load)(rows->largest + lane),
            V(load)(rows->log1p_others + lane), V(exp_scale_of)(V(load)(rows->exponent + lane))};
        V(mask) live = V(nonzero)(V(load)(rows->live + lane));
        V(vector) zero = V(all)(0);
        V(long_sum) sum = {zero, zero, zero};
        for (ptrdiff_t c = 0; c < n_classes; c++) {
            V(vector) result = V(map_vector)(pass, 0, V(load)(x + c * x_stride + lane), NULL, &row);
            if (gamma) {
                V(vector) g = gamma_stride ? V(load)(gamma + c * gamma_stride + lane) : V(all)(gamma[c]);
                result -= g * row.gamma_factor;
            }
            if (pass == ENTROPY)
                V(add_term)(&sum, result, c);
            else
                V(store)(out + c * out_stride + lane, V(keep)(live, result));
        }
        if (pass == ENTROPY)
            V(store)(sums + lane, V(whole)(&sum));
    }
}
#undef V
