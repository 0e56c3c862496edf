/* The kernels of one real type, in the order in which they build on each other. */
#include "elementary.h"
#ifdef REAL_IS_F64
#include "statistics.h"
#endif
#include "finish.h"
#include "transpose.h"
#include "tile.h"
#include "writer.h"
#include "row.h"
#include "row_map.h"
#ifndef REAL_IS_F64
#include "half_range.h"
#include "row_half.h"
#include "row_half_map.h"
#endif
#include "lanes.h"
#include "lanes_arrays.h"
#include "lanes_gradients.h"
#include "lanes_labels.h"
#include "lanes_figures.h"
#include "lanes_parts.h"
#include "lanes_block.h"
#include "row_statistics.h"
#include "row_results.h"
#include "softmax_block.h"
#include "pointwise_bce.h"
#include "pointwise_block.h"
#ifdef REAL_IS_F64
#include "counts.h"
#endif
#undef MAGIC
#undef LOG2E
#undef MANTISSA_BITS
#undef EXPONENT_BIAS
#undef LN2_A
#undef LN2_1
#undef LN2_2
#undef LN2_3
#undef PART_BITS
#undef PARTS
#undef DIRECT
#undef LOG2_BASE
#undef MARGIN
