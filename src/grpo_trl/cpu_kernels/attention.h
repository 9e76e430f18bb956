// Softmax attention of 16 lanes of queries at a time, to keys and values that are read as they are stored.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "vectors.h"

constexpr int KEY_BLOCK = 64;  // keys of a block; their products with the queries stay in the cache
constexpr int SUMS = 8;        // partial sums kept in registers
constexpr int AHEAD = 16;      // tokens whose keys and values are prefetched

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

    // Sums the places of each of PLACES vectors; the sum of vector i goes to place i.
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

    // What stands in a place of each query, in all of its places: `__builtin_shuffle(x, repeat(place))`.
    static Integers repeat(int place) {
        Integers lane;
        for (int i = 0; i < LANES; i++) lane[i] = i / PLACES * PLACES + place;
        return lane;
    }
};

// Keys and values of one head; those of a token stand `width` behind those of the one before.
struct KeysValues {
    const float *keys, *values;
    long key_width, value_width;
};

// Which keys a query sees: those from `first` up to, not including, `stop`.
struct Seen {
    int32_t first, stop;
};

struct Products {
    long size, value_size;
    float scaling, softcap;  // the latter 0 for none
};

// Queries that attend to the same keys, as far as each sees them.
template <int PLACES>
struct Block {
    using L = Lanes<PLACES>;
    const float *query[L::QUERIES];
    float *output[L::QUERIES], *lse[L::QUERIES];
    Seen seen[2][L::QUERIES];  // of each part of the keys
    int count = 0;

    __attribute__((noinline)) void attend(const KeysValues *parts, int num_parts, const Products &products) const {
        const long size = products.size / PLACES, value_size = products.value_size / PLACES;
        Vector *q = (Vector *)__builtin_alloca_with_align((size + value_size + KEY_BLOCK + SUMS) * sizeof(Vector), 512);
        Vector *out = q + size, *score = out + value_size;
        for (int lane = 0; lane < LANES; lane++) {
            const float *from = query[std::min(lane / PLACES, count - 1)] + lane % PLACES;
            for (long d = 0; d < size; d++) q[d][lane] = from[d * PLACES] * products.scaling;
        }
        for (long d = 0; d < value_size; d++) out[d] = Vector{};
        Vector largest = Vector{} - 1e30f, sum = Vector{};
        for (int part = 0; part < num_parts; part++)
            attend_to(parts[part], seen[part], q, products, score, out, largest, sum);
        for (int i = 0; i < count; i++) {
            float all = 0;
            for (int place = 0; place < PLACES; place++) all += sum[i * PLACES + place];
            const float share = all == 0 ? 0 : 1 / all;
            for (long d = 0; d < products.value_size; d++)
                output[i][d] = out[d / PLACES][i * PLACES + d % PLACES] * share;
            *lse[i] = all == 0 ? -INFINITY : largest[i * PLACES] + std::log(all);
        }
    }

    void attend_to(const KeysValues &held, const Seen *see, const Vector *q, const Products &products, Vector *score,
                   Vector *out, Vector &largest, Vector &sum) const {
        Integers first, stop;
        int32_t begin = INT32_MAX, all_from = 0, end = 0, all_to = INT32_MAX;
        for (int i = 0; i < count; i++) {
            begin = std::min(begin, see[i].first), all_from = std::max(all_from, see[i].first);
            end = std::max(end, see[i].stop), all_to = std::min(all_to, see[i].stop);
        }
        for (int lane = 0; lane < LANES; lane++) {
            first[lane] = see[std::min(lane / PLACES, count - 1)].first;
            stop[lane] = see[std::min(lane / PLACES, count - 1)].stop;
        }
        for (int32_t start = std::max(begin, 0) / KEY_BLOCK * KEY_BLOCK; start < end; start += KEY_BLOCK) {
            const int here = std::min(KEY_BLOCK, end - start);
            multiply(q, held.keys + start * held.key_width, here, products.size / PLACES, held.key_width, score);
            if (products.softcap > 0) cap(score, here, products.softcap);
            if (start < all_from || start + here > all_to || here % PLACES) hide(score, here, start, first, stop);
            Vector most = largest;
            for (int j = 0; j * PLACES < here; j++) most = score[j] > most ? score[j] : most;
            for (int bit = 1; bit < PLACES; bit *= 2) {
                Integers other;
                for (int i = 0; i < LANES; i++) other[i] = i ^ bit;
                const Vector there = __builtin_shuffle(most, other);
                most = there > most ? there : most;
            }
            const Vector shrink = exponential(largest - most);
            largest = most;
            sum *= shrink;
            for (int j = 0; j * PLACES < here; j++) {
                score[j] = score[j] == Vector{} - INFINITY ? Vector{} : exponential(score[j] - largest);
                sum += score[j];
            }
            const float *values = held.values + start * held.value_width;
            add_values(score, values, here, products.value_size / PLACES, held.value_width, shrink, out);
        }
    }

    // Products with PLACES keys stand in the places of one vector.
    static void multiply(const Vector *q, const float *keys, int count, long size, long width, Vector *score) {
        for (int j = 0; j < count; j += SUMS) {
            const float *key[SUMS];
            for (int u = 0; u < SUMS; u++) key[u] = keys + std::min(j + u, count - 1) * width;
            for (int u = 0; u < SUMS; u++)
                for (long d = 0; d < size * PLACES; d += LANES) __builtin_prefetch(key[u] + AHEAD * width + d);
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
        Integers repeat[PLACES];
        for (int place = 0; place < PLACES; place++) repeat[place] = L::repeat(place);
        for (int j = 0; j < count; j++) {
            __builtin_prefetch(values + (j + AHEAD) * width);
            const Vector weight = PLACES == 1 ? share[j] : __builtin_shuffle(share[j / PLACES], repeat[j % PLACES]);
            for (int u = 0; u < COMPONENTS; u++) sum[u] += weight * L::spread(values + j * width + u * PLACES);
        }
        for (int u = 0; u < COMPONENTS; u++) out[u] = sum[u];
    }
};
