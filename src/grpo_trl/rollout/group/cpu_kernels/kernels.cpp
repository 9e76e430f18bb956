// A decoding step on a CPU, in float32: the layers of the Llama family, attention for other ones, products, norms.
//
// In products lanes are 16 rows. In attention they are 16 queries, or 8 or 4 with 2 or 4 components of each.

#include <vector>

#include "attention.h"

// ---- What Python passes, with the same fields there ----
struct Norm {
    const float *weight;  // null where there is none
    float eps;
};

struct Linear {
    const float *weight, *bias;  // (outputs, inputs)
    long outputs;
};

struct Weights {
    Norm before_attention, query, key, after_attention, before_mlp, after_mlp;
    Linear qkv, output, gate_up, down;
    long heads;        // of queries
    long whole_norms;  // whether those of queries and keys are over all heads
    long activation;   // 0: SiLU, 1: GELU by tanh
    float residual;    // what is added to the residual stream is multiplied by it
};

// Keys and values of all slots: (slots, columns, K*D + K*D of the values).
struct Memory {
    float *own, *prompts;
    long own_columns, prompt_columns, key_heads, size, value_size;
    float scaling, softcap;  // the latter 0 for none
};

struct Reach {
    const int32_t *rows, *first, *stop;  // (slots, group), -1 where there is none; which keys each row sees
    long slots, group;
};

struct Step {
    Reach own, prompts;
    const int64_t *lines;     // of own memory, to which each row's keys go
    const float *cos, *sin;   // (rows, turned)
    long rows, turned;
};

