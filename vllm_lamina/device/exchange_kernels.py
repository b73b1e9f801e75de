"""A layer's exchange as a GPU does it, in Triton: q, k, v into frames, words written and awaited, replies taken.

For CUDA tensors, or for CPU tensors where Triton interprets (``TRITON_INTERPRET=1``). Nothing of it has run on a GPU.

All may be captured in a CUDA graph: arguments are addresses of buffers that stay, constants of the model, and padded
sizes. What differs from step to step is read from these buffers, which the host fills before the step, and not before
the last kernel of an earlier step has read them.

Host memory that CUDA knows (pinned, or any mapping passed to ``cudaHostRegister``) is an ordinary CPU tensor here:
Triton's launcher asks the driver for its address on the device. An address *in* a buffer is the device's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_lamina.device.frame_descriptor import FrameDescriptor, Heads

_FIELDS = tl.constexpr(len(FrameDescriptor._fields))
_PAYLOAD, _NUM_Q, _NUM_KV, _K_OFFSET, _V_OFFSET, _NUM_ROWS_WITHOUT_LSE, _LSE_OFFSET = (
    tl.constexpr(field) for field in range(len(FrameDescriptor._fields))
)
_FLOATS = tl.constexpr(tl.pointer_type(tl.float32))
_NO_TOKENS = tl.constexpr(float("-inf"))  # the LSE of none
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _at(address, POINTER: tl.constexpr):
    """An aligned address as a pointer of this type."""
    return tl.multiple_of(tl.multiple_of(address, 16).to(POINTER), 16)


@triton.jit
def _copy_row(
    rows, tokens, stride, count, address, FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Elements [FIRST, FIRST + WIDTH) of a token's row to this program's row at ``address``."""
    row = tl.program_id(0).to(tl.int64)
    if row < count:
        source = rows + tl.load(tokens + row).to(tl.int64) * stride + FIRST
        target = _at(address, rows.dtype) + row * WIDTH
        for i in range(0, WIDTH, BLOCK):
            at = i + tl.arange(0, BLOCK)
            tl.store(target + at, tl.load(source + at, mask=at < WIDTH), mask=at < WIDTH)


