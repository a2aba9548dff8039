#pragma once

#include "core/arguments.h"

namespace bn::cuda {

// So many tensors, and perhaps the bits of a mask.
struct Traffic {
  int tensors = 0;
  bool mask = false;

  bool operator==(const Traffic&) const = default;
};

// One direction of a batch norm, as traffic.
struct Work {
  int tensors = 1;  // that the direction may hold: how channels are cut, and so the bits of their sums, follows from it
  Traffic summed;   // read to add up each channel
  Traffic applied;  // read to write the outputs, unless what is made of it is held:
  int held = 0;     // so many tensors
  Traffic besides;  // what else is read to write the outputs, and all that is written
  bool bits = false;  // whether there may be a mask to write: channels are cut into whole bytes of it where they can be

  bool operator==(const Work&) const = default;
};

Work work_of(const ForwardArgs& args);
Work work_of(const BackwardArgs& args);

}  // namespace bn::cuda
