// Sampling from logits as `inverse_cdf` describes it: weights are integers, whose sums do not depend on their order.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

#include "vectors.h"

namespace {

typedef int64_t Longs __attribute__((vector_size(8 * LANES)));
typedef int64_t Register __attribute__((vector_size(4 * LANES)));  // as wide as a Vector
typedef int64_t UnalignedRegister __attribute__((vector_size(4 * LANES), aligned(8)));

constexpr int WIDTH = LANES / 2;  // longs of a register
constexpr long BLOCK = 64;        // weights whose sum is compared at once
constexpr long FEW = 64;          // weights that are sorted

int64_t sum_of(const int64_t *from, const int64_t *to) {
    int64_t sum = 0;
    for (; from < to; from++) sum += *from;
    return sum;
}

struct Row {
    const float *logits;
    long vocabulary;
    int bits;
    std::vector<int64_t> &weights;  // of each token
    std::vector<int64_t> &others;   // whatever is sorted
    float largest;

    // Whether there is a largest logit, and it is finite.
    bool weigh() {
        Vector most = Vector{} - INFINITY, unordered{};
        long i = 0;
        for (; i + LANES <= vocabulary; i += LANES) {
            const Vector x = load(logits + i);
            most = x > most ? x : most;
            unordered = x == x ? unordered : Vector{} + 1.0f;
        }
        largest = -INFINITY;
        bool ordered = true;
        for (int lane = 0; lane < LANES; lane++) {
            largest = std::max(largest, most[lane]);
            ordered &= unordered[lane] == 0;
        }
        for (; i < vocabulary; i++) {
            largest = std::max(largest, logits[i]);
            ordered &= logits[i] == logits[i];
        }
        if (!ordered || !std::isfinite(largest)) return false;
        const float one = std::ldexp(1.0f, bits);
        for (i = 0; i + LANES <= vocabulary; i += LANES) weigh(load(logits + i), one, i, LANES);
        if (i < vocabulary) {
            Vector x{};
            for (int lane = 0; lane < LANES; lane++) x[lane] = logits[std::min(i + lane, vocabulary - 1)];
            weigh(x, one, i, vocabulary - i);
        }
        return true;
    }

    void weigh(Vector x, float one, long at, long count) {
        const Longs weighed = __builtin_convertvector(exponential(x - largest) * one, Longs);
        std::memcpy(weights.data() + at, &weighed, sizeof(int64_t) * count);
    }

    int64_t total() const { return sum_of(weights.data(), weights.data() + vocabulary); }

    double logsumexp(int64_t sum) const { return largest + std::log(std::ldexp((double)sum, -bits)); }

    // ---- Narrowing: tokens that are left out weigh nothing ----
    void keep_top_k(long k) {
        std::vector<float> sorted(logits, logits + vocabulary);
        std::nth_element(sorted.begin(), sorted.begin() + k - 1, sorted.end(), std::greater<float>());
        for (long i = 0; i < vocabulary; i++)
            if (logits[i] < sorted[k - 1]) weights[i] = 0;
    }

    void keep(int64_t least) {
        for (long i = 0; i < vocabulary; i++) weights[i] = weights[i] < least ? 0 : weights[i];
    }

    struct Share {
        int64_t sum, count;
    };

    // Of the weights that are at least so large.
    Share at_least(int64_t least) const {
        Register sums{}, counts{};
        long i = 0;
        for (; i + WIDTH <= vocabulary; i += WIDTH) {
            const Register weight = *(const UnalignedRegister *)(weights.data() + i), kept = weight >= least;
            sums += weight & kept;
            counts -= kept;
        }
        Share share = {};
        for (int lane = 0; lane < WIDTH; lane++) share = {share.sum + sums[lane], share.count + counts[lane]};
        for (; i < vocabulary; i++)
            if (weights[i] >= least) share = {share.sum + weights[i], share.count + 1};
        return share;
    }

    // The largest weight so that those of as much or more sum to `mass`, by bisection until few are left to be sorted.
    int64_t least_of(int64_t mass) {
        int64_t low = std::max<int64_t>(1, (total() - mass) / vocabulary);  // all that weigh less sum to total - mass at most
        int64_t high = (int64_t{1} << bits) + 1;
        Share from_low = at_least(low), from_high = {};
        while (from_low.count - from_high.count > FEW && high - low > 1) {
            const int64_t middle = std::clamp((int64_t)std::sqrt((double)low * high), low + 1, high - 1);
            const Share share = at_least(middle);
            if (share.sum >= mass) low = middle, from_low = share;
            else high = middle, from_high = share;
        }
        others.clear();
        for (long i = 0; i < vocabulary; i++)
            if ((uint64_t)(weights[i] - low) < (uint64_t)(high - low)) others.push_back(weights[i]);
        std::sort(others.begin(), others.end(), std::greater<int64_t>());
        for (const int64_t weight : others)
            if ((from_high.sum += weight) >= mass) return weight;
        return 0;
    }

    // The token in whose share of the weight the noise falls.
    long token_at(int64_t target) const {
        const int64_t *from = weights.data(), *end = from + vocabulary;
        for (int64_t sum; end - from > BLOCK && (sum = sum_of(from, from + BLOCK)) <= target; from += BLOCK) target -= sum;
        while (from < end - 1 && *from <= target) target -= *from++;
        return from - weights.data();
    }
};

}  // namespace

extern "C" {

// NaN where no token can be sampled.
void logsumexp(const float *logits, double *lse, long bits, long rows, long vocabulary) {
#pragma omp parallel
    {
        std::vector<int64_t> weights(vocabulary), others;
#pragma omp for
        for (long r = 0; r < rows; r++) {
            Row row = {logits + r * vocabulary, vocabulary, (int)bits, weights, others, 0};
            lse[r] = row.weigh() ? row.logsumexp(row.total()) : NAN;
        }
    }
}

void sample(const float *logits, const double *noise, int64_t *tokens, double *lse, double *narrowed_lse,
            double top_p, double min_p, long top_k, long bits, long rows, long vocabulary) {
#pragma omp parallel
    {
        std::vector<int64_t> weights(vocabulary), others;
#pragma omp for
        for (long r = 0; r < rows; r++) {
            Row row = {logits + r * vocabulary, vocabulary, (int)bits, weights, others, 0};
            tokens[r] = 0;
            lse[r] = narrowed_lse[r] = NAN;
            if (!row.weigh()) continue;
            int64_t total = row.total();
            lse[r] = row.logsumexp(total);
            if (top_k > 0 && top_k < vocabulary) row.keep_top_k(top_k);
            int64_t least = 0;
            if (min_p > 0) least = (int64_t)std::ceil(std::ldexp(min_p, bits));
            if (top_p < 1) least = std::max(least, row.least_of(std::max<int64_t>(1, (int64_t)std::ceil(top_p * row.total()))));
            if (least > 0) row.keep(least);
            if (least > 0 || top_k > 0) total = row.total();
            narrowed_lse[r] = row.logsumexp(total);
            tokens[r] = row.token_at(std::min((int64_t)(noise[r] * total), total - 1));
        }
    }
}
}
