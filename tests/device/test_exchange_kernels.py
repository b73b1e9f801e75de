"""The kernels of the exchange in Triton's interpreter, on CPU tensors, against plain PyTorch in float32.

What must not be read holds NaN, what must not be written a pattern. The interpreter runs one program after the other,
so it shows nothing of races and of the order in which memory is seen.
"""

from __future__ import annotations

import itertools
import threading
import time

import pytest
import torch
from kernel_cases import BF16, F16, F32, NO_TOKENS, OUTSIDE, Model, Replies, int32, padded, raw
from kernel_modules import exchange_kernels

from vllm_lamina.device.frame_descriptor import POISON, FrameDescriptor, Heads

kernels = exchange_kernels(interpreted=True)

NAN = float("nan")
TOLERANCE = {F32: 2e-6, F16: 1e-3, BF16: 1.6e-2}
"""Relative and absolute; the interpreter truncates to bfloat16 where a GPU rounds."""


@pytest.fixture(autouse=True)
def _same_numbers_each_time() -> None:
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------------------------- pack


PACKED = [
    (F32, Model(4, 1, 16, 16), [1]),
    (F16, Model(6, 2, 80, 80), [1, 1]),
    (BF16, Model(8, 8, 32, 32), [5, 1, 2]),
    (BF16, Model(6, 3, 24, 16), [1, 2]),
    (F32, Model(2, 2, 16, 40), [2]),
    (F16, Model(36, 1, 128, 128), [1]),  # a row of q is more than a program copies at once
]
MANY_PACKED = [
    (dtype, Model(kv_heads * group, kv_heads, k_size, v_size), kv_heads_of_workers)
    for dtype in (F32, F16, BF16)
    for kv_heads, kv_heads_of_workers in ((1, [1]), (3, [1, 2]), (8, [3, 4, 1]))
    for group in (1, 4, 7)
    for k_size, v_size in ((64, 64), (96, 96), (192, 128))
]


STEPS = {
    (5, 2): [([4, 5, 0, 2], [8, 1]), ([7], [])],
    (2, 4): [([3], [3, 0, 6]), ([], [2])],
}
"""By padded numbers of q, and of k and v: the tokens of steps."""


def check_pack(dtype: torch.dtype, model: Model, kv_heads: list[int]) -> None:
    """Steps through the same buffers, as a captured graph has them; of each worker its heads."""
    q, k, v = model.qkv(9, dtype)
    frame = torch.empty(1 << 18, dtype=torch.uint8)
    begin = -frame.data_ptr() % 64 + 64
    descriptor = torch.zeros(len(FrameDescriptor._fields), dtype=torch.int64)
    for heads, ((num_q, num_kv), steps) in itertools.product(model.heads_of(kv_heads), STEPS.items()):
        q_tokens, kv_tokens = padded([], num_q), padded([], num_kv)
        q_heads = slice(heads.first_q, heads.first_q + heads.num_q)
        own_heads = slice(heads.first_kv, heads.first_kv + heads.num_kv)
        sizes = (model.k_size, model.v_size)
        for q_rows, kv_rows in steps:
            q_tokens.copy_(padded(q_rows, num_q))
            kv_tokens.copy_(padded(kv_rows, num_kv))
            step = FrameDescriptor.of(
                frame.data_ptr() + begin, len(q_rows), len(kv_rows), 0, heads, sizes, dtype
            )
            step.write(descriptor)
            expected = frame.fill_(0xAB).clone()
            for part, offset in (
                (q[q_rows, q_heads], 0),
                (k[kv_rows, own_heads], step.k_offset),
                (v[kv_rows, own_heads], step.v_offset),
            ):
                expected[begin + offset :][: part.nbytes] = raw(part)
            kernels.pack(q, k, v, q_tokens, kv_tokens, descriptor, heads)
            assert torch.equal(frame, expected)
            # A layer that shares another's k and v sends none.
            expected = frame.fill_(0xAB).clone()
            expected[begin:][: q[q_rows, q_heads].nbytes] = raw(q[q_rows, q_heads])
            kernels.pack(q, None, None, q_tokens, kv_tokens, descriptor, heads)
            assert torch.equal(frame, expected)


