// Entry points of the scores; msflow_ext/ops/score.py says what they compute.
#pragma once

#include <vector>

#include "common/tensor.h"

namespace msflow {

// Sums of z^2 over channels (N, P) and over everything but the sample (N,), both wide; each may be
// null.
void square_sums_cpu(int64_t samples, int64_t channels, int64_t positions, bool interleaved,
                     Tensor z, void* per_position, void* per_sample);

struct Scale {
  const void* log_likelihood;  // (N, height, width), dense
  int64_t height, width;
};

// Both aggregations: results are dense and of the maps' type. False if a map holds a value that is
// not finite: results are then void.
bool aggregate_cpu(DType dtype, int64_t samples, int64_t height, int64_t width, int64_t k,
                   const std::vector<Scale>& scales, void* score, void* log_score, void* nll_score,
                   void* anomaly_map, void* image_map);

bool mean_aggregate_cpu(DType dtype, int64_t samples, int64_t height, int64_t width,
                        const std::vector<Scale>& scales, void* score, void* anomaly_map);

// The same on CUDA's current device and this stream, with scratch memory of as many bytes as
// *_scratch says. There, values that are not finite come out as in the reference.
constexpr int max_scales = 16;
int64_t square_sums_scratch(int64_t samples, int64_t channels, int64_t positions, bool interleaved,
                            DType z);
void square_sums_cuda(int64_t samples, int64_t channels, int64_t positions, bool interleaved,
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
