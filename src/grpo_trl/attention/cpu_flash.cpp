// Shared-prefix attention in packed rows, and its gradient, in float32.
//
// Lanes are 16 consecutive tokens of a prompt or of a completion, for one head.

#include <vector>

#include "attention.h"

namespace {

struct Tensor {
    float *at;
    long head, token;  // strides
    float *operator()(long h, long t) const { return at + h * head + t * token; }
};

struct Row {
    Tensor query, key, value, output;
    float *lse;  // (heads, tokens)
    long tokens, heads, key_heads, size;
    float scaling;
    long key_head(long head) const { return head / (heads / key_heads); }
};

// Tokens from `start` to `stop` of a prompt or a completion, and those of the prompt before it.
struct Segment {
    int32_t start, stop, prompt_start, prompt_stop;
};

void attend(const Row &row, const Segment &segment, int32_t start, long head) {
    Block<1> block;
    for (int32_t token = start; token < std::min(start + LANES, segment.stop); token++) {
        block.query[block.count] = row.query(head, token);
        block.output[block.count] = row.output(head, token);
        block.lse[block.count] = row.lse + head * row.tokens + token;
        block.seen[0][block.count] = {0, token + 1 - segment.start};
        block.seen[1][block.count++] = {0, segment.prompt_stop - segment.prompt_start};
    }
    KeysValues held[2];
    const int32_t starts[2] = {segment.start, segment.prompt_start};
    for (int part = 0; part < 2; part++)
        held[part] = {row.key(row.key_head(head), starts[part]), row.value(row.key_head(head), starts[part]),
                      row.key.token, row.value.token};
    block.attend(held, segment.prompt_stop > segment.prompt_start ? 2 : 1, {row.size, row.size, row.scaling, 0});
}

// c[r] += sum over k of a[r * a_row + k * a_depth] * b[k * b_depth], for rows of 16 * WIDTH numbers.
template <int ROWS, int WIDTH>
void add_product(const float *a, long a_row, long a_depth, const float *b, long b_depth, int depth, float *c,
                 long c_row) {
    Vector sum[ROWS][WIDTH];
    for (int r = 0; r < ROWS; r++)
        for (int w = 0; w < WIDTH; w++) sum[r][w] = load(c + r * c_row + w * LANES);
    for (int k = 0; k < depth; k++) {
        Vector x[WIDTH];
        for (int w = 0; w < WIDTH; w++) x[w] = load(b + k * b_depth + w * LANES);
        for (int r = 0; r < ROWS; r++)
            for (int w = 0; w < WIDTH; w++) sum[r][w] += x[w] * a[r * a_row + k * a_depth];
    }
    for (int r = 0; r < ROWS; r++)
        for (int w = 0; w < WIDTH; w++) store(sum[r][w], c + r * c_row + w * LANES);
}

template <int WIDTH>
void add_products(const float *a, long a_row, long a_depth, const float *b, long b_depth, int depth, float *c,
                  long c_row, int rows) {
    int r = 0;
    for (; r + 4 <= rows; r += 4)
        add_product<4, WIDTH>(a + r * a_row, a_row, a_depth, b, b_depth, depth, c + r * c_row, c_row);
    for (; r < rows; r++)
        add_product<1, WIDTH>(a + r * a_row, a_row, a_depth, b, b_depth, depth, c + r * c_row, c_row);
}

void add_matrix(const float *a, long a_row, long a_depth, const float *b, long b_depth, int depth, float *c, long c_row,
                int rows, long size) {
    long d = 0;
    for (; d + 2 * LANES <= size; d += 2 * LANES)
        add_products<2>(a, a_row, a_depth, b + d, b_depth, depth, c + d, c_row, rows);
    for (; d < size; d += LANES) add_products<1>(a, a_row, a_depth, b + d, b_depth, depth, c + d, c_row, rows);
}

struct Gradients {
    Tensor output, query, key, value;
};

// Adds what the keys from `begin` to `end` give; token i of the block sees those before `begin + seen + i`.
__attribute__((noinline)) void add_gradients(const Row &row, const Gradients &grads, long head, int32_t start, int count, int32_t begin,
                   int32_t end, int32_t seen) {
    const long size = row.size, key_head = row.key_head(head);
    Vector *q = (Vector *)__builtin_alloca_with_align((3 * size + 2 * (KEY_BLOCK + SUMS)) * sizeof(Vector), 512);
    Vector *grad = q + size, *share = grad + size, *change = share + KEY_BLOCK + SUMS;
    float *grad_query = (float *)(change + KEY_BLOCK + SUMS);  // (16, size)
    Vector lse{}, inner{};
    Integers stop;
    bool unread = true;
    for (int lane = 0; lane < LANES; lane++) {
        const long token = start + std::min(lane, count - 1);
        const float *from = row.query(head, token), *given = grads.output(head, token), *out = row.output(head, token);
        for (long d = 0; d < size; d++) {
            q[d][lane] = from[d] * row.scaling;
            grad[d][lane] = given[d];
            inner[lane] += given[d] * out[d];
            unread &= given[d] == 0;
        }
        lse[lane] = row.lse[head * row.tokens + token];
        stop[lane] = begin + seen + lane;
    }
    if (unread) return;
    std::fill(grad_query, grad_query + count * size, 0.0f);
    for (int32_t at = begin; at < std::min(end, begin + seen + count - 1); at += KEY_BLOCK) {
        const int here = std::min(std::min(KEY_BLOCK, end - at), begin + seen + count - 1 - at);
        const float *keys = row.key(key_head, at), *values = row.value(key_head, at);
        Block<1>::multiply(q, keys, here, size, row.key.token, share);
        Block<1>::multiply(grad, values, here, size, row.value.token, change);
        for (int j = 0; j < here; j++) {
            share[j] = Integers{} + (at + j) < stop ? exponential(share[j] - lse) : Vector{};
            change[j] = share[j] * (change[j] - inner) * row.scaling;
        }
        const float *shares = (const float *)share, *changes = (const float *)change;
        add_matrix(shares, LANES, 1, grads.output(head, start), grads.output.token, count, grads.value(key_head, at),
                   grads.value.token, here, size);
        add_matrix(changes, LANES, 1, row.query(head, start), row.query.token, count, grads.key(key_head, at),
                   grads.key.token, here, size);
        add_matrix(changes, 1, LANES, keys, row.key.token, here, grad_query, size, count, size);
    }
    for (int lane = 0; lane < count; lane++) {
        float *to = grads.query(head, start + lane);
        for (long d = 0; d < size; d++) to[d] += grad_query[lane * size + d];
    }
}

}  // namespace

