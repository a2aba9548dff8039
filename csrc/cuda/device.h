#pragma once

#include "cuda/plan.h"

namespace bn::cuda {

// Those of the GPU that is current, asked for once.
const Limits& current_limits();

}  // namespace bn::cuda
