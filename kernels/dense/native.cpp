#include "native.hpp"
