// Which instruction set the CPU kernels run on. Chosen once, from what the CPU reports; the environment variable
// NANORLHF_ISA=portable|avx2|avx512|avx512bf16|amx forces one (std::invalid_argument when unknown or not offered by this CPU).
#pragma once
#include <string>
#include <utility>
#include <vector>

struct Kernels;

const Kernels& kernels();
const std::string& isa();
// Every feature that a kernel might ask for, with whether this CPU has it.
std::vector<std::pair<std::string, bool>> cpu_features();
