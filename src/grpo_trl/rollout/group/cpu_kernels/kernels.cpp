// Kernels of a decoding step on a CPU, in float32: one call for all that stands between two products.
//
// Vectors have 16 lanes. In attention they stand for as many queries, or for 8 or 4 queries with 2 or 4 components of each,
// so that keys and values are read as they are stored, and once for all queries.

#include <algorithm>
#include <cmath>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "vectors.h"

namespace {

constexpr int KEYS = 64;                // of a block, whose products with the queries stay in the cache
constexpr int SUMS = 8;                 // that are kept in registers
constexpr long WORTH_THREADS = 1 << 14;  // elements

// ---- Attention ----

struct Keys {
    const float *memory;  // (slots, columns, K*D + K*D of the values)
    const int32_t *rows;  // (slots, group); -1 where there is none
    const int32_t *first, *stop;  // of each row
    long slots, group, columns;
};

struct Sizes {
    long key_heads, queries, size, value_size;
    float scaling, softcap;  // the latter 0 for none
    long width() const { return key_heads * (size + value_size); }
};

// Lanes of one query follow each other: lane = query * PLACES + place.
template <int PLACES>
struct Lanes {
    static constexpr int QUERIES = LANES / PLACES;

    // The next PLACES components, the same for each query.
    static Vector spread(const float *from) {
        if constexpr (PLACES == 1) return Vector{} + *from;
        if constexpr (PLACES == 2) {
            double pair;
            std::memcpy(&pair, from, sizeof(pair));
            return (Vector)Pairs{pair, pair, pair, pair, pair, pair, pair, pair};
        }
#ifdef __AVX512F__  // which GCC does not find by itself
        return _mm512_broadcast_f32x4(_mm_loadu_ps(from));
#else
        Vector x;
        for (int i = 0; i < LANES; i++) x[i] = from[i % 4];
        return x;
#endif
    }

    // Of PLACES vectors, the sum over places of the i-th one in place i.
    static Vector fold(const Vector *x) {
        if constexpr (PLACES == 1) return x[0];
        else {
            using Half = Lanes<PLACES / 2>;
            const Vector a = Half::fold(x), b = Half::fold(x + PLACES / 2);
            Integers same, other;
            for (int i = 0; i < LANES; i++) {
                same[i] = i & (PLACES / 2) ? i + LANES : i;
                other[i] = same[i] ^ (PLACES / 2);
            }
            return __builtin_shuffle(a, b, same) + __builtin_shuffle(a, b, other);
        }
    }

    // What stands in a place of each query, in all of its places: `__builtin_shuffle(x, from(place))`.
    static Integers from(int place) {
        Integers lane;
        for (int i = 0; i < LANES; i++) lane[i] = i / PLACES * PLACES + place;
        return lane;
    }
};

// One block of queries, which have their keys in one slot.
template <int PLACES>
struct Block {
    using L = Lanes<PLACES>;
    const float *query[L::QUERIES];
    float *output[L::QUERIES], *lse[L::QUERIES];
    int32_t first[L::QUERIES], stop[L::QUERIES];
    int count = 0;

    __attribute__((noinline)) void attend(const float *keys, const float *values, const Sizes &sizes) const {
        const long size = sizes.size / PLACES, value_size = sizes.value_size / PLACES, width = sizes.width();
        Vector *q = (Vector *)__builtin_alloca_with_align((size + value_size + KEYS + SUMS) * sizeof(Vector), 512);
        Vector *out = q + size, *score = out + value_size;
        Integers firsts, stops;
        for (int lane = 0; lane < LANES; lane++) {
            const int i = std::min(lane / PLACES, count - 1);
            for (long d = 0; d < size; d++) q[d][lane] = query[i][d * PLACES + lane % PLACES] * sizes.scaling;
            firsts[lane] = first[i], stops[lane] = stop[i];
        }
        const int32_t begin = *std::min_element(first, first + count), all_from = *std::max_element(first, first + count);
        const int32_t end = *std::max_element(stop, stop + count), all_to = *std::min_element(stop, stop + count);
        for (long d = 0; d < value_size; d++) out[d] = Vector{};
        Vector largest = Vector{} - 1e30f, sum = Vector{};
        for (int32_t start = std::max(begin, 0) / KEYS * KEYS; start < end; start += KEYS) {
            const int keys_here = std::min(KEYS, end - start);
            const bool all_seen = start >= all_from && start + keys_here <= all_to && keys_here % PLACES == 0;
            multiply(q, keys + start * width, keys_here, size, width, score);
            if (sizes.softcap > 0) cap(score, keys_here, sizes.softcap);
            if (!all_seen) hide(score, keys_here, start, firsts, stops);
            Vector most = largest;
            for (int j = 0; j * PLACES < keys_here; j++) most = score[j] > most ? score[j] : most;
            for (int bit = 1; bit < PLACES; bit *= 2) {
                Integers other;
                for (int i = 0; i < LANES; i++) other[i] = i ^ bit;
                const Vector there = __builtin_shuffle(most, other);
                most = there > most ? there : most;
            }
            const Vector shrink = exponential(largest - most);
            largest = most;
            sum *= shrink;
            for (int j = 0; j * PLACES < keys_here; j++) {
                score[j] = score[j] > Vector{} - 1e30f ? exponential(score[j] - largest) : Vector{};
                sum += score[j];
            }
            add_values(score, values + start * width, keys_here, value_size, width, shrink, out);
        }
        for (int i = 0; i < count; i++) {
            float all = 0;
            for (int place = 0; place < PLACES; place++) all += sum[i * PLACES + place];
            const float share = all > 0 ? 1 / all : 0;
            for (long d = 0; d < sizes.value_size; d++)
                output[i][d] = out[d / PLACES][i * PLACES + d % PLACES] * share;
            *lse[i] = all > 0 ? largest[i * PLACES] + std::log(all) : -INFINITY;
        }
    }

