// The fuzz target for frames that arrive in pieces: what a peer says about them leads neither outside of the ring nor
// to a frame that is given to the receiver with a part missing.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <optional>
#include <span>
#include <vector>

#include "bytes.h"
#include "fuzz_target.h"
#include "transport/frame_arrivals.h"

namespace lamina::fuzz {
namespace {

using Piece = FrameArrivals::Piece;

constexpr size_t kRingBytes = 4096;
constexpr size_t kMaxPieces = 200;  // of one program

struct Totals {
  uint64_t pieces = 0, claimed = 0, refused = 0, whole = 0, bad = 0;
} totals;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "fuzz: %s\n", what);
  std::abort();
}

// What is known of a frame, kept without the code under test: the pieces that were let in.
struct Expected {
  Piece first;
  uint64_t claimed = 0, arrived = 0;
  bool bad = false;
  bool complete() const { return arrived == (bad ? claimed : first.frame_bytes); }
};

// The rules, in the words of frame_arrivals.h and with no sum that could wrap around.
bool can_be(const Piece& piece, const Expected& frame) {
  using Wide = unsigned __int128;
  return piece.frame_offset % 64 == 0 && piece.bytes > 0 &&
         Wide{piece.frame_offset} + piece.frame_bytes <= kRingBytes &&
         Wide{piece.offset} + piece.bytes <= piece.frame_bytes && !frame.bad &&
         piece.frame_offset == frame.first.frame_offset && piece.frame_bytes == frame.first.frame_bytes &&
         Wide{frame.claimed} + piece.bytes <= piece.frame_bytes;
}

class Run {
 public:
  explicit Run(std::span<const uint8_t> input) : input_(input) {}

  void all() {
    for (size_t i = 0; i < kMaxPieces && !input_.empty(); ++i) {
      const uint8_t what = input_.byte();
      if (what < 160) {
        piece();
      } else if (what < 220) {
        arrive(what);
      } else {
        release();
      }
      check();
    }
    while (!on_their_way_.empty()) arrive(0);
    check();
    while (arrivals_.is_complete()) {
      release();
      check();
    }
  }

 private:
  void piece() {
    ++totals.pieces;
    Piece piece = next_piece();
    const uint64_t oldest = arrivals_.num_released();
    const std::optional<size_t> place = arrivals_.claim(piece);
    if (piece.frame < oldest || piece.frame - oldest >= FrameArrivals::kMaxFrames) {
      expect(!place, "a piece of a frame that cannot be on its way was let in");
      ++totals.refused;
      return;
    }
    Expected& frame = frames_.try_emplace(piece.frame, Expected{piece}).first->second;
    const bool was_complete = frame.claimed > 0 && !frame.bad && frame.complete();
    expect(place.has_value() == can_be(piece, frame), "a piece was let in or refused wrongly");
    if (!place) {
      ++totals.refused;
      if (!was_complete) frame.bad = true;
      return;
    }
    ++totals.claimed;
    expect(*place == piece.frame_offset + piece.offset, "a piece has another place than its frame");
    frame.claimed += piece.bytes;
    on_their_way_.push_back(piece);
    std::memset(ring_.data() + *place, static_cast<int>(piece.frame), piece.bytes);
  }

  // Mostly the next part of a frame that has room; else with one field or more as the input says.
  Piece next_piece() {
    const uint8_t how = input_.byte();
    Piece piece;
    piece.frame = arrivals_.num_released() + how % 4;
    const auto known = frames_.find(piece.frame);
    if (known != frames_.end()) {
      piece = known->second.first;
      piece.offset = known->second.claimed;
      piece.bytes = std::min<uint64_t>(piece.frame_bytes - piece.offset, 1 + input_.byte() * 8u);
    } else {
      piece.frame_offset = input_.byte() % 32 * 64;
      piece.frame_bytes = 1 + input_.byte() * 8u;
      piece.bytes = how % 8 < 4 ? piece.frame_bytes : 1 + input_.byte();
    }
    if (how < 200) return piece;
    for (uint64_t* field :
         {&piece.frame, &piece.frame_offset, &piece.frame_bytes, &piece.offset, &piece.bytes}) {
      if (input_.byte() % 3 == 0) *field = input_.number();
    }
    return piece;
  }

  // One of the pieces on their way, in any order.
  void arrive(uint8_t which) {
    if (on_their_way_.empty()) return;
    const auto at = on_their_way_.begin() + static_cast<std::ptrdiff_t>(which % on_their_way_.size());
    arrivals_.arrived(*at);
    frames_.at(at->frame).arrived += at->bytes;
    on_their_way_.erase(at);
  }

  void release() {
    if (!arrivals_.is_complete()) return;
    ++(arrivals_.is_bad() ? totals.bad : totals.whole);
    frames_.erase(arrivals_.num_released());
    arrivals_.release();
  }

  void check() const {
    const auto oldest = frames_.find(arrivals_.num_released());
    const bool complete = oldest != frames_.end() && oldest->second.complete();
    expect(arrivals_.is_complete() == complete, "the oldest frame is complete, or is not");
    if (!complete) return;
    expect(arrivals_.is_bad() == oldest->second.bad, "a bad frame is whole, or a whole one bad");
    if (arrivals_.is_bad()) return;
    const RingExtent extent = arrivals_.extent();
    expect(extent.offset == oldest->second.first.frame_offset && extent.bytes == oldest->second.first.frame_bytes,
           "a whole frame lies elsewhere");
  }

  Bytes input_;
  FrameArrivals arrivals_{kRingBytes};
  std::vector<std::byte> ring_ = std::vector<std::byte>(kRingBytes);
  std::map<uint64_t, Expected> frames_;
  std::vector<Piece> on_their_way_;
};

void print_totals() {
  const auto number = [](uint64_t value) { return static_cast<unsigned long long>(value); };
  std::printf("fuzz: %llu pieces: %llu let in, %llu refused; frames released: %llu whole, %llu bad\n",
              number(totals.pieces), number(totals.claimed), number(totals.refused), number(totals.whole),
              number(totals.bad));
  std::fflush(stdout);
}

}  // namespace

uint64_t made_so_far() { return totals.pieces; }

}  // namespace lamina::fuzz

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  std::atexit(lamina::fuzz::print_totals);
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  lamina::fuzz::Run({data, size}).all();
  return 0;
}
