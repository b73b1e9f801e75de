// The row operations of each instruction set: one function per translation unit of isa/.
#pragma once

#include "kernel/attention.h"
#include "kernel/row_ops.h"

namespace lamina {

const RowOps& portable_row_ops(DType dtype);
const RowOps& avx2_row_ops(DType dtype);
const RowOps& avx512_row_ops(DType dtype);
const RowOps& avx512_bf16_row_ops();  // bf16 only, as is the next
const RowOps& amx_row_ops();

}  // namespace lamina