namespace {

constexpr long WORTH_THREADS = 1 << 14;  // elements
constexpr long PIECE = 256;              // inputs that are summed by themselves, so that long sums round less

// Memory that is kept from call to call, one for each use.
template <int USE>
float *scratch(long floats) {
    static thread_local std::vector<float> memory;
    if ((long)memory.size() < floats + LANES) memory.resize(floats + LANES);
    return (float *)(((uintptr_t)memory.data() + sizeof(Vector) - 1) / sizeof(Vector) * sizeof(Vector));
}

// ---- Attention ----
struct Slots : Reach {
    const float *memory;
    long columns;
};

struct Sizes : Products {
    long key_heads, queries;
};

template <int PLACES>
void attend_block(long slot, long head, long block_at, const float *query, const Slots &slots, const Sizes &sizes,
                  float *output, float *lse) {
    Block<PLACES> block;
    long skipped = block_at * LANES;  // of earlier blocks
    for (long line = 0; line < slots.group * sizes.queries && block.count < Lanes<PLACES>::QUERIES; line++) {
        const long row = slots.rows[slot * slots.group + line / sizes.queries];
        if (row < 0 || skipped-- > 0) continue;
        const long at = (row * sizes.key_heads + head) * sizes.queries + line % sizes.queries;
        block.query[block.count] = query + at * sizes.size;
        block.output[block.count] = output + at * sizes.value_size;
        block.lse[block.count] = lse + at;
        block.seen[0][block.count++] = {slots.first[row], slots.stop[row]};
    }
    if (!block.count) return;
    const long width = sizes.key_heads * (sizes.size + sizes.value_size);
    const float *tokens = slots.memory + slot * slots.columns * width;
    const float *values = tokens + sizes.key_heads * sizes.size + head * sizes.value_size;
    const KeysValues held = {tokens + head * sizes.size, values, width, width};
    block.attend(&held, 1, sizes);
}

long blocks_of(const Slots &slots, const Sizes &sizes) { return (slots.group * sizes.queries + LANES - 1) / LANES; }

void run_task(long task, const float *query, const Slots &slots, const Sizes &sizes, float *output, float *lse) {
    const long blocks = blocks_of(slots, sizes), slot = task / (sizes.key_heads * blocks), block = task % blocks;
    const int32_t *rows = slots.rows + slot * slots.group;
    const long members = std::count_if(rows, rows + slots.group, [](int32_t row) { return row >= 0; });
    const long lines = sizes.queries * members - block * LANES;  // from this block on
    long places = 1;
    while (places < 4 && 2 * places * lines <= LANES && sizes.size % (2 * places) == 0 &&
           sizes.value_size % (2 * places) == 0)
        places *= 2;
    const auto attend = places == 1 ? attend_block<1> : places == 2 ? attend_block<2> : attend_block<4>;
    attend(slot, task / blocks % sizes.key_heads, block, query, slots, sizes, output, lse);
}

// To the keys of prompts and of rows; a row's parts are merged by their log-sum-exps.
void attend_to_all(const float *query, long heads, const Memory &memory, const Step &step, float *output) {
    const Sizes sizes = {{memory.size, memory.value_size, memory.scaling, memory.softcap},
                         memory.key_heads, heads / memory.key_heads};
    const Slots slots[2] = {{step.prompts, memory.prompts, memory.prompt_columns},
                          {step.own, memory.own, memory.own_columns}};
    const long lines = step.rows * heads, size = memory.value_size;
    const long blocks = blocks_of(slots[0], sizes), tasks = step.prompts.slots * memory.key_heads * blocks;
    const long own_tasks = step.own.slots * memory.key_heads * blocks_of(slots[1], sizes);
    float *partial = scratch<0>(2 * lines * (size + 1)), *lse = partial + 2 * lines * size;
    std::fill(lse, lse + 2 * lines, -INFINITY);
#pragma omp parallel
    {
#pragma omp for schedule(dynamic, blocks)  // those of one slot and head read the same keys
        for (long task = 0; task < tasks + own_tasks; task++) {
            const bool own = task >= tasks;
            run_task(own ? task - tasks : task, query, slots[own], sizes, partial + own * lines * size,
                     lse + own * lines);
        }
#pragma omp for
        for (long line = 0; line < lines; line++) {
            const float *a = partial + line * size, *b = a + lines * size;
            float *to = output + line * size;
            if (lse[line] == -INFINITY) {  // nothing was written
                std::copy(b, b + size, to);
                continue;
            }
            const float share = 1 / (1 + std::exp(lse[line] - lse[line + lines]));  // of own keys, which every row has
            for (long d = 0; d < size; d++) to[d] = (1 - share) * a[d] + share * b[d];
        }
    }
}

// ---- Products ----
// Writes the rows from `first` on as lanes; surplus lanes repeat the last row.
void turn(const float *x, long first, long rows, long inputs, Vector *to) {
    for (long lane = 0; lane < LANES; lane++) {
        const float *from = x + std::min(first + lane, rows - 1) * inputs;
        for (long i = 0; i < inputs; i++) to[i][lane] = from[i];
    }
}

// Products of 16 rows with COUNT lines of a weight; prefetches what is `ahead` numbers further on.
template <int COUNT>
inline void multiply_by(const Vector *x, const float *weight, long inputs, long ahead, Vector *sum) {
    for (int u = 0; u < COUNT; u++) sum[u] = Vector{};
    for (long start = 0; start < inputs; start += PIECE) {
        Vector piece[COUNT] = {};
        const long end = std::min(start + PIECE, inputs);
        long i = start;
        for (; i + LANES <= end; i += LANES) {
            for (int u = 0; u < COUNT; u++) __builtin_prefetch(weight + u * inputs + i + ahead);
            for (int k = 0; k < LANES; k++)
                for (int u = 0; u < COUNT; u++) piece[u] += x[i + k] * weight[u * inputs + i + k];
        }
        for (; i < end; i++)
            for (int u = 0; u < COUNT; u++) piece[u] += x[i] * weight[u * inputs + i];
        for (int u = 0; u < COUNT; u++) sum[u] += piece[u];
    }
}

void multiply_rows(const float *x, const Linear &linear, long rows, long inputs, float *output) {
    const long groups = (rows + LANES - 1) / LANES;
    Vector *turned = (Vector *)scratch<1>(groups * inputs * LANES);
#pragma omp parallel
    {
#pragma omp for
        for (long g = 0; g < groups; g++) turn(x, g * LANES, rows, inputs, turned + g * inputs);
#pragma omp for
        for (long o = 0; o < linear.outputs; o += SUMS) {
            const int sums = std::min<long>(SUMS, linear.outputs - o);
            const float *weight = linear.weight + o * inputs;
            for (long g = 0; g < groups; g++) {
                Vector sum[SUMS];
                if (sums == SUMS) multiply_by<SUMS>(turned + g * inputs, weight, inputs, SUMS * inputs, sum);
                else
                    for (int u = 0; u < sums; u++)
                        multiply_by<1>(turned + g * inputs, weight + u * inputs, inputs, inputs, sum + u);
                for (long row = g * LANES; row < std::min(rows, (g + 1) * LANES); row++)
                    for (int u = 0; u < sums; u++)
                        output[row * linear.outputs + o + u] =
                            sum[u][row - g * LANES] + (linear.bias ? linear.bias[o + u] : 0);
            }
        }
    }
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

// hidden + residual * after(change) to `sum`, and what `before` makes of it to `normed`; any of the norms may be missing.
void add_and_norm(const float *hidden, const float *change, const Norm &after, const Norm &before, float residual,
                  float *sum, float *normed, long rows, long size) {
#pragma omp parallel for if (rows * size > WORTH_THREADS)
    for (long at = 0; at < rows * size; at += size) {
        if (change) {
            const float by = after.weight ? residual * scale_of(change + at, size, after.eps) : residual;
            for (long i = 0; i < size; i++)
                sum[at + i] = hidden[at + i] + change[at + i] * by * (after.weight ? after.weight[i] : 1);
        }
        if (!normed) continue;
        const float *x = (change ? sum : hidden) + at;
        const float by = before.weight ? scale_of(x, size, before.eps) : 1;
        for (long i = 0; i < size; i++) normed[at + i] = x[i] * by * (before.weight ? before.weight[i] : 1);
    }
}

// Queries to `query`, keys and values to the memory.
void rotate_and_store(const float *product, const Weights &weights, const Memory &memory, const Step &step,
                      float *query) {
    const long size = memory.size, heads = weights.heads, keys = memory.key_heads, parts = heads + 2 * keys;
#pragma omp parallel for if (step.rows * parts * size > WORTH_THREADS)
    for (long row = 0; row < step.rows; row++)
        for (long part = 0; part < parts; part++) {
            const float *x = product + (row * parts + part) * size;
            float *to = part < heads ? query + (row * heads + part) * size
                                     : memory.own + (step.lines[row] * 2 * keys + part - heads) * size;
            if (part >= heads + keys) {
                std::copy(x, x + size, to);
                continue;
            }
            const bool is_query = part < heads;
            const Norm &norm = is_query ? weights.query : weights.key;
            if (norm.weight) {
                const long first = is_query ? 0 : heads, among = part - first;
                const float *all = product + (row * parts + first) * size;
                const float by = weights.whole_norms ? scale_of(all, (is_query ? heads : keys) * size, norm.eps)
                                                     : scale_of(x, size, norm.eps);
                const float *weight = norm.weight + (weights.whole_norms ? among * size : 0);
                for (long d = 0; d < size; d++) to[d] = x[d] * by * weight[d];
                x = to;
            }
            rotate(x, step.cos + row * step.turned, step.sin + row * step.turned, size, step.turned, to);
        }
}

void gate(const float *gate_up, float *output, long rows, long size, int activation) {
#pragma omp parallel for if (rows * size > WORTH_THREADS)
    for (long row = 0; row < rows; row++) {
        const float *gates = gate_up + row * 2 * size, *up = gates + size;
        float *to = output + row * size;
        long i = 0;
        for (; i + LANES <= size; i += LANES) store(activated(load(gates + i), activation) * load(up + i), to + i);
        for (; i < size; i++) to[i] = activated(Vector{} + gates[i], activation)[0] * up[i];
    }
}

}  // namespace

extern "C" {

void attend(const float *query, const Memory *memory, const Step *step, float *output, long heads) {
    attend_to_all(query, heads, *memory, *step, output);
}

void product(const float *x, const Linear *linear, float *output, long rows, long inputs) {
    multiply_rows(x, *linear, rows, inputs, output);
}

void normalize(const float *x, const Norm *norm, float *output, long rows, long size) {
    add_and_norm(x, nullptr, {}, *norm, 1, nullptr, output, rows, size);
}

// A decoder layer, from `hidden` to `output`, both (rows, size).
void layer(const float *hidden, const Weights *weights, const Memory *memory, const Step *step, float *output,
           long size) {
    const Weights &w = *weights;
    const long rows = step->rows, inner = w.gate_up.outputs / 2, attended = w.heads * memory->value_size;
    float *normed = scratch<2>(rows * (2 * size + w.qkv.outputs + w.heads * memory->size + attended + 3 * inner));
    float *change = normed + rows * size, *qkv = change + rows * size, *query = qkv + rows * w.qkv.outputs;
    float *heads = query + rows * w.heads * memory->size, *gate_up = heads + rows * attended;
    float *gated = gate_up + rows * 2 * inner;

    add_and_norm(hidden, nullptr, {}, w.before_attention, 1, nullptr, normed, rows, size);
    multiply_rows(normed, w.qkv, rows, size, qkv);
    rotate_and_store(qkv, w, *memory, *step, query);
    attend_to_all(query, w.heads, *memory, *step, heads);
    multiply_rows(heads, w.output, rows, attended, change);
    add_and_norm(hidden, change, w.after_attention, w.before_mlp, w.residual, output, normed, rows, size);
    multiply_rows(normed, w.gate_up, rows, size, gate_up);
    gate(gate_up, gated, rows, inner, w.activation);
    multiply_rows(gated, w.down, rows, inner, change);
    add_and_norm(output, change, w.after_mlp, {}, w.residual, output, nullptr, rows, size);
}
}
