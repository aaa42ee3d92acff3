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
