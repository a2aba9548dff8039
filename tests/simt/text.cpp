#include "text.h"

#include "scheduler.h"

#include <map>
#include <string_view>

namespace bn::simt {
namespace {

// "block 3", "threads 0-16 18".
std::string text_of(const std::string& what, const std::vector<int64_t>& ascending) {
  std::string text = what + (ascending.size() > 1 ? "s" : "");
  for (size_t i = 0; i < ascending.size(); ++i) {
    const int64_t first = ascending[i];
    while (i + 1 < ascending.size() && ascending[i + 1] == ascending[i] + 1) {
      ++i;
    }
    text += " " + std::to_string(first) + (ascending[i] > first ? "-" + std::to_string(ascending[i]) : "");
  }
  return text;
}

}  // namespace

std::string text_of(Site site) {
  const std::string_view file = site.file_name();
  return " (" + std::string(file.substr(file.rfind('/') + 1)) + ":" + std::to_string(site.line()) + ")";
}

std::string text_of(const Thread& thread) {
  if (thread.returned) {
    return "returned";
  }
  if (thread.call == nullptr) {
    return "not waiting";
  }
  std::string text = std::string("at ") + thread.call;
  if (thread.lanes != 0) {
    std::vector<int64_t> lanes;
    for (int lane = 0; lane < kWarp; ++lane) {
      if (thread.lanes >> lane & 1) {
        lanes.push_back(lane);
      }
    }
    text += " of " + text_of("lane", lanes);
  }
  if (thread.counter != nullptr) {
    text += " with " + std::to_string(*thread.counter) + " of " + std::to_string(thread.arrivals) + " arrivals";
  }
  return text + text_of(thread.site);
}

// Groups threads by what they do, and blocks by what their threads do.
std::string text_of(const std::vector<Block>& all) {
  std::map<std::string, std::vector<int64_t>> blocks;
  for (const Block& block : all) {
    std::map<std::string, std::vector<int64_t>> threads;
    for (const Thread& thread : block.group(Scope::Block).threads) {
      threads[text_of(thread)].push_back(thread.index);
    }
    std::string text;
    for (const auto& [state, who] : threads) {
      text += (text.empty() ? "" : ", ") + text_of("thread", who) + " " + state;
    }
    blocks[text].push_back(block.index);
  }
  std::string text;
  for (const auto& [state, who] : blocks) {
    text += (text.empty() ? "" : "; ") + text_of("block", who) + ": " + state;
  }
  return text;
}

}  // namespace bn::simt
