#pragma once

#include "cuda/plan.h"

namespace bn::cuda {

// The limits of the current GPU, asked for once.
const Limits& current_limits();

}  // namespace bn::cuda
