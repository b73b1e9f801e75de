// Runs a fuzz target without libFuzzer: random programs and mutations of earlier ones, all from one seed.
//
//   ..._standalone --count N [--seed S]   until N frames, say, were made
//   ..._standalone FILE...                runs saved inputs
//   ..._standalone --write-seeds DIR      writes programs for libFuzzer to begin with
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "fuzz_target.h"

namespace {

using Input = std::vector<uint8_t>;

// Kept where the process ends early, so that a crash can be run again.
void save(const Input& input) {
  if (const char* path = std::getenv("LAMINA_FUZZ_LAST_INPUT")) {
    std::ofstream(path, std::ios::binary)
        .write(reinterpret_cast<const char*>(input.data()), static_cast<std::streamsize>(input.size()));
  }
}

void run(const Input& input) {
  save(input);
  LLVMFuzzerTestOneInput(input.data(), input.size());
}

Input random_input(std::mt19937_64& random) {
  Input input(8 + random() % 600);
  for (uint8_t& byte : input) byte = static_cast<uint8_t>(random());
  return input;
}

void mutate(Input& input, std::mt19937_64& random) {
  for (uint64_t changes = 1 + random() % 8; changes > 0; --changes) {
    const size_t at = random() % input.size();
    switch (random() % 4) {
      case 0:
        input[at] = static_cast<uint8_t>(random());
        break;
      case 1:
        input[at] ^= static_cast<uint8_t>(1 << random() % 8);
        break;
      case 2:
        input.insert(input.begin() + static_cast<std::ptrdiff_t>(at), static_cast<uint8_t>(random()));
        break;
      default:
        if (input.size() > 8) input.erase(input.begin() + static_cast<std::ptrdiff_t>(at));
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  uint64_t count = 0, seed = 1;
  LLVMFuzzerInitialize(&argc, &argv);
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--count") == 0 && i + 1 < argc) {
      count = std::strtoull(argv[++i], nullptr, 10);
    } else if (std::strcmp(argv[i], "--seed") == 0 && i + 1 < argc) {
      seed = std::strtoull(argv[++i], nullptr, 10);
    } else if (std::strcmp(argv[i], "--write-seeds") == 0 && i + 1 < argc) {
      std::mt19937_64 random(seed);
      for (int n = 0; n < 64; ++n) {
        const Input input = random_input(random);
        std::ofstream(std::string(argv[i + 1]) + "/" + std::to_string(n), std::ios::binary)
            .write(reinterpret_cast<const char*>(input.data()), static_cast<std::streamsize>(input.size()));
      }
      return 0;
    } else {
      std::ifstream file(argv[i], std::ios::binary);
      if (!file) return std::fprintf(stderr, "fuzz: cannot read %s\n", argv[i]), 2;
      run(Input(std::istreambuf_iterator<char>(file), {}));
    }
  }
  std::mt19937_64 random(seed);
  std::vector<Input> corpus;
  while (lamina::fuzz::made_so_far() < count) {
    Input input = random_input(random);
    if (!corpus.empty() && random() % 2 == 0) {
      input = corpus[random() % corpus.size()];
      mutate(input, random);
    }
    run(input);
    if (corpus.size() < 256) corpus.push_back(input);
    else corpus[random() % corpus.size()] = input;
  }
  return 0;
}
