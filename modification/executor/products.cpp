// Products of many rows with a bfloat16 matrix on a CPU that multiplies float32 alone: a prompt's.
//
// oneDNN would have the matrix in float32 first, and then rearrange all of it for every product, however few its rows.
// Here the rows are rearranged, and a few outputs' weights at a time widened, which serve all rows from a near cache.
// Each sum is taken input by input: a row's result depends on no other row, nor on the number of threads, bit for bit.

#include <algorithm>

#include <omp.h>

#include "vectors.h"

namespace {

constexpr int TALL = 2 * LANES;  // rows of a tile, two vectors: with
constexpr int WIDE = 6;          // as many outputs its sums fill twelve registers
constexpr int64_t DEEP = 768;    // inputs, at most, at a time: a tile's weights stay in a near cache

using Sums = float[WIDE][TALL];

// Where a product's rows, sums and weights under way are.
struct Plan {
    int64_t rows, inputs, outputs, panels, groups, deep;
    bool whole;  // all inputs are gone through at a time
    int threads;

    Plan(int64_t rows, int64_t inputs, int64_t outputs, int threads)
        : rows(rows), inputs(inputs), outputs(outputs), panels((rows + TALL - 1) / TALL),
          groups((outputs + WIDE - 1) / WIDE), threads(threads) {
        const int64_t parts = std::max<int64_t>(1, (inputs + DEEP - 1) / DEEP);
        deep = ((inputs + parts - 1) / parts + LANES - 1) / LANES * LANES;
        whole = deep >= inputs;
    }
    int64_t held() const { return whole ? threads : groups; }  // groups of outputs whose sums are kept
    int64_t panel_floats() const { return panels * TALL * inputs; }
    int64_t sum_floats() const { return held() * panels * WIDE * TALL; }
    int64_t floats() const { return panel_floats() + sum_floats() + threads * WIDE * deep; }
};

// TALL rows of x from `first` on (beyond the last: it again), inputs `from` to `to`, one input of all after another.
void rearrange(const bf16* x, const Plan& plan, int64_t first, int64_t from, int64_t to, float* panel) {
    for (int64_t i = from; i < to; i += LANES) {
        float block[LANES][TALL];
        const int64_t count = std::min<int64_t>(LANES, to - i);
        for (int r = 0; r < TALL; ++r) {
            const bf16* row = x + std::min(first + r, plan.rows - 1) * plan.inputs + i;
            for (int64_t j = 0; j < count; ++j) block[j][r] = read(row + j);
        }
        std::memcpy(panel + (i - from) * TALL, block, count * sizeof block[0]);
    }
}

// WIDE outputs' weights for inputs `from` to `to`, in float32.
void widen(const bf16* w, const Plan& plan, int64_t first, int64_t from, int64_t to, float* out) {
    for (int o = 0; o < WIDE; ++o, out += to - from) {
        const bf16* row = w + std::min(first + o, plan.outputs - 1) * plan.inputs + from;
        int64_t i = 0;
        for (; i + LANES <= to - from; i += LANES) {
            __builtin_prefetch(row + WIDE * plan.inputs + i);  // the next group's: it is here by then
            store(out + i, load(row + i));
        }
        for (; i < to - from; ++i) out[i] = read(row + i);
    }
}

// Products of a panel's first HALVES * LANES rows with WIDE outputs' weights over so many inputs, added to sums that have
// a beginning.
template <int HALVES>
void tile(const float* panel, const float* w, int64_t inputs, Sums& sums, bool begun) {
    vec s[WIDE][HALVES];
    const float* row[WIDE];
    UNROLL for (int o = 0; o < WIDE; ++o) {
        row[o] = w + o * inputs;
        UNROLL for (int h = 0; h < HALVES; ++h) s[o][h] = begun ? load(sums[o] + h * LANES) : vec{};
    }
    for (int64_t i = 0; i < inputs; ++i) {
        vec x[HALVES];
        UNROLL for (int h = 0; h < HALVES; ++h) x[h] = load(panel + i * TALL + h * LANES);
        UNROLL for (int o = 0; o < WIDE; ++o) {
            const vec weight = all(row[o][i]);
            UNROLL for (int h = 0; h < HALVES; ++h) s[o][h] += x[h] * weight;
        }
    }
    UNROLL for (int o = 0; o < WIDE; ++o)
        UNROLL for (int h = 0; h < HALVES; ++h) store(sums[o] + h * LANES, s[o][h]);
}

// A group's sums of all panels, with the bias, as rows of y.
void hand_out(const Plan& plan, const Sums* sums, const bf16* bias, int64_t first, bf16* y) {
    const int64_t outputs = std::min<int64_t>(WIDE, plan.outputs - first);
    for (int64_t at = 0; at < plan.panels; ++at, y += TALL * plan.outputs)
        for (int64_t r = 0, rows = std::min<int64_t>(TALL, plan.rows - at * TALL); r < rows; ++r)
            for (int64_t o = 0; o < outputs; ++o)
                write(y + r * plan.outputs + first + o, sums[at][o][r] + (bias ? read(bias + first + o) : 0.0f));
}

void multiply(const Plan& plan, const bf16* x, const bf16* w, const bf16* bias, bf16* y, float* room) {
    float* const panels = room;
    Sums* const sums = (Sums*)(panels + plan.panel_floats());
    float* const weights = (float*)sums + plan.sum_floats();
    #pragma omp parallel num_threads(plan.threads)
    {
        const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        #pragma omp for
        for (int64_t at = 0; at < plan.panels; ++at)
            for (int64_t from = 0; from < plan.inputs; from += plan.deep) {
                const int64_t to = std::min(from + plan.deep, plan.inputs);
                rearrange(x, plan, at * TALL, from, to, panels + (from * plan.panels + at * (to - from)) * TALL);
            }
        float* const wide = weights + thread * WIDE * plan.deep;
        const Span mine = share(plan.groups, thread, threads);
        for (int64_t from = 0; from < plan.inputs; from += plan.deep) {
            const int64_t to = std::min(from + plan.deep, plan.inputs), inputs = to - from;
            for (int64_t group = mine.from; group < mine.to; ++group) {
                Sums* const own = sums + (plan.whole ? thread : group) * plan.panels;
                widen(w, plan, group * WIDE, from, to, wide);
                for (int64_t at = 0; at < plan.panels; ++at) {
                    const float* panel = panels + (from * plan.panels + at * inputs) * TALL;
                    const bool half = plan.rows - at * TALL <= LANES;
                    (half ? tile<1> : tile<2>)(panel, wide, inputs, own[at], from > 0);
                }
                if (to == plan.inputs) hand_out(plan, own, bias, group * WIDE, y);
            }
        }
    }
}

}  // namespace

// Floats of `room` that a product of such sizes needs.
extern "C" int64_t mod_product_room(int64_t rows, int64_t inputs, int64_t outputs, int32_t threads) {
    return Plan(rows, inputs, outputs, threads).floats();
}

// y [rows, outputs] = x [rows, inputs] times the transposed w [outputs, inputs], plus the bias if there is one.
extern "C" void mod_product(const bf16* x, const bf16* w, const bf16* bias, bf16* y, float* room, int64_t rows,
                            int64_t inputs, int64_t outputs, int32_t threads) {
    multiply(Plan(rows, inputs, outputs, threads), x, w, bias, y, room);
}
