// Dropout's block functions, compiled once per SIMD level.
#include "native.hpp"
