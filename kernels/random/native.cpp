// The random family's level functions, compiled once per SIMD level.
#include "native.hpp"
