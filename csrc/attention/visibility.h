// To how many rows of a tile or block of queries a key, or a panel of keys, is visible.
#pragma once
#include "../simd/vector.h"

namespace vgpo::VGPO_TARGET {

enum Visibility : int32_t { NONE, PARTIAL, FULL };

}  // namespace vgpo::VGPO_TARGET