    // Products with PLACES keys stand in the places of one vector.
    static void multiply(const Vector *q, const float *keys, int count, long size, long width, Vector *score) {
        for (int j = 0; j < count; j += SUMS) {
            const float *key[SUMS];
            for (int u = 0; u < SUMS; u++) key[u] = keys + std::min(j + u, count - 1) * width;
            Vector sum[SUMS] = {};
            for (long d = 0; d < size; d++)
                for (int u = 0; u < SUMS; u++) sum[u] += q[d] * L::spread(key[u] + d * PLACES);
            for (int u = 0; u < SUMS; u += PLACES) score[(j + u) / PLACES] = L::fold(sum + u);
        }
    }

    static void cap(Vector *score, int count, float softcap) {
        for (int j = 0; j * PLACES < count; j++)
            score[j] = softcap * (2.0f / (1.0f + exponential(score[j] * (-2.0f / softcap))) - 1.0f);
    }

    static void hide(Vector *score, int count, int32_t start, Integers first, Integers stop) {
        Integers at;
        for (int lane = 0; lane < LANES; lane++) at[lane] = start + lane % PLACES;
        const Integers end = Integers{} + (start + count);
        for (int j = 0; j * PLACES < count; j++, at += PLACES)
            score[j] = (at >= first) & (at < stop) & (at < end) ? score[j] : Vector{} - INFINITY;
    }

    static void add_values(const Vector *share, const float *values, int count, long size, long width, Vector shrink,
                           Vector *out) {
        for (long d = 0; d < size; d += SUMS) {
            const int sums = std::min<long>(SUMS, size - d);
            if (sums == SUMS)
                add_components<SUMS>(share, values + d * PLACES, count, width, shrink, out + d);
            else
                for (int u = 0; u < sums; u++)
                    add_components<1>(share, values + (d + u) * PLACES, count, width, shrink, out + d + u);
        }
    }

    template <int COMPONENTS>
    static void add_components(const Vector *share, const float *values, int count, long width, Vector shrink,
                               Vector *out) {
        Vector sum[COMPONENTS];
        for (int u = 0; u < COMPONENTS; u++) sum[u] = out[u] * shrink;
        Integers from[PLACES];
        for (int place = 0; place < PLACES; place++) from[place] = L::from(place);
        for (int j = 0; j < count; j++) {
            const Vector weight = PLACES == 1 ? share[j] : __builtin_shuffle(share[j / PLACES], from[j % PLACES]);
            for (int u = 0; u < COMPONENTS; u++) sum[u] += weight * L::spread(values + j * width + u * PLACES);
        }
        for (int u = 0; u < COMPONENTS; u++) out[u] = sum[u];
    }
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
        block.first[block.count] = keys.first[row];
        block.stop[block.count++] = keys.stop[row];
    }
    if (!block.count) return;
    const float *tokens = keys.memory + slot * keys.columns * sizes.width();
    block.attend(tokens + head * sizes.size, tokens + sizes.key_heads * sizes.size + head * sizes.value_size, sizes);
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
    const Sizes sizes = {key_heads, queries, size, value_size, scaling, softcap};
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