@pytest.mark.parametrize(("dtype", "model", "kv_heads"), PACKED)
def test_pack(dtype: torch.dtype, model: Model, kv_heads: list[int]) -> None:
    check_pack(dtype, model, kv_heads)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "model", "kv_heads"), MANY_PACKED)
def test_pack_many(dtype: torch.dtype, model: Model, kv_heads: list[int]) -> None:
    check_pack(dtype, model, kv_heads)


def test_offsets_in_a_frame() -> None:
    """By hand: rows of 3 x 40 x 2 bytes of q, 40 x 2 of k, 24 x 2 of v, 3 x 24 x 2 of the output."""
    descriptor = FrameDescriptor.of(6400, 3, 5, 2, Heads(0, 3, 0, 1), (40, 24), F16)
    assert descriptor == (6400, 3, 5, 768, 768 + 448, 2, 448)


# ------------------------------------------------------------------------------------------------------------ words


def test_a_wait_passes_when_the_word_is_there() -> None:
    word, failed = int32(0), int32(0)
    # By no kernel: other tests let them be launched one at a time.
    later = threading.Timer(0.1, word.fill_, (3,))
    later.start()
    kernels.wait_word(word, 3, failed, 2**31 - 1)
    later.join()
    assert (word.item(), failed.item()) == (3, 0)
    kernels.write_word(word, 4)
    for passed in (1, 2, 3, 4):
        kernels.wait_word(word, passed, failed, 1)
    assert (word.item(), failed.item()) == (4, 0)


@pytest.mark.parametrize("word", [-1, 3])
def test_a_wait_that_nobody_answers_ends_and_so_do_later_ones(word: int) -> None:
    reply, failed = int32(word), int32(0)
    kernels.wait_word(reply, 4, failed, 20)
    assert failed.item() == 1
    start = time.monotonic()
    kernels.wait_word(reply, 5, failed, 10**6)
    assert time.monotonic() - start < 5
    assert (reply.item(), failed.item()) == (word, 1)


def test_poison_lets_every_wait_pass() -> None:
    word, failed = int32(0), int32(0)
    later = threading.Timer(0.1, word.fill_, (POISON,))
    later.start()
    for layer in (1, 2, 80):
        kernels.wait_word(word, layer, failed, 10**5)
    later.join()
    assert (word.item(), failed.item()) == (POISON, 0)


# ------------------------------------------------------------------------------------------------------------- take


