// SPDX-License-Identifier: BSD-3-Clause
// Every kernel by the name that the launcher asks for.
#pragma once
#include <map>
#include <string>

typedef void (*Kernel)(const void* arguments);
const std::map<std::string, Kernel>& kernels();
