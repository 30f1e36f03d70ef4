// The scores of an image.
#pragma once

#include <cmath>

#include "common/host_device.h"

namespace msflow {

struct Scores {
  double score, log_score, nll_score;
};

// Of the k lowest log-likelihoods: their sum, the largest of them, and the sum of exp(value -
// largest); `high` is the maximum of all. log_score is -log(mean exp(L - max L)), the paper's score
// 1 - exp(-that).
HD Scores scores_of(double high, double largest, double sum, double exponentials, double k) {
  const double log_score = high - largest - log(exponentials / k);
  return {-expm1(-log_score), log_score, -sum / k};
}

}  // namespace msflow