def check_take(
    dtype: torch.dtype,
    num_heads: int,
    size: int,
    heads_of_workers: list[int] | None,
    num_workers: int,
    repeat: int = 1,
    sinks: bool = False,
) -> None:
    """Decodes of one worker and of several, chunks with and without context, padding; by heads, or else by blocks."""
    kinds = ["alone", "several", "context", "chunk", "nothing", "alone", "context", "nothing"] * repeat
    if heads_of_workers is None:
        ranges = [(0, num_heads)] * num_workers
    else:
        starts = [sum(heads_of_workers[:w]) for w in range(len(heads_of_workers))]
        ranges = list(zip(starts, heads_of_workers, strict=True))
    replies = Replies(dtype, len(kinds), num_heads, size, ranges)
    out = torch.full((len(kinds), num_heads * size + 8), NAN, dtype=dtype)[:, : num_heads * size]
    out = out.unflatten(1, (num_heads, size))
    local, local_lse = torch.zeros(len(kinds), dtype=torch.int32), torch.full((num_heads, len(kinds)), NAN).T
    tokens = torch.randperm(len(kinds)).tolist()
    for token in tokens:
        kind = kinds[token]
        if kind in ("chunk", "context"):
            local[token], local_lse[token] = 1, torch.randn(num_heads)
            out[token] = torch.randn(num_heads, size).to(dtype)
        if kind == "several" or kind == "context":
            # By blocks, some workers have none of it, and one has all blocks behind the query.
            for worker, (_, count) in enumerate(ranges):
                if heads_of_workers is not None or worker != token % max(num_workers, 2):
                    lse = 3 * torch.randn(count)
                    replies.merged[worker].append((token, replies.part(worker), lse))
        elif kind == "alone":
            for worker in range(len(ranges)) if heads_of_workers is not None else [token % num_workers]:
                replies.alone[worker].append((token, replies.part(worker)))
    replies.write()
    logits = 2 * torch.randn(num_heads) if sinks else None
    expected = replies.expected(out, local, local_lse, logits)
    head_ranges = int32(*(number for pair in ranges for number in pair)).view(-1, 2)
    tables = replies.index, head_ranges, replies.descriptors, replies.addresses
    kernels.take(out, *tables, local, local_lse, logits)
    torch.testing.assert_close(out.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    copied = [token for token, kind in enumerate(kinds) if kind in ("alone", "chunk", "nothing")]
    assert torch.equal(out[copied].float(), expected[copied])


TAKEN = [
    (F32, 4, 16, None, 1),
    (F16, 9, 24, None, 2),
    (BF16, 12, 80, None, 3),
    (F32, 7, 16, [7], 1),
    (BF16, 6, 32, [4, 2], 2),
    (F16, 17, 72, [3, 10, 4], 3),
]
MANY_TAKEN = [
    (dtype, num_heads, size, heads, workers)
    for dtype in (F32, F16, BF16)
    for size in (64, 96, 128, 256)
    for num_heads, heads, workers in (
        (1, None, 2),
        (8, None, 3),
        (32, None, 1),
        (8, [4, 4], 2),
        (32, [8, 20, 4], 3),
    )
]


@pytest.mark.parametrize(("dtype", "num_heads", "size", "heads_of_workers", "num_workers"), TAKEN)
def test_take(
    dtype: torch.dtype, num_heads: int, size: int, heads_of_workers: list[int] | None, num_workers: int
) -> None:
    check_take(dtype, num_heads, size, heads_of_workers, num_workers)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_take_counts_a_sink_where_parts_are_merged(dtype: torch.dtype) -> None:
    check_take(dtype, 12, 48, None, 3, repeat=2, sinks=True)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "num_heads", "size", "heads_of_workers", "num_workers"), MANY_TAKEN)
def test_take_many(
    dtype: torch.dtype, num_heads: int, size: int, heads_of_workers: list[int] | None, num_workers: int
) -> None:
    check_take(dtype, num_heads, size, heads_of_workers, num_workers, repeat=2)


def test_weights_of_any_size() -> None:
    """LSEs that float32 cannot raise e to, and none: the output over no tokens is NaN, and must not be seen."""
    lses = [
        (500.0, -500.0),
        (-3e4, -3e4),
        (1e30, 2.0),
        (NO_TOKENS, -7.0),
        (4.0, NO_TOKENS),
        (NO_TOKENS, NO_TOKENS),
    ]
    replies = Replies(F32, 2 * len(lses), 2, 16, [(0, 2), (0, 2)])
    out, local_lse = torch.full((2 * len(lses), 2, 16), NAN), torch.full((2 * len(lses), 2), NAN)
    local = int32(*[0, 1] * len(lses))
    for i, pair in enumerate(lses):
        for token, sides in ((2 * i, pair), (2 * i + 1, pair[:1])):
            for worker, lse in enumerate(sides):
                part = torch.full((2, 16), NAN) if lse == NO_TOKENS else replies.part(worker)
                replies.merged[worker].append((token, part, torch.full((2,), lse)))
        local_lse[2 * i + 1] = pair[1]
        out[2 * i + 1] = NAN if pair[1] == NO_TOKENS else torch.randn(2, 16)
    replies.write()
    expected = replies.expected(out, local, local_lse)
    assert not expected.isnan().any()
    head_ranges = int32(0, 2, 0, 2).view(2, 2)
    kernels.take(out, replies.index, head_ranges, replies.descriptors, replies.addresses, local, local_lse)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=2e-6)


def test_nothing_is_read_that_is_not_there() -> None:
    """A worker that was lost has no reply; a row behind a reply's end is not of this step. Both are zeros."""
    replies = Replies(F32, 3, 2, 16, [(0, 1), (1, 1)])
    for worker in range(2):
        replies.alone[worker] += [(token, replies.part(worker)) for token in range(2)]
    replies.write()
    replies.index[:, 2] = OUTSIDE
    replies.addresses[0] = 0
    out = torch.full((3, 2, 16), NAN)
    kernels.take(out, replies.index, int32(0, 1, 1, 1).view(2, 2), replies.descriptors, replies.addresses)
    assert torch.equal(out[:2, 1], torch.stack([part[0] for _, part in replies.alone[1]]))
    assert not out[:, 0].any()
    assert not out[2].any()


