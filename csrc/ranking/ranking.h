// Entry point of ranking; msflow_ext/ops/ranking.py says what it computes.
#pragma once

#include "common/tensor.h"

namespace msflow {

// scores, ignored: (size,), dense; ignored is 0 or 1. thresholds, above, reached: (count,);
// thresholds must be strictly descending. Fewer than 2^31 scores and thresholds. At most `threads`
// threads run.
void ranking_cpu(DType dtype, const void* scores, const uint8_t* ignored, int64_t size,
                 const void* thresholds, int64_t count, int64_t threads, int64_t* above,
                 int64_t* reached);

}  // namespace msflow
