// The weight of Winograd's convolution from a 3x3 kernel: its values at the interpolation points,
// in panels of channels of the result.
#include <algorithm>

#include "common/half.h"
#include "common/parallel.h"
#include "winograd/tiles.h"
#include "winograd/winograd.h"

namespace msflow {
namespace {

constexpr int64_t taps = 9, most_points = 36;

struct Job : WinogradWeight {
  int64_t panels, words;
};

// The bits of numbers as they are kept, in words of their own.
template <class V>
HD void keep(const V& v, float, WordsOf<V>& w) {
  memcpy(&w, &v, sizeof w);
}
template <class V>
HD void keep(const V& v, bfloat16, WordsOf<V>& w) {
  round_to_half(v, w);
}

// An item is one 32-bit word of a panel: a channel in, or two. Sums stay in registers (576 -> 1024,
// tiles of 3, bfloat16: 25 -> 14 ms).
template <class V, class F>
HD void transform(const Job& job, int64_t begin, int64_t end) {
  constexpr int64_t in_word = 4 / int64_t(sizeof(F));
  const int64_t point_step = job.panels * job.words * panel;
  float kernel[in_word][taps][panel];
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item / job.words * panel;
    const int64_t channels = std::min(panel, job.out_channels - first);
    for (int64_t k = 0; k < in_word; ++k) {
      const int64_t channel = item % job.words * in_word + k;
      const int64_t present = channel < job.channels ? channels : 0;
      const float* from = job.kernel + first * job.out_step + channel * job.in_step;
      for (int64_t o = 0; o < present; ++o)
        for (int64_t t = 0; t < taps; ++t)
          kernel[k][t][o] = from[o * job.out_step + (job.turned ? taps - 1 - t : t)];
      for (int64_t t = 0; t < taps; ++t)
        std::fill(kernel[k][t] + present, kernel[k][t] + panel, 0.f);
    }
    uint32_t* to = static_cast<uint32_t*>(job.values) + item * panel;
    for (int64_t o = 0; o < panel; o += size_of<V>) {
      V errors[in_word][most_points];
      for (int64_t p = job.points - 1; p >= 0; --p) {
        WordsOf<V> words{};
        for (int64_t k = 0; k < in_word; ++k) {
          V value{}, moved{}, w;
          for (int64_t t = 0; t < taps; ++t) {
            load(kernel[k][t] + o, w);
            value += job.transform[p * taps + t] * w;
          }
          for (int64_t q = job.points - 1; job.correction && q > p; --q)  // the latest last
            moved += job.correction[p * job.points + q] * errors[k][q];
          WordsOf<V> bits;
          const V wanted = value - moved;
          keep(wanted, F{}, bits);
          memcpy(&w, &bits, sizeof w);
          errors[k][p] = w - value;
          words |= in_word == 2 && k == 0 ? bits >> 16 : bits;
        }
        memcpy(to + p * point_step + o, &words, sizeof words);
      }
    }
  }
}

WIDE void floats_wide(int64_t begin, int64_t end, void* context) {
  transform<Floats16, float>(*static_cast<const Job*>(context), begin, end);
}
WIDE void halves_wide(int64_t begin, int64_t end, void* context) {
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
  const Body wide = half ? halves_wide : floats_wide, narrow = half ? halves : floats;
  const Body body = has_wide() ? wide : narrow;
  parallel_for(job.panels * job.words, panel * weight.points * taps, body, job);
}

}  // namespace msflow
