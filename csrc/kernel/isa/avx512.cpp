// Attention with AVX-512: float32 FMA on KV of any dtype.
//
// bfloat16 is converted as well, for CPUs without VDPBF16PS (avx512_bf16.cpp).
#include "kernel/isa/avx512_lanes.h"
#include "kernel/isa/panel_attention.h"
#include "kernel/isa/variants.h"

namespace lamina {

const RowOps& avx512_row_ops(DType dtype) { return panel_row_ops<Avx512Lanes>(dtype); }

}  // namespace lamina
