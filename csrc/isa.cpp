#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

#if defined(__x86_64__)
#define HAS(feature) (__builtin_cpu_supports(feature) != 0)
#else
#define HAS(feature) false
#endif

namespace {

#if defined(__x86_64__)
// AMX with bf16: the CPU has it, and the system saves its registers and lets this process use them.
bool has_amx() {
    unsigned eax = 7, ebx = 0, ecx = 0, edx = 0;
    __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
    if (!((edx >> 22) & 1u) || !((edx >> 24) & 1u)) return false;  // AMX-BF16, AMX-TILE
#ifdef __linux__
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}
#endif

struct Choice {
    std::string name;
    const Kernels* table;
};

bool offers(const std::string& name) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (name == "amx") return offers("avx512bf16") && has_amx();
    if (name == "avx512bf16") return offers("avx512") && HAS("avx512bf16");
    if (name == "avx512") return HAS("avx512f") && HAS("avx512bw") && HAS("avx512vl") && HAS("avx512dq");
    if (name == "avx2") return HAS("avx2") && HAS("fma");
#endif
    return name == "portable";
}

const Kernels* table_of(const std::string& name) {
#if defined(__x86_64__)
    if (name == "amx") return &kernels_amx;
    if (name == "avx512bf16") return &kernels_avx512bf16;
    if (name == "avx512") return &kernels_avx512;
    if (name == "avx2") return &kernels_avx2;
#endif
    return &kernels_portable;
}

Choice choose() {
    const std::vector<std::string> names = {"amx", "avx512bf16", "avx512", "avx2", "portable"};
    if (const char* forced = std::getenv("NANORLHF_ISA"); forced && *forced) {
        for (const std::string& name : names) {
            if (name != forced) continue;
            if (!offers(name)) throw std::invalid_argument("NANORLHF_ISA: this CPU does not offer " + name);
            return {name, table_of(name)};
        }
        throw std::invalid_argument("NANORLHF_ISA: expected portable, avx2, avx512, avx512bf16 or amx, got " + std::string(forced));
    }
    for (const std::string& name : names)
        if (offers(name)) return {name, table_of(name)};
    return {"portable", &kernels_portable};
}

const Choice& choice() {
    static const Choice chosen = choose();
    return chosen;
}

}  // namespace

const Kernels& kernels() { return *choice().table; }

const std::string& isa() { return choice().name; }

std::vector<std::pair<std::string, bool>> cpu_features() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool amx = has_amx();
#else
    const bool amx = false;
#endif
    return {{"avx2", HAS("avx2")},         {"fma", HAS("fma")},           {"avx512f", HAS("avx512f")},
            {"avx512bw", HAS("avx512bw")}, {"avx512vl", HAS("avx512vl")}, {"avx512dq", HAS("avx512dq")},
            {"avx512_vnni", HAS("avx512vnni")}, {"avx512_bf16", HAS("avx512bf16")}, {"amx_bf16", amx}};
}
