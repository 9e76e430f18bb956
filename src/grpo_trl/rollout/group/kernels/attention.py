"""Attention of one token of each row to the keys that it sees and no more, whatever others see.

Rows and prompts of any lengths take one launch, so that a recorded graph serves all lengths. Long memories are read in
chunks by different programs, whose outputs are merged by their log-sum-exps. What is computed for a row does not depend
on the rows beside it. Sums are taken in float32.

Axes: R running rows, X slots of keys, G most rows of a slot, H query heads, K key-value heads, D head size; in a program L
queries, J keys, C chunks.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..step import LayerMemory, Reach, Step


CHUNK = 512
"""Keys that one program reads at most."""
MOST_LINES = 64
"""Queries of one program at most."""


class Partial(NamedTuple):
    """What the chunks of all keys leave for `_merged`."""

    output: Tensor  # (chunks, R, H, D of the values), float32
    lse: Tensor  # (chunks, R, H), float32; -inf where a row sees no key of the chunk

    @classmethod
    def empty(cls, chunks: int, query_RHD: Tensor, value_size: int) -> "Partial":
        rows, heads, _ = query_RHD.shape
        output = query_RHD.new_empty(chunks, rows, heads, value_size, dtype=torch.float32)
        return cls(output, query_RHD.new_full((chunks, rows, heads), -torch.inf, dtype=torch.float32))


def attend(query_RHD: Tensor, layer: LayerMemory, step: Step) -> Tensor:
    """Attend to what each row sees of its own keys and of those of its prompt.

    Args:
        query_RHD: Contiguous.
        layer: What it attends to, and how.
        step: Which slots and keys each row has.

    Returns:
        Of shape (R, H*D of the values).
    """
    own, prompt = step.reaches(layer.window)
    first = _chunks(layer.prompts)
    partial: Partial = step.shared(
        ("partial", query_RHD.shape, layer.value_size),
        lambda: Partial.empty(first + _chunks(layer.own), query_RHD, layer.value_size),
    )
    _attend_to(query_RHD, layer.prompts, prompt, layer, partial, 0)
    _attend_to(query_RHD, layer.own, own, layer, partial, first)
    return _merged(partial, query_RHD.dtype)


def _chunks(memory: Tensor) -> int:
    return -(-memory.shape[1] // CHUNK)


def _attend_to(
    query_RHD: Tensor, memory: Tensor, reach: Reach, layer: LayerMemory, partial: Partial, first_chunk: int
) -> None:
    """Leave what the chunks of a memory give in `partial`, from `first_chunk` on."""
    _, heads, size = query_RHD.shape
    key_heads, value_size = layer.key_heads, layer.value_size
    slots, group = reach.rows_XG.shape
    queries = heads // key_heads
    lines = min(MOST_LINES, max(16, triton.next_power_of_2(group * queries)))
    blocks = triton.cdiv(group * queries, lines)
    padded = max(16, triton.next_power_of_2(max(size, value_size)))
    _attend[slots * blocks, key_heads, _chunks(memory)](
        *(query_RHD, memory, *reach, *partial),
        *(layer.scaling, layer.softcap or 1.0, len(query_RHD), group, memory.shape[1], first_chunk, blocks),
        KEY_HEADS=key_heads,
        QUERIES=queries,
        SIZE=size,
        VALUE_SIZE=value_size,
        PADDED=padded,
        LINES=lines,
        CHUNK_KEYS=CHUNK,
        CAPPED=layer.softcap is not None,
        num_warps=4 if lines > 16 or padded > 64 else 2,
        **_tile(padded * memory.element_size()),
    )


def _tile(line_bytes: int) -> dict[str, int]:
    """Keys that a program reads at a time, and how many times ahead: so that they fit into the 99 KiB of consumer cards."""
    if line_bytes <= 256:
        return {"COLUMNS": 64, "num_stages": 3}
    return {"COLUMNS": 32, "num_stages": 2} if line_bytes <= 512 else {"COLUMNS": 16, "num_stages": 1}


@triton.jit(do_not_specialize=["all_rows", "group", "columns", "first_chunk", "blocks"])
def _attend(
    query,
    memory,
    rows,
    first,
    stop,
    output,
    lse,
    scaling,
    softcap,
    all_rows,
    group,
    columns,
    first_chunk,
    blocks,
    KEY_HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK_KEYS: tl.constexpr,
    CAPPED: tl.constexpr,
):
    heads: tl.constexpr = KEY_HEADS * QUERIES
    slot = tl.program_id(0) // blocks
    head = tl.program_id(1)
    chunk = tl.program_id(2)
    line_L = (tl.program_id(0) % blocks) * LINES + tl.arange(0, LINES)
    place_L = line_L // QUERIES
    row_L = tl.load(rows + slot * group + place_L, mask=place_L < group, other=-1)
    there_L = row_L >= 0
    first_L = tl.load(first + row_L, mask=there_L, other=2147483647)
    stop_L = tl.load(stop + row_L, mask=there_L, other=0)
    begin = tl.maximum(tl.min(first_L, 0) // COLUMNS * COLUMNS, chunk * CHUNK_KEYS)
    end = tl.minimum(tl.max(stop_L, 0), (chunk + 1) * CHUNK_KEYS)

    d = tl.arange(0, PADDED)
    line_at = row_L.to(tl.int64) * heads + head * QUERIES + line_L % QUERIES
    query_LD = tl.load(query + line_at[:, None] * SIZE + d, mask=there_L[:, None] & (d < SIZE), other=0.0)
    width: tl.constexpr = KEY_HEADS * (SIZE + VALUE_SIZE)
    keys = memory + slot.to(tl.int64) * columns * width + head * SIZE
    values = memory + slot.to(tl.int64) * columns * width + KEY_HEADS * SIZE + head * VALUE_SIZE
    largest_L = tl.full([LINES], -1e30, tl.float32)
    sum_L = tl.zeros([LINES], tl.float32)
    output_LD = tl.zeros([LINES, PADDED], tl.float32)
    for start in range(begin, end, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        # what lies behind the end may not be finite
        key_DJ = tl.load(keys + j * width + d[:, None], mask=(j < end) & (d[:, None] < SIZE), other=0.0)
        score_LJ = tl.dot(query_LD, key_DJ, input_precision="ieee") * scaling
        if CAPPED:
            score_LJ = softcap * (2.0 * tl.sigmoid(2.0 * score_LJ / softcap) - 1.0)
        seen_LJ = (j >= first_L[:, None]) & (j < tl.minimum(stop_L, end)[:, None])
        score_LJ = tl.where(seen_LJ, score_LJ, float("-inf"))
        new_L = tl.maximum(largest_L, tl.max(score_LJ, 1))
        share_LJ = tl.exp(score_LJ - new_L[:, None])
        shrink_L = tl.exp(largest_L - new_L)
        value_JD = tl.load(values + j[:, None] * width + d, mask=(j[:, None] < end) & (d < VALUE_SIZE), other=0.0)
        output_LD = output_LD * shrink_L[:, None]
        output_LD += tl.dot(share_LJ.to(value_JD.dtype), value_JD, input_precision="ieee")
        sum_L = sum_L * shrink_L + tl.sum(share_LJ, 1)
        largest_L = new_L
    safe_L = tl.where(sum_L > 0, sum_L, 1.0)
    at_L = (first_chunk + chunk).to(tl.int64) * all_rows * heads + line_at
    tl.store(lse + at_L, tl.where(sum_L > 0, largest_L + tl.log(safe_L), float("-inf")), mask=there_L)
    tl.store(
        output + at_L[:, None] * VALUE_SIZE + d,
        output_LD / safe_L[:, None],
        mask=there_L[:, None] & (d < VALUE_SIZE),
    )


def _merged(partial: Partial, dtype: torch.dtype) -> Tensor:
    """The output over all chunks, of shape (R, H*D of the values)."""
    chunks, rows, heads, size = partial.output.shape
    output = partial.output.new_empty(rows, heads * size, dtype=dtype)
    _merge[(rows * heads,)](
        *partial,
        *(output, chunks, rows * heads),
        SIZE=size,
        PADDED=triton.next_power_of_2(size),
        CHUNKS=triton.next_power_of_2(chunks),
        num_warps=1,
    )
    return output


@triton.jit(do_not_specialize=["chunks", "lines"])
def _merge(partial, lse, output, chunks, lines, SIZE: tl.constexpr, PADDED: tl.constexpr, CHUNKS: tl.constexpr):
    line = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, CHUNKS)
    d = tl.arange(0, PADDED)
    lse_C = tl.load(lse + c * lines + line, mask=c < chunks, other=float("-inf"))
    weight_C = tl.exp(lse_C - tl.max(lse_C, 0))
    at_CD = (c * lines + line)[:, None] * SIZE + d
    # where the weight is 0, nothing may have been written
    partial_CD = tl.load(partial + at_CD, mask=(weight_C > 0)[:, None] & (d < SIZE), other=0.0)
    output_D = tl.sum(weight_C[:, None] * partial_CD, 0) / tl.sum(weight_C, 0)
    tl.store(output + line * SIZE + d, output_D.to(output.dtype.element_ty), mask=d < SIZE)