@triton.jit(do_not_specialize_on_alignment=["q_tokens", "kv_tokens", "descriptor"])
def pack_kernel(
    q, k, v, q_tokens, kv_tokens, descriptor, q_stride, k_stride, v_stride,
    FIRST_Q: tl.constexpr, Q_WIDTH: tl.constexpr, FIRST_K: tl.constexpr, K_WIDTH: tl.constexpr,
    FIRST_V: tl.constexpr, V_WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (padded rows, 3): a row of q, k or v each."""
    part = tl.program_id(1)
    payload = tl.load(descriptor + _PAYLOAD)
    if part == 0:
        num_q = tl.load(descriptor + _NUM_Q)
        _copy_row(q, q_tokens, q_stride, num_q, payload, FIRST_Q, Q_WIDTH, BLOCK)
    else:
        num_kv = tl.load(descriptor + _NUM_KV)
        if part == 1:
            begin = payload + tl.load(descriptor + _K_OFFSET)
            _copy_row(k, kv_tokens, k_stride, num_kv, begin, FIRST_K, K_WIDTH, BLOCK)
        else:
            begin = payload + tl.load(descriptor + _V_OFFSET)
            _copy_row(v, kv_tokens, v_stride, num_kv, begin, FIRST_V, V_WIDTH, BLOCK)


@triton.jit
def _read_word(word):
    """What another side wrote to the word. What it wrote before that is seen by what is read after this."""
    if _INTERPRETED:
        seen = tl.load(word, volatile=True)
    else:
        load: tl.constexpr = "ld.acquire.sys.global.b32 $0, [$1];"
        seen = tl.inline_asm_elementwise(load, "=r,l", [word.to(tl.int64)], tl.int32, is_pure=False, pack=1)
    return seen


@triton.jit
def _write_word(word, value):
    """Not by an atomic exchange, which reads over the bus first. Every thread of the warp writes the same."""
    if _INTERPRETED:
        tl.store(word, value)
    else:
        store: tl.constexpr = "st.release.sys.global.b32 [$1], $2; mov.b32 $0, 0;"
        tl.inline_asm_elementwise(
            store, "=r,l,r", [word.to(tl.int64), value], tl.int32, is_pure=False, pack=1
        )


@triton.jit(do_not_specialize=["value"], do_not_specialize_on_alignment=["word"])
def write_word_kernel(word, value):
    """Grid (1,), one warp."""
    _write_word(word, value)


@triton.jit(do_not_specialize=["value", "max_polls"], do_not_specialize_on_alignment=["word", "failed"])
def wait_word_kernel(word, value, failed, max_polls):
    """Grid (1,), one warp."""
    polls_left = tl.where(tl.load(failed, volatile=True) == 0, max_polls, 0)
    seen = _read_word(word)
    while (seen < value) & (polls_left > 0):
        seen = _read_word(word)
        polls_left -= 1
    if seen < value:
        _write_word(failed, 1)


@triton.jit
def _merge(whole, largest, total, part, lse):
    """One more contribution to sum(A S) and sum(S), both divided by exp(largest LSE) so that nothing overflows."""
    largest_now = tl.maximum(largest, lse)
    base = tl.where(largest_now == _NO_TOKENS, 0.0, largest_now)
    keep, weight = tl.exp(largest - base), tl.exp(lse - base)
    # Selected, not only multiplied by 0: the output over no tokens may be NaN.
    part = tl.where((lse == _NO_TOKENS)[:, None], 0.0, part)
    return whole * keep[:, None] + part * weight[:, None], largest_now, total * keep + weight


@triton.jit(
    do_not_specialize=["index_stride", "lse_token_stride", "lse_head_stride"],
    do_not_specialize_on_alignment=[
        "local", "local_lse", "sinks", "index", "head_ranges", "descriptors", "replies"
    ],
)  # fmt: skip
def take_kernel(
    out, local, local_lse, sinks, index, head_ranges, descriptors, replies,
    out_stride, index_stride, lse_token_stride, lse_head_stride,
    REPLY_STRIDE: tl.constexpr, NUM_WORKERS: tl.constexpr, NUM_HEADS: tl.constexpr,
    SIZE: tl.constexpr, PADDED_SIZE: tl.constexpr, BLOCK_HEADS: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, ceil(heads / BLOCK_HEADS)): some heads of one output row each."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    element = tl.arange(0, PADDED_SIZE)
    live = (head < NUM_HEADS)[:, None] & (element < SIZE)[None, :]
    target = out + token * out_stride + head[:, None] * SIZE + element[None, :]
    whole = tl.full([BLOCK_HEADS, PADDED_SIZE], 0.0, tl.float32)
    largest = tl.full([BLOCK_HEADS], _NO_TOKENS, tl.float32)
    total = tl.full([BLOCK_HEADS], 0.0, tl.float32)
    if sinks is not None:
        wants_sink = head < 0
    if local is not None:
        here = head < tl.where(tl.load(local + token) != 0, NUM_HEADS, 0)
        lse_at = local_lse + token * lse_token_stride + head.to(tl.int64) * lse_head_stride
        lse = tl.load(lse_at, mask=here, other=_NO_TOKENS)
        part = tl.load(target, mask=live & here[:, None], other=0.0).to(tl.float32)
        whole, largest, total = _merge(whole, largest, total, part, lse)
    for worker in tl.static_range(NUM_WORKERS):
        address = tl.load(replies + worker * REPLY_STRIDE)
        descriptor = descriptors + worker * _FIELDS
        num_without_lse = tl.load(descriptor + _NUM_ROWS_WITHOUT_LSE)
        row = tl.load(index + worker * index_stride + token).to(tl.int64)
        first = tl.load(head_ranges + 2 * worker)
        count = tl.load(head_ranges + 2 * worker + 1)
        is_there = (address != 0) & (row >= 0) & (row < tl.load(descriptor + _NUM_Q))
        here = (head >= first) & (head < tl.where(is_there, first + count, 0))
        place = row * count + (head - first)
        # By masks, not branches: so reads of several workers, each a journey over the bus, can be under way together.
        part_at = _at(address, out.dtype) + place[:, None] * SIZE + element[None, :]
        part = tl.load(part_at, mask=live & here[:, None], other=0.0).to(tl.float32)
        lse_at = _at(address + tl.load(descriptor + _LSE_OFFSET), _FLOATS) + place - num_without_lse * count
        has_lse = here & (head >= tl.where(row < num_without_lse, NUM_HEADS, 0))
        lse = tl.load(lse_at, mask=has_lse, other=0.0)
        whole, largest, total = _merge(whole, largest, total, part, tl.where(here, lse, _NO_TOKENS))
        if sinks is not None:
            wants_sink = wants_sink | has_lse
    if sinks is not None:
        if local is not None:  # a chunk counts its sinks where it attends itself
            wants_sink = wants_sink & (head >= tl.where(tl.load(local + token) != 0, NUM_HEADS, 0))
        sink = tl.load(sinks + head, mask=wants_sink, other=_NO_TOKENS)
        nothing = tl.full([BLOCK_HEADS, PADDED_SIZE], 0.0, tl.float32)
        whole, largest, total = _merge(whole, largest, total, nothing, sink)
    share = tl.where(total > 0.0, total, 1.0)
    tl.store(target, (whole / share[:, None]).to(out.dtype.element_ty), mask=live)


def pack(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    q_tokens: torch.Tensor,
    kv_tokens: torch.Tensor,
    descriptor: torch.Tensor,
    heads: Heads,
) -> None:
    """Write an attention worker's heads of some tokens into the payload of its frame.

    Parameters
    ----------
    q, k, v
        [tokens, heads, size], of one dtype, each token's row contiguous; the sizes of k and v may differ. Without k and
        v the frame holds q alone.
    q_tokens, kv_tokens
        Tokens whose q, and whose k and v, the worker gets: int32, as many as the step is padded to. What is behind
        the descriptor's ``num_q`` and ``num_kv`` is not read.
    descriptor
        The worker's `FrameDescriptor`: int64. In the device's own memory it is read sooner than over the bus.
    heads
        Which heads the worker has.
    """
    ranges = ((heads.first_q, heads.num_q), (heads.first_kv, heads.num_kv), (heads.first_kv, heads.num_kv))
    grid = (max(len(q_tokens), len(kv_tokens)), 3)
    if k is None or v is None:
        k = v = q
        grid = (len(q_tokens), 1)
    columns = [
        n * x.shape[2] for x, first_and_count in zip((q, k, v), ranges, strict=True) for n in first_and_count
    ]
    strides = [x.stride(0) for x in (q, k, v)]
    block = min(triton.next_power_of_2(max(columns[1::2])), 4096)
    pack_kernel[grid](q, k, v, q_tokens, kv_tokens, descriptor, *strides, *columns, block)


def write_word(word: torch.Tensor, value: int) -> None:
    """Write ``value`` to ``word``, [1] int32, once all that came before on the stream can be seen on every side.

    Where the driver has no ``cuStreamWriteValue32``.
    """
    write_word_kernel[(1,)](word, value, num_warps=1)


def wait_word(word: torch.Tensor, value: int, failed: torch.Tensor, max_polls: int) -> None:
    """Let the stream go on once ``word`` is at least ``value``, as signed numbers.

    Where the driver has no ``cuStreamWaitValue32``. A word counts the layers of a step from 1. The host sets it to 0
    before the step, or at any time to `POISON`, to let every wait for it pass; that step's output is thrown away.

    Parameters
    ----------
    word
        [1], int32.
    value
        The layer's number.
    failed
        [1], int32, in memory that the host reads: set to 1 after ``max_polls``. Then no wait with it waits any more.
    max_polls
        How often the word is read in vain, about a microsecond each over PCIe.
    """
    wait_word_kernel[(1,)](word, value, failed, max_polls, num_warps=1)


def take(
    out: torch.Tensor,
    index: torch.Tensor,
    head_ranges: torch.Tensor,
    descriptors: torch.Tensor,
    replies: torch.Tensor,
    local: torch.Tensor | None = None,
    local_lse: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """Bring the replies of all attention workers, and what was attended here, together in the output.

    With ``A`` the normalised output and ``S = exp(LSE)`` of each contribution to a head of a row, the whole is
    ``sum(A S) / sum(S)`` (the merge of the Lamina paper), in float32; without any contribution it is zeros.

    Parameters
    ----------
    out
        [tokens, heads, size], each token's row contiguous: what was attended here, and then the whole.
    index
        [workers, tokens], int32: the row of a token in the worker's reply, or -1.
    head_ranges
        [workers, 2], int32: the first of the worker's heads, and how many.
    descriptors
        [workers, fields], int64, contiguous: each worker's `FrameDescriptor`.
    replies
        [workers], int64: address on the device of each reply's payload, a multiple of 64; 0 where there is none. The
        host sets them to 0 before a step: what fits behind an earlier reply's address may be less than this one.
    local, local_lse
        int32 [tokens], whether ``out`` holds a contribution, and float32 [tokens, heads], its LSE. None where no
        token has one.
    sinks
        [heads], float32: a logit that is added to the sum of S of rows that come with their LSE. Where ``out`` holds a
        contribution, it has them already.
    """
    num_tokens, num_heads, size = out.shape
    padded_size = triton.next_power_of_2(size)
    # Eight elements a thread: 16 bytes of the shorter dtypes.
    block = min(triton.next_power_of_2(num_heads), max(1024 // padded_size, 1))
    lse_strides = (0, 0) if local_lse is None else local_lse.stride()
    strides = (out.stride(0), index.stride(0), *lse_strides, replies.stride(0))
    sizes = (len(index), num_heads, size, padded_size, block)
    grid = (num_tokens, triton.cdiv(num_heads, block))
    take_kernel[grid](
        out, local, local_lse, sinks, index, head_ranges, descriptors, replies, *strides, *sizes
    )
