// Kernels of a decoding step on a CPU, in float32: one call for all that stands between two products.
//
// The lanes of attention are 16 queries, or 8 or 4 with 2 or 4 components of each.

#include "attention.h"

namespace {

constexpr long WORTH_THREADS = 1 << 14;  // elements

// ---- Attention ----

struct Keys {
    const float *memory;  // (slots, columns, K*D + K*D of the values)
    const int32_t *rows;  // (slots, group); -1 where there is none
    const int32_t *first, *stop;  // of each row
    long slots, group, columns;
};

struct Sizes : Products {
    long key_heads, queries;
};

template <int PLACES>
void attend_block(long slot, long head, long block_at, const float *query, const Keys &keys, const Sizes &sizes,
                  float *output, float *lse) {
    Block<PLACES> block;
    long skipped = block_at * Lanes<PLACES>::QUERIES;  // of earlier blocks
    for (long line = 0; line < keys.group * sizes.queries && block.count < Lanes<PLACES>::QUERIES; line++) {
        const long row = keys.rows[slot * keys.group + line / sizes.queries];
        if (row < 0 || skipped-- > 0) continue;
        const long at = (row * sizes.key_heads + head) * sizes.queries + line % sizes.queries;
        block.query[block.count] = query + at * sizes.size;
        block.output[block.count] = output + at * sizes.value_size;
        block.lse[block.count] = lse + at;
        block.seen[0][block.count++] = {keys.first[row], keys.stop[row]};
    }
    if (!block.count) return;
    const long width = sizes.key_heads * (sizes.size + sizes.value_size);
    const float *tokens = keys.memory + slot * keys.columns * width;
    const float *values = tokens + sizes.key_heads * sizes.size + head * sizes.value_size;
    const Held held = {tokens + head * sizes.size, values, width, width};
    block.attend(&held, 1, sizes);
}

long blocks_of(const Keys &keys, const Sizes &sizes) { return (keys.group * sizes.queries + LANES - 1) / LANES; }

void run_task(long task, const float *query, const Keys &keys, const Sizes &sizes, float *output, float *lse) {
    const long blocks = blocks_of(keys, sizes), slot = task / (sizes.key_heads * blocks);
    const int32_t *rows = keys.rows + slot * keys.group;
    const long lines = sizes.queries * std::count_if(rows, rows + keys.group, [](int32_t row) { return row >= 0; });
    long places = 1;
    while (places < 4 && 2 * places * lines <= LANES && sizes.size % (2 * places) == 0 &&
           sizes.value_size % (2 * places) == 0)
        places *= 2;
    const auto attend = places == 1 ? attend_block<1> : places == 2 ? attend_block<2> : attend_block<4>;
    attend(slot, task / blocks % sizes.key_heads, task % blocks, query, keys, sizes, output, lse);
}

// ---- Between products ----

float scale_of(const float *x, long size, float eps) {
    Vector sums{};
    long i = 0;
    for (; i + LANES <= size; i += LANES) sums += load(x + i) * load(x + i);
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += sums[lane];
    for (; i < size; i++) sum += x[i] * x[i];
    return 1 / std::sqrt(sum / size + eps);
}

inline Vector activated(Vector gate, int activation) {
    const Vector exponent = activation == 0 ? -gate : gate * (-1.5957691216057308f * (1.0f + 0.044715f * gate * gate));
    return gate / (1.0f + exponential(exponent));
}

void rotate(const float *x, const float *cos, const float *sin, long size, long turned, float *to) {
    const long half = turned / 2;
    for (long d = 0; d < half; d++) {
        const float a = x[d], b = x[d + half];  // may be where the result goes to
        to[d] = a * cos[d] + b * sin[d];
        to[d + half] = b * cos[d + half] + a * sin[d + half];
    }
    for (long d = turned; d < size; d++) to[d] = x[d];
}

}  // namespace

