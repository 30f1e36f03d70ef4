// The weight of Winograd's convolution: values of a 3x3 kernel at the interpolation points, in
// panels of output channels.
#include <algorithm>

#include "common/half.h"
#include "common/parallel.h"
#include "winograd/tiles.h"
#include "winograd/winograd.h"

namespace msflow {
namespace {

constexpr int64_t taps = 9, max_points = 36;

struct Job : WinogradWeight {
  int64_t panels, words;
};

// Returns the bits of the factors as they are stored, one factor per 32-bit word.
template <class V>
HD void stored_bits(const V& v, float, WordsOf<V>& w) {
  memcpy(&w, &v, sizeof w);
}
template <class V>
HD void stored_bits(const V& v, bfloat16, WordsOf<V>& w) {
  round_to_half(v, w);
}

// An item is one 32-bit word of a panel: one input channel, or two. Sums stay in registers
// (576 -> 1024, tiles of 3, bfloat16: 25 -> 14 ms).
template <class V, class F>
HD void transform(const Job& job, int64_t begin, int64_t end) {
  constexpr int64_t per_word = 4 / int64_t(sizeof(F));
  const int64_t point_step = job.panels * job.words * panel;
  float kernel[per_word][taps][panel];
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item / job.words * panel;
    const int64_t channels = std::min(panel, job.out_channels - first);
    for (int64_t k = 0; k < per_word; ++k) {
      const int64_t channel = item % job.words * per_word + k;
      const int64_t present = channel < job.channels ? channels : 0;
      const float* from = job.kernel + first * job.out_step + channel * job.in_step;
      for (int64_t o = 0; o < present; ++o)
        for (int64_t t = 0; t < taps; ++t)
          kernel[k][t][o] = from[o * job.out_step + (job.rotated ? taps - 1 - t : t)];
      for (int64_t t = 0; t < taps; ++t)
        std::fill(kernel[k][t] + present, kernel[k][t] + panel, 0.f);
    }
    uint32_t* to = static_cast<uint32_t*>(job.values) + item * panel;
    for (int64_t o = 0; o < panel; o += lanes_of<V>) {
      V errors[per_word][max_points];
      for (int64_t p = job.points - 1; p >= 0; --p) {
        WordsOf<V> words{};
        for (int64_t k = 0; k < per_word; ++k) {
          V value{}, compensation{}, w;
          for (int64_t t = 0; t < taps; ++t) {
            load(kernel[k][t] + o, w);
            value += job.transform[p * taps + t] * w;
          }
          // In the order of the outer loop, as in the reference.
          for (int64_t q = job.points - 1; job.correction && q > p; --q)
            compensation += job.correction[p * job.points + q] * errors[k][q];
          WordsOf<V> bits;
          const V target = value - compensation;
          stored_bits(target, F{}, bits);
          memcpy(&w, &bits, sizeof w);
          errors[k][p] = w - value;
          words |= per_word == 2 && k == 0 ? bits >> 16 : bits;
        }
        memcpy(to + p * point_step + o, &words, sizeof words);
      }
    }
  }
}

AVX512 void floats_avx512(int64_t begin, int64_t end, void* context) {
  transform<Floats16, float>(*static_cast<const Job*>(context), begin, end);
}
AVX512 void halves_avx512(int64_t begin, int64_t end, void* context) {
  transform<Floats16, bfloat16>(*static_cast<const Job*>(context), begin, end);
}
MSFLOW_CLONES void floats(int64_t begin, int64_t end, void* context) {
  transform<Floats8, float>(*static_cast<const Job*>(context), begin, end);
}
MSFLOW_CLONES void halves(int64_t begin, int64_t end, void* context) {
  transform<Floats8, bfloat16>(*static_cast<const Job*>(context), begin, end);
}

}  // namespace

void winograd_weight_cpu(const WinogradWeight& weight) {
  const bool half = weight.factors == DType::bfloat16;
  Job job{weight, (weight.out_channels + panel - 1) / panel,
          half ? (weight.channels + 1) / 2 : weight.channels};
  const Body avx512 = half ? halves_avx512 : floats_avx512, portable = half ? halves : floats;
  const Body body = has_avx512() ? avx512 : portable;
  parallel_for(job.panels * job.words, panel * weight.points * taps, body, job);
}

}  // namespace msflow