extern "C" {

void flash_forward(float *query, float *key, float *value, float *output, float *lse, const int32_t *spans,
                   const long *strides, float scaling, long segments, long tokens, long heads, long key_heads,
                   long size) {
    const Row row = {{query, strides[0], strides[1]}, {key, strides[2], strides[3]}, {value, strides[4], strides[5]},
                     {output, strides[6], strides[7]}, lse, tokens, heads, key_heads, size, scaling};
    const Segment *all = (const Segment *)spans;
    std::vector<std::pair<long, int32_t>> blocks;
    for (long s = 0; s < segments; s++)
        for (int32_t start = all[s].start; start < all[s].stop; start += LANES) blocks.push_back({s, start});
    const long count = blocks.size();
#pragma omp parallel for schedule(dynamic, 4)
    for (long task = 0; task < heads * count; task++) {
        const auto [segment, start] = blocks[task % count];
        attend(row, all[segment], start, task / count);
    }
}

// Adds to grad_query, grad_key and grad_value. The order of additions does not depend on the number of threads.
void flash_backward(float *query, float *key, float *value, float *output, float *lse, float *grad_output,
                    float *grad_query, float *grad_key, float *grad_value, const int32_t *spans,
                    const int32_t *crossings, const long *strides, float scaling, long segments, long groups,
                    long tokens, long heads, long key_heads, long size) {
    const Row row = {{query, strides[0], strides[1]}, {key, strides[2], strides[3]}, {value, strides[4], strides[5]},
                     {output, strides[6], strides[7]}, lse, tokens, heads, key_heads, size, scaling};
    const Gradients grads = {{grad_output, strides[8], strides[9]}, {grad_query, strides[10], strides[11]},
                             {grad_key, strides[12], strides[13]}, {grad_value, strides[14], strides[15]}};
    const Segment *all = (const Segment *)spans, *crossing = (const Segment *)crossings;
    const long shared = heads / key_heads;
    // Of the tokens of a span, in all heads that share one key head: to their own keys so far, or to their prompt's.
    const auto add = [&](const Segment &span, long key_head, bool own) {
        for (long head = key_head * shared; head < (key_head + 1) * shared; head++)
            for (int32_t start = span.start; start < span.stop; start += LANES) {
                const int32_t begin = own ? span.start : span.prompt_start, end = own ? span.stop : span.prompt_stop;
                const int32_t seen = own ? start - begin + 1 : end - begin;
                add_gradients(row, grads, head, start, std::min(LANES, span.stop - start), begin, end, seen);
            }
    };
#pragma omp parallel
    {
#pragma omp for schedule(dynamic)
        for (long task = 0; task < segments * key_heads; task++) add(all[task / key_heads], task % key_heads, true);
#pragma omp for schedule(dynamic)
        for (long task = 0; task < groups * key_heads; task++) add(crossing[task / key_heads], task % key_heads, false);
    }
}
}
