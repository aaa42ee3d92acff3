// The kernels for any processor: vectors of four floats, which every target's baseline has.
#define VGPO_TARGET portable
#define VGPO_LANES 4
#include "kernels.h"