extern "C" {

void attend(const float *query, const float *own, const int32_t *own_rows, const int32_t *own_first,
            const int32_t *own_stop, const float *prompts, const int32_t *prompt_rows, const int32_t *prompt_first,
            const int32_t *prompt_stop, float *partial, float *lse, float *output, float scaling, float softcap,
            long rows, long own_slots, long own_group, long own_columns, long prompt_slots, long prompt_group,
            long prompt_columns, long key_heads, long queries, long size, long value_size) {
    const Sizes sizes = {{size, value_size, scaling, softcap}, key_heads, queries};
    const Keys keys[2] = {{prompts, prompt_rows, prompt_first, prompt_stop, prompt_slots, prompt_group, prompt_columns},
                          {own, own_rows, own_first, own_stop, own_slots, own_group, own_columns}};
    const long lines = rows * key_heads * queries;
    const long tasks = prompt_slots * key_heads * blocks_of(keys[0], sizes);
    const long own_tasks = own_slots * key_heads * blocks_of(keys[1], sizes);
    for (long i = 0; i < 2 * lines; i++) lse[i] = -INFINITY;
#pragma omp parallel
    {
#pragma omp for schedule(dynamic)
        for (long task = 0; task < tasks + own_tasks; task++) {
            const bool own_keys = task >= tasks;
            run_task(own_keys ? task - tasks : task, query, keys[own_keys], sizes,
                     partial + own_keys * lines * value_size, lse + own_keys * lines);
        }
#pragma omp for
        for (long line = 0; line < lines; line++) {
            const float share = 1 / (1 + std::exp(lse[line] - lse[line + lines]));  // of own keys
            const float *a = partial + line * value_size, *b = a + lines * value_size;
            for (long d = 0; d < value_size; d++)
                output[line * value_size + d] = (share < 1 ? (1 - share) * a[d] : 0) + (share > 0 ? share * b[d] : 0);
        }
    }
}

void add_and_norm(const float *hidden, const float *change, const float *after, const float *before, float *added,
                  float *normed, float eps_after, float eps_before, float scale, long rows, long size) {
#pragma omp parallel for if (rows * size > WORTH_THREADS)
    for (long row = 0; row < rows; row++) {
        const float *x = hidden + row * size;
        if (change) {
            const float *y = change + row * size;
            float *sum = added + row * size;
            const float by = after ? scale * scale_of(y, size, eps_after) : scale;
            for (long i = 0; i < size; i++) sum[i] = x[i] + y[i] * by * (after ? after[i] : 1);
            x = sum;
        }
        const float by = before ? scale_of(x, size, eps_before) : 1;
        for (long i = 0; i < size; i++) normed[row * size + i] = x[i] * by * (before ? before[i] : 1);
    }
}

void rotate_and_store(const float *product, const float *cos, const float *sin, const float *query_norm,
                      const float *key_norm, float *query, float *memory, const int64_t *lines, float eps, long rows,
                      long heads, long key_heads, long size, long turned) {
    const long parts = heads + 2 * key_heads;
#pragma omp parallel for if (rows * parts * size > WORTH_THREADS)
    for (long row = 0; row < rows; row++)
        for (long part = 0; part < parts; part++) {
            const float *x = product + (row * parts + part) * size;
            float *to = part < heads ? query + (row * heads + part) * size
                                     : memory + (lines[row] * 2 * key_heads + part - heads) * size;
            if (part >= heads + key_heads) {
                std::copy(x, x + size, to);
                continue;
            }
            if (query_norm) {
                const float *weight = part < heads ? query_norm : key_norm;
                const float by = scale_of(x, size, eps);
                for (long d = 0; d < size; d++) to[d] = x[d] * by * weight[d];
                x = to;
            }
            rotate(x, cos + row * turned, sin + row * turned, size, turned, to);
        }
}

void gate(const float *gate_up, float *output, long rows, long size, long activation) {
#pragma omp parallel for if (rows * size > WORTH_THREADS)
    for (long row = 0; row < rows; row++) {
        const float *gates = gate_up + row * 2 * size, *up = gates + size;
        float *to = output + row * size;
        long i = 0;
        for (; i + LANES <= size; i += LANES) store(activated(load(gates + i), activation) * load(up + i), to + i);
        for (; i < size; i++) to[i] = activated(Vector{} + gates[i], activation)[0] * up[i];
    }
}
}
