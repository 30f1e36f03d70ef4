// The scores of an image, from sums over its k lowest log-likelihoods.
#pragma once

#include <cmath>

#include "common/host_device.h"

namespace msflow {

struct Scores {
  double score, log_score, nll_score;
};

// high: maximum of all log-likelihoods of the image. The other arguments describe the k lowest
// ones: largest: their maximum, sum: their sum, exponentials: the sum of exp(value - largest).
// log_score is -log(mean exp(L - max L)), and the paper's score is 1 - exp(-log_score).
HD Scores scores_of(double high, double largest, double sum, double exponentials, double k) {
  const double log_score = high - largest - log(exponentials / k);
  return {-expm1(-log_score), log_score, -sum / k};
}

}  // namespace msflow
