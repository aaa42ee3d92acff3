// Headers of the standard library come before a target is switched on: what they emit is shared by all targets.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>
#include <stdexcept>
#include <string>

#include "parallel.h"
#include "view.h"

// Compiled against a newer glibc these three would need 2.29; torch's wheels run from 2.28 on.
#if defined(__x86_64__) && defined(__GLIBC__)
__asm__(".symver exp, exp@GLIBC_2.2.5");
__asm__(".symver log, log@GLIBC_2.2.5");
__asm__(".symver pow, pow@GLIBC_2.2.5");
#endif
