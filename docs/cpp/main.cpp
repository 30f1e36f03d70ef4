// Scores images with a compiled run, without Python: msflow_score model.pt2 image.ppm ...

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

using torch::inductor::AOTIModelPackageLoader;

// What `msflow export --format aoti` wrote.
std::unique_ptr<AOTIModelPackageLoader> load(const std::string& path) try {
  auto model = std::make_unique<AOTIModelPackageLoader>(path);
  if (!model->get_metadata().count("image_size"))
    throw std::runtime_error("msflow export did not write it");
  return model;
} catch (const std::exception& error) {
  throw std::runtime_error(path + " is no compiled detector: " + error.what());
}

// A binary PPM, 8 bits a channel and without comments, as (1, 3, side, side) in 0..1.
at::Tensor read_image(const std::string& path, int64_t side) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + " cannot be read");
  std::string kind;
  int64_t width = 0, height = 0, most = 0;
  file >> kind >> width >> height >> most;
  if (!file || kind != "P6" || most != 255)
    throw std::runtime_error(path + " is not a binary PPM (P6) of 8 bits a channel");
  if (width != side || height != side)
    throw std::runtime_error(path + " has " + std::to_string(width) + "x" + std::to_string(height) +
                             " pixels, the model takes " + std::to_string(side) + "x" +
                             std::to_string(side));
  file.get();  // the one white space behind the head
  at::Tensor pixels = at::empty({1, side, side, 3}, at::kByte);
  if (!file.read(static_cast<char*>(pixels.data_ptr()), pixels.numel()))
    throw std::runtime_error(path + " is cut off");
  return pixels.permute({0, 3, 1, 2}).to(at::kFloat).div(255).contiguous();
}

int main(int count, char** arguments) try {
  if (count < 3) throw std::runtime_error("usage: msflow_score model.pt2 image.ppm ...");
  const c10::InferenceMode inference;
  const auto model = load(arguments[1]);
  const int64_t side = std::stoll(model->get_metadata().at("image_size"));
  std::vector<at::Tensor> images;
  for (int i = 2; i < count; ++i) images.push_back(read_image(arguments[i], side));
  // One call for all of them; the results are score (N,) and anomaly_map (N, side, side).
  const std::vector<at::Tensor> found = model->run({at::cat(images)});
  for (int64_t i = 0; i < found[0].numel(); ++i) {
    const int64_t peak = found[1][i].argmax().item<int64_t>();
    std::printf("%s score %.7g, most anomalous at x %d, y %d\n", arguments[i + 2],
                found[0][i].item<float>(), int(peak % side), int(peak / side));
  }
} catch (const std::exception& error) {
  const std::string text = error.what();
  std::fprintf(stderr, "msflow_score: %s\n", text.substr(0, text.find('\n')).c_str());
  return 1;
}
