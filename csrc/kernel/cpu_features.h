// What this CPU and operating system let the kernel use.
#pragma once

namespace lamina {

// AVX2 with FMA and F16C.
bool cpu_has_avx2();
// AVX-512 F, BW, DQ, VL.
bool cpu_has_avx512();
// These, and BF16 (VDPBF16PS).
bool cpu_has_avx512_bf16();
// AMX-BF16 with AVX-512 BF16. The first call asks Linux for the process's permission to use AMX tiles,
// without which the first tile instruction is a SIGILL; where that is refused the answer is no.
bool cpu_has_amx();

}  // namespace lamina