# ---------------------------------------------------------------------------------------------------------- a layer


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One query token: q [heads, size], k, v [tokens, KV heads, size]; the output and its LSE."""
    k, v = (x.float().repeat_interleave(len(q) // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("hd,nhd->hn", q.float(), k)
    return torch.einsum("hn,nhd->hd", scores.softmax(1), v), scores.logsumexp(1)


@pytest.mark.parametrize("by_heads", [True, False])
def test_a_layer_over_two_workers(by_heads: bool) -> None:
    """Frames as workers read them, replies as they write them: two decodes, and a chunk of two tokens with context."""
    model, context_lens = Model(6, 3, 16, 24), [5, 7, 4]
    q, k, v = model.qkv(4, F32)
    context = [model.qkv(n, F32)[1:] for n in context_lens]
    request_of = [0, 1, 2, 2]
    parts = model.heads_of([1, 2]) if by_heads else model.heads_of([3]) * 2
    # By blocks: who holds which tokens of a context, and new tokens. Decode 1 and the chunk's context lie on both.
    held = [[5, 3, 2], [0, 4, 2]] if not by_heads else [context_lens, context_lens]
    new = [[0, 2, 3], [1]] if not by_heads else [list(range(4))] * 2
    replies = Replies(F32, 4, 6, 24, [(heads.first_q, heads.num_q) for heads in parts])
    frame = torch.zeros(1 << 14, dtype=torch.uint8)
    descriptor = torch.zeros(len(FrameDescriptor._fields), dtype=torch.int64)
    for worker, heads in enumerate(parts):
        rows = [t for t in range(4) if held[worker][request_of[t]]]
        begin = -frame.data_ptr() % 64
        step = FrameDescriptor.of(
            frame.data_ptr() + begin, len(rows), len(new[worker]), 0, heads, (16, 24), F32
        )
        step.write(descriptor)
        kernels.pack(q, k, v, padded(rows, 5), padded(new[worker], 4), descriptor, heads)
        sent = [
            frame[begin + offset :][: 4 * count * n * size].view(F32).view(count, n, size)
            for count, n, size, offset in (
                (len(rows), heads.num_q, 16, 0),
                (len(new[worker]), heads.num_kv, 16, step.k_offset),
                (len(new[worker]), heads.num_kv, 24, step.v_offset),
            )
        ]
        for row, token in enumerate(rows):
            request, count = request_of[token], held[worker][request_of[token]]
            from_begin = by_heads or worker == 0
            place = slice(count) if from_begin else slice(context_lens[request] - count, None)
            kv_heads = slice(heads.first_kv, heads.first_kv + heads.num_kv)
            cache = [x[place, kv_heads] for x in context[request]]
            if request < 2 and token in new[worker]:
                at = new[worker].index(token)
                cache = [torch.cat((x, y[at : at + 1])) for x, y in zip(cache, sent[1:], strict=True)]
            out, lse = attend(sent[0][row], *cache)
            if request == 0 or (by_heads and request == 1):
                replies.alone[worker].append((token, out))
            else:
                replies.merged[worker].append((token, out, lse))
    replies.write()
    out, local_lse = torch.full((4, 6, 24), NAN), torch.full((4, 6), NAN)
    for token in (2, 3):
        out[token], local_lse[token] = attend(q[token], k[2 : token + 1], v[2 : token + 1])
    head_ranges = int32(*(n for pair in replies.head_ranges for n in pair)).view(2, 2)
    kernels.take(
        out, replies.index, head_ranges, replies.descriptors, replies.addresses, int32(0, 0, 1, 1), local_lse
    )
    for token, request in enumerate(request_of):
        begin = 2 if request == 2 else token
        whole = [torch.cat((x, y[begin : token + 1])) for x, y in zip(context[request], (k, v), strict=True)]
        torch.testing.assert_close(out[token], attend(q[token], *whole)[0], atol=1e-5, rtol=1e-5)
