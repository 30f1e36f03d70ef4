// Entry points of the scores; msflow_ext/ops/score.py says what they compute.
#pragma once

#include <vector>

#include "common/tensor.h"

namespace msflow {

// Sums of z^2 over channels (N, P), and over channels and positions (N,), both in the accumulation
// dtype. Each may be null.
void square_sums_cpu(int64_t samples, int64_t channels, int64_t positions, bool channels_last,
                     Tensor z, void* per_position, void* per_sample);

struct Scale {
  const void* log_likelihood;  // (N, height, width), dense
  int64_t height, width;
};

// Results are dense and have the dtype of the maps. Returns false, with invalid results, if a map
// has a value that is not finite.
bool aggregate_cpu(DType dtype, int64_t samples, int64_t height, int64_t width, int64_t k,
                   const std::vector<Scale>& scales, void* score, void* log_score, void* nll_score,
                   void* anomaly_map, void* image_map);

bool mean_aggregate_cpu(DType dtype, int64_t samples, int64_t height, int64_t width,
                        const std::vector<Scale>& scales, void* score, void* anomaly_map);

// The same on CUDA's current device and this stream. `scratch` must have as many bytes as *_scratch
// returns. Values that are not finite give the same results as in the reference.
constexpr int max_scales = 16;
int64_t square_sums_scratch(int64_t samples, int64_t channels, int64_t positions,
                            bool channels_last, DType z);
void square_sums_cuda(int64_t samples, int64_t channels, int64_t positions, bool channels_last,
                      Tensor z, void* per_position, void* per_sample, void* scratch, void* stream);
int64_t aggregate_scratch(DType dtype, int64_t samples, int64_t height, int64_t width,
                          const std::vector<Scale>& scales);
void aggregate_cuda(DType dtype, int64_t samples, int64_t height, int64_t width, int64_t k,
                    const std::vector<Scale>& scales, void* score, void* log_score, void* nll_score,
                    void* anomaly_map, void* image_map, void* scratch, void* stream);
void mean_aggregate_cuda(DType dtype, int64_t samples, int64_t height, int64_t width,
                         const std::vector<Scale>& scales, void* score, void* anomaly_map,
                         void* scratch, void* stream);

}  // namespace msflow
