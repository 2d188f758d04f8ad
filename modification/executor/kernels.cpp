// Decoding on a CPU: one token of each of R rows through a Llama-shaped model, a parallel region a layer.
//
// A decode step is bound by memory, so each kernel streams its weights, keys and values once and keeps
// everything else in registers and first-level cache. Weights are read where torch holds them: nothing is
// repacked or copied. Activations are float32 whatever the weights are.
//
// What a row gets does not depend on who shares its batch, nor on the number of threads, bit for bit: every sum is
// taken in an order that the row alone decides.
//
// Compiled at first use by native.py, which mirrors the structs.

#include <algorithm>
#include <cmath>
#include <new>
#include <vector>

#include <omp.h>

#include "vectors.h"

namespace {

#if defined(__AVX512F__)
constexpr int outputs(int rows) { return rows == 1 ? 1 : 2; }  // that go together: as many sums as registers hold
#else
constexpr int outputs(int rows) { return rows <= 2 ? 4 : rows <= 5 ? 2 : 1; }
#endif
constexpr int OUTPUTS = 4;   // that go together at most
constexpr int ROWS = 8;      // rows that share one pass over a matrix
constexpr int STEPS = 2;     // independent sums of a product: one would leave the units waiting where rows are few
constexpr int KEYS = 128;    // keys per softmax block: a block of scores and keys stays in cache
constexpr double OPEN = 40.0, THIN = 1e-9;  // as in routing.py
constexpr int STRETCH = 256; // keys, at most, that one thread attends to at a time

// What is left of a product beyond the last full vector. Never inlined: each place would sum in an order of its own.
template <class T>
__attribute__((noinline)) float rest(const T* w, const float* x, int64_t from, int64_t to) {
    float y = 0;
    for (int64_t j = from; j < to; ++j) y += read(w + j) * x[j];
    return y;
}

// y[m][r] = w[m] . x[r] for M rows of a matrix and N rows of x at once: each vector that is loaded is used often.
template <int N, int M, class T>
inline void dots(const T* w, const float* const* x, int64_t width, float (*y)[ROWS]) {
    vec sums[STEPS][M][N]{};
    int64_t i = 0;
    for (; i + STEPS * LANES <= width; i += STEPS * LANES)
        UNROLL for (int s = 0; s < STEPS; ++s) {
            vec weight[M];
            UNROLL for (int m = 0; m < M; ++m) {
                const T* at = w + m * width + i + s * LANES;
                if (M > 1) __builtin_prefetch(at + M * width);  // more streams than the hardware foresees
                weight[m] = load(at);
            }
            UNROLL for (int r = 0; r < N; ++r) {
                const vec in = load(x[r] + i + s * LANES);
                UNROLL for (int m = 0; m < M; ++m) sums[s][m][r] += weight[m] * in;
            }
        }
    UNROLL for (int m = 0; m < M; ++m)
        UNROLL for (int r = 0; r < N; ++r) {
            vec all{};
            UNROLL for (int s = 0; s < STEPS; ++s) all += sums[s][m][r];
            y[m][r] = sum(all);
            if (i < width) y[m][r] += rest(w + m * width, x[r], i, width);
        }
}

// out(r, o, w[o] . x[r] + bias[o]) for outputs o in a span and N rows from `first` on.
template <int N, class T, class Out>
void block(const T* w, const T* bias, const float* x, int64_t first, int64_t width, Span span, Out out) {
    constexpr int M = outputs(N);
    const float* at[N];
    for (int r = 0; r < N; ++r) at[r] = x + (first + r) * width;
    float y[OUTPUTS][ROWS];
    int64_t o = span.from;
    auto give = [&](int count) {
        for (int m = 0; m < count; ++m)
            for (int r = 0; r < N; ++r) out(first + r, o + m, y[m][r] + (bias ? read(bias + o + m) : 0.0f));
    };
    for (; o + M <= span.to; o += M) { dots<N, M>(w + o * width, at, width, y); give(M); }
    for (; o < span.to; ++o) { dots<N, 1>(w + o * width, at, width, y); give(1); }
}

// The same for all R rows.
template <class T, class Out>
void multiply(const T* w, const T* bias, const float* x, int64_t rows, int64_t width, Span span, Out out) {
    for (int64_t first = 0; first < rows; first += ROWS)
        switch (std::min<int64_t>(ROWS, rows - first)) {
            case 1: block<1>(w, bias, x, first, width, span, out); break;
            case 2: block<2>(w, bias, x, first, width, span, out); break;
            case 3: block<3>(w, bias, x, first, width, span, out); break;
            case 4: block<4>(w, bias, x, first, width, span, out); break;
            case 5: block<5>(w, bias, x, first, width, span, out); break;
            case 6: block<6>(w, bias, x, first, width, span, out); break;
            case 7: block<7>(w, bias, x, first, width, span, out); break;
            default: block<8>(w, bias, x, first, width, span, out);
        }
}

inline float inverse_rms(const float* x, int64_t width, float epsilon) {
    float square = 0;
    for (int64_t i = 0; i < width; ++i) square += x[i] * x[i];
    return 1.0f / std::sqrt(square / (float)width + epsilon);
}

template <class T>
void normalise(const float* x, const T* weight, int64_t width, float epsilon, float* out) {
    const float scale = inverse_rms(x, width, epsilon);
    for (int64_t i = 0; i < width; ++i) out[i] = x[i] * scale * read(weight + i);
}

// RoPE on one head (rotate-half form), after an optional per-head norm; in place.
template <class T>
void rotate(float* head, const T* norm, int64_t width, float epsilon, const float* cosines, const float* sines) {
    if (norm) normalise(head, norm, width, epsilon, head);
    for (int64_t i = 0, half = width / 2; i < half; ++i) {
        const float a = head[i], b = head[i + half];
        head[i] = a * cosines[i] - b * sines[i];
        head[i + half] = b * cosines[i] + a * sines[i];
    }
}

}  // namespace

extern "C" {

struct Layer {  // null where the layer has no such part
    const void *norm, *q, *k, *v, *o, *q_bias, *k_bias, *v_bias, *o_bias, *q_norm, *k_norm, *mlp_norm, *gate, *up, *down;
    int64_t window;  // sliding-window length, or 0
    int64_t routed;  // whether it is a MoD layer
};

struct Shape {  // and all else that stays as it is from step to step
    int64_t width, heads, kv_heads, head, inner, routers, depth, vocabulary, points, anchors;
    float epsilon, router_epsilon, scale, turn_scale;
    int64_t kind;                     // of weights, keys and values: 1 float32, 2 bfloat16
    const Layer* const* layers;       // [depth]
    const double* dial;               // [points], or null
    const float *weights, *biases;    // of the routers
    const float* turns;               // RoPE's frequencies, [head / 2]
    const void *embedding, *norm, *vocabulary_weight;
};

struct Place {  // what a row of the cache holds in one layer (storage.Buffer): live entries are start..end
    void *keys, *values;      // [kv_heads, capacity, head]
    int32_t* columns;         // [capacity], or null
    int64_t capacity, start, end, kind;
};

}  // extern "C"

namespace {

struct Row : Place {  // one row of the batch at one layer; its new entry goes to end
    int64_t index;            // the row's place in x
    int64_t column;           // the token's place in its sequence
    int64_t window;
};

// Online softmax over a stretch of keys: running maximum, sum and weighted values of one query head.
struct Partial { float top, total; };

template <class T>
void attend(const T* keys, const T* values, int64_t count, const float* q, int64_t width, float scale,
            Partial& partial, float* out) {
    alignas(64) float s[KEYS];
    for (int64_t j = 0; j < count; ++j) {
        const T* key = keys + j * width;
        vec a{};
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES) a += load(q + i) * load(key + i);
        float y = sum(a);
        for (; i < width; ++i) y += q[i] * read(key + i);
        s[j] = y * scale;
    }
    float top = partial.top;
    for (int64_t j = 0; j < count; ++j) top = std::max(top, s[j]);
    for (int64_t j = count; j < KEYS; ++j) s[j] = -1e30f;
    vec total{};
    for (int64_t j = 0; j < count; j += LANES) {
        vec e = exponential(load(s + j) - top);
        store(s + j, e);
        for (int64_t l = count - j; l < LANES; ++l) e[l] = 0;
        total += e;
    }
    const float fade = partial.total > 0 ? std::exp(partial.top - top) : 0.0f;
    partial.total = partial.total * fade + sum(total);
    partial.top = top;
    int64_t i = 0;
    for (; i + 4 * LANES <= width; i += 4 * LANES) {  // four vectors of the output at a time, in registers
        vec o0 = load(out + i) * fade, o1 = load(out + i + LANES) * fade;
        vec o2 = load(out + i + 2 * LANES) * fade, o3 = load(out + i + 3 * LANES) * fade;
        for (int64_t j = 0; j < count; ++j) {
            const T* value = values + j * width + i;
            o0 += s[j] * load(value); o1 += s[j] * load(value + LANES);
            o2 += s[j] * load(value + 2 * LANES); o3 += s[j] * load(value + 3 * LANES);
        }
        store(out + i, o0); store(out + i + LANES, o1); store(out + i + 2 * LANES, o2); store(out + i + 3 * LANES, o3);
    }
    for (; i < width; ++i) {
        float o = out[i] * fade;
        for (int64_t j = 0; j < count; ++j) o += s[j] * read(values + j * width + i);
        out[i] = o;
    }
}

// The first entry that the row's new token may see.
inline int64_t first_visible(const Row& row) {
    if (!row.window) return row.start;
    if (!row.columns) return std::max(row.start, row.end - row.window + 1);
    return std::upper_bound(row.columns + row.start, row.columns + row.end, (int32_t)(row.column - row.window)) - row.columns;
}

// Keys `from` to `to` of one head of one row, counted from the row's first: what one thread does at a time.
struct Stretch {
    int64_t row, head, from, to;
    int64_t part;    // its place in the list
    int64_t middle;  // keys of all stretches up to its middle
    bool whole;      // the head has no other
};

// All stretches of a batch, those of a head one after another and of equal length; how many keys they have.
inline int64_t list_stretches(const std::vector<Row>& rows, int64_t heads, std::vector<Stretch>& out) {
    int64_t before = 0;
    out.clear();
    for (size_t r = 0; r < rows.size(); ++r) {
        const int64_t keys = rows[r].end + 1 - rows[r].start, count = (keys + STRETCH - 1) / STRETCH;
        for (int64_t h = 0; h < heads; ++h, before += keys)
            for (int64_t c = 0; c < count; ++c) {
                const int64_t from = keys * c / count, to = keys * (c + 1) / count;
                out.push_back({(int64_t)r, h, from, to, (int64_t)out.size(), before + (from + to) / 2, count == 1});
            }
    }
    return before;
}

// All that one layer's threads share.
template <class T>
struct Pass {
    const Layer& layer;
    const Shape& shape;
    const Row* rows;
    int64_t count;
    float* x;
    const float *cosines, *sines;
    mutable int threads;  // as many as the system gave, at most those that scratch was made for
    float *normed, *q, *k, *v, *mixed, *inner;  // scratch
    float* parts;                               // [stretches, heads per group, head] of heads that have several
    float* queries;                             // [threads, heads per group, head]
    Partial* partials;                          // [stretches, heads per group]
    const std::vector<Stretch>& stretches;
    int64_t keys;                               // of all stretches

    const T* weight(const void* p) const { return (const T*)p; }
    float* at(int64_t r) const { return x + rows[r].index * shape.width; }

    float* norm(const void* w, int thread) const {
        float* out = normed + thread * count * shape.width;
        for (int64_t r = 0; r < count; ++r) normalise(at(r), weight(w), shape.width, shape.epsilon, out + r * shape.width);
        return out;
    }

    void project(int thread) const {
        const float* in = norm(layer.norm, thread);
        const int64_t nq = shape.heads * shape.head, nk = shape.kv_heads * shape.head;
        const Span mine = share(nq + 2 * nk, thread, threads);
        auto part = [&](const void* w, const void* b, int64_t first, int64_t size, float* out) {
            const Span span{std::max<int64_t>(mine.from - first, 0), std::min(mine.to - first, size)};
            if (span.from < span.to)
                multiply(weight(w), weight(b), in, count, shape.width, span,
                         [&](int64_t r, int64_t o, float y) { out[r * size + o] = y; });
        };
        part(layer.q, layer.q_bias, 0, nq, q);
        part(layer.k, layer.k_bias, nq, nk, k);
        part(layer.v, layer.v_bias, nq + nk, nk, v);
    }

    void append(const Row& row, int64_t r, int64_t h) const {
        float* key = k + (r * shape.kv_heads + h) * shape.head;
        const float* value = v + (r * shape.kv_heads + h) * shape.head;
        const int64_t half = shape.head / 2;
        rotate(key, weight(layer.k_norm), shape.head, shape.epsilon, cosines + row.index * half, sines + row.index * half);
        T* to = (T*)row.keys + (h * row.capacity + row.end) * shape.head;
        for (int64_t i = 0; i < shape.head; ++i) write(to + i, key[i]);
        to = (T*)row.values + (h * row.capacity + row.end) * shape.head;
        for (int64_t i = 0; i < shape.head; ++i) write(to + i, value[i]);
        if (row.columns && h == 0) row.columns[row.end] = (int32_t)row.column;
    }

    // The keys of one head of one row, or a stretch of them.
    void attend_stretch(const Stretch& one, int thread) const {
        const int64_t group = shape.heads / shape.kv_heads, half = shape.head / 2, r = one.row, h = one.head;
        const Row& row = rows[r];
        if (one.to == row.end + 1 - row.start) append(row, r, h);
        float* query = queries + thread * group * shape.head;
        std::copy_n(q + (r * shape.heads + h * group) * shape.head, group * shape.head, query);
        Partial* partial = partials + one.part * group;
        float* out = one.whole ? mixed + (r * shape.heads + h * group) * shape.head : parts + one.part * group * shape.head;
        for (int64_t g = 0; g < group; ++g) {
            rotate(query + g * shape.head, weight(layer.q_norm), shape.head, shape.epsilon,
                   cosines + row.index * half, sines + row.index * half);
            partial[g] = {-1e30f, 0};
        }
        std::fill(out, out + group * shape.head, 0.0f);
        const T* ks = (const T*)row.keys + (h * row.capacity + row.start) * shape.head;
        const T* vs = (const T*)row.values + (h * row.capacity + row.start) * shape.head;
        for (int64_t j = one.from; j < one.to; j += KEYS)
            for (int64_t g = 0; g < group; ++g)
                attend(ks + j * shape.head, vs + j * shape.head, std::min<int64_t>(KEYS, one.to - j),
                       query + g * shape.head, shape.head, shape.scale, partial[g], out + g * shape.head);
        if (one.whole)
            for (int64_t g = 0; g < group; ++g)
                for (int64_t i = 0; i < shape.head; ++i) out[g * shape.head + i] /= partial[g].total;
    }

    void attention(int thread) const {
        for (const Stretch& one : stretches)
            if (one.middle * threads / keys == thread) attend_stretch(one, thread);
    }

    // Join the stretches of heads that have several, in order.
    void merge() const {
        const int64_t group = shape.heads / shape.kv_heads;
        for (size_t first = 0, after = 0; first < stretches.size(); first = after) {
            const Stretch& one = stretches[first];
            for (after = first + 1; after < stretches.size() && stretches[after].from > 0;) ++after;
            if (one.whole) continue;
            for (int64_t g = 0; g < group; ++g) {
                float top = -1e30f, total = 0;
                for (size_t at = first; at < after; ++at) top = std::max(top, partials[at * group + g].top);
                float* out = mixed + (one.row * shape.heads + one.head * group + g) * shape.head;
                std::fill(out, out + shape.head, 0.0f);
                for (size_t at = first; at < after; ++at) {
                    const float weight = std::exp(partials[at * group + g].top - top);
                    total += weight * partials[at * group + g].total;
                    for (int64_t i = 0; i < shape.head; ++i) out[i] += weight * parts[(at * group + g) * shape.head + i];
                }
                for (int64_t i = 0; i < shape.head; ++i) out[i] /= total;
            }
        }
    }

    void add(const void* w, const void* bias, const float* in, int64_t width, int thread) const {
        multiply(weight(w), weight(bias), in, count, width, share(shape.width, thread, threads),
                 [&](int64_t r, int64_t o, float y) { at(r)[o] += y; });
    }

    void expand(int thread) const {  // silu(gate x) * (up x)
        const float* in = norm(layer.mlp_norm, thread);
        const Span span = share(shape.inner, thread, threads);
        multiply(weight(layer.gate), (const T*)nullptr, in, count, shape.width, span,
                 [&](int64_t r, int64_t o, float y) { inner[r * shape.inner + o] = y; });
        multiply(weight(layer.up), (const T*)nullptr, in, count, shape.width, span, [&](int64_t r, int64_t o, float y) {
            const float g = inner[r * shape.inner + o];
            inner[r * shape.inner + o] = y * g / (1.0f + std::exp(-g));
        });
    }
};

// Logits of every router for rows of x: what the rows would score at each MoD layer if nothing ran before it.
void score(const Shape& shape, const float* x, float* logits, int64_t r, Span span) {
    const float* row = x + r * shape.width;
    const float scale = inverse_rms(row, shape.width, shape.router_epsilon);
    for (int64_t m = span.from; m < span.to; ++m) {
        float y[1][ROWS];
        dots<1, 1>(shape.weights + m * shape.width, &row, shape.width, y);
        logits[r * shape.routers + m] = y[0][0] * scale + shape.biases[m];
    }
}

// A router's logit as a score: its sigmoid, bent by the dial (routing.bend); NaN opens the gate, as in the router.
float gate(float logit, const Shape& shape) {
    const double* dial = shape.dial;
    const int64_t points = shape.points;
    const double raw = (float)(1.0 / (1.0 + std::exp(-std::max(std::isnan(logit) ? OPEN : (double)logit, -700.0))));
    if (!points) return (float)raw;
    const int64_t at = std::upper_bound(dial, dial + points, raw) - dial;
    const double low = at ? dial[at - 1] : 0.0, high = at < points ? dial[at] : 1.0;
    const double along = std::min(1.0, std::max(0.0, (raw - low) / std::max(high - low, THIN)));
    return (float)(((double)at + along) / (double)(points + 1));
}

template <class T>
void run(const Layer& layer, const Shape& shape, const std::vector<Row>& rows, float* x, const float* cosines,
         const float* sines, float* logits, int threads) {
    static thread_local std::vector<float> scratch;
    static thread_local std::vector<Partial> partials;
    static thread_local std::vector<Stretch> stretches;
    static thread_local std::vector<Row> visible;
    const int64_t count = (int64_t)rows.size();
    visible = rows;
    for (Row& row : visible) row.start = first_visible(row);
    const int64_t keys = list_stretches(visible, shape.kv_heads, stretches), parts = (int64_t)stretches.size();
    const int64_t nq = shape.heads * shape.head, nk = shape.kv_heads * shape.head;
    const int64_t group = shape.heads / shape.kv_heads;
    const int64_t sizes[] = {threads * count * shape.width, count * nq, count * nk, count * nk, count * nq,
                             count * shape.inner, parts * group * shape.head, threads * group * shape.head};
    int64_t total = 0;
    for (int64_t size : sizes) total += size;
    if ((int64_t)scratch.size() < total) scratch.resize(total);
    if ((int64_t)partials.size() < parts * group) partials.resize(parts * group);
    float* at[8];
    float* next = scratch.data();
    for (int i = 0; i < 8; ++i) { at[i] = next; next += sizes[i]; }
    const Row* const shown = visible.data();  // this thread's, for all
    const Pass<T> pass{layer, shape, shown, count, x, cosines, sines, threads,
                       at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[7], partials.data(), stretches, keys};

    #pragma omp parallel num_threads(threads)
    {
        const int t = omp_get_thread_num();
        #pragma omp single
        pass.threads = omp_get_num_threads();
        pass.project(t);
        #pragma omp barrier
        pass.attention(t);
        #pragma omp barrier
        #pragma omp single
        pass.merge();
        pass.add(layer.o, layer.o_bias, pass.mixed, nq, t);
        #pragma omp barrier
        pass.expand(t);
        #pragma omp barrier
        pass.add(layer.down, nullptr, pass.inner, shape.inner, t);
        #pragma omp barrier
        for (int64_t r = 0; r < count; ++r)
            score(shape, x, logits, shown[r].index, share(shape.routers, t, pass.threads));
    }
}

// Final norm and vocabulary projection: x [count, width] -> out [count, vocabulary].
template <class T>
void project_head(const Shape& shape, const float* x, int64_t count, float* out, int threads) {
    static thread_local std::vector<float> normed;
    normed.resize(count * shape.width);
    float* in = normed.data();
    for (int64_t r = 0; r < count; ++r)
        normalise(x + r * shape.width, (const T*)shape.norm, shape.width, shape.epsilon, in + r * shape.width);
    #pragma omp parallel num_threads(threads)
    multiply((const T*)shape.vocabulary_weight, (const T*)nullptr, in, count, shape.width,
             share(shape.vocabulary, omp_get_thread_num(), omp_get_num_threads()),
             [&](int64_t r, int64_t o, float y) { out[r * shape.vocabulary + o] = y; });
}

// The first of the largest of n logits, and its log-probability; that is NaN where a logit is none, or infinite.
float likeliest(const float* logits, int64_t n, int64_t* best) {
    float top = -INFINITY;
    bool broken = false;
    for (int64_t i = 0; i < n; ++i) {
        broken |= std::isnan(logits[i]);
        top = std::max(top, logits[i]);
    }
    *best = 0;
    if (broken || std::isinf(top)) return NAN;
    while (logits[*best] != top) ++*best;
    vec totals{};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) totals += exponential(load(logits + i) - top);
    float total = sum(totals);
    for (; i < n; ++i) total += std::exp(logits[i] - top);
    return -std::log(total);
}

struct Step {  // one token of each of `count` rows
    int64_t count;
    const int64_t *tokens, *columns;  // [count]
    Place* const* places;             // [count, depth]
    const float* thresholds;          // [routers, count]
    float* logits;                    // out: [count, vocabulary]
    float* gates;                     // out: [routers, count]
    uint8_t* runs;                    // out: [routers, count]
    int64_t *best, *written;          // out, [count]: the likeliest token, and entries that were stored
    float* logprobs;                  // out, [count]: the likeliest token's log-probability
};

// What a step works on: the rows' hidden states, RoPE at their columns, and what each router says of them.
struct Scratch {
    std::vector<float> x, cosines, sines, logits;

    template <class T>
    void begin(const Shape& shape, const Step& step) {
        const int64_t half = shape.head / 2;
        x.resize(step.count * shape.width);
        cosines.resize(step.count * half);
        sines.resize(step.count * half);
        logits.resize(step.count * shape.routers);
        for (int64_t r = 0; r < step.count; ++r) {
            const T* from = (const T*)shape.embedding + step.tokens[r] * shape.width;
            for (int64_t i = 0; i < shape.width; ++i) x[r * shape.width + i] = read(from + i);
            for (int64_t i = 0; i < half; ++i) {
                const float angle = (float)step.columns[r] * shape.turns[i];
                cosines[r * half + i] = std::cos(angle) * shape.turn_scale;
                sines[r * half + i] = std::sin(angle) * shape.turn_scale;
            }
            score(shape, x.data(), logits.data(), r, {0, shape.routers});
        }
    }
};

// Whether every row has room for an entry of the right type in every layer.
bool prepared(const Shape& shape, const Step& step) {
    for (int64_t at = 0; at < step.count * shape.depth; ++at) {
        const Place& place = *step.places[at];
        if (place.end >= place.capacity || place.kind != shape.kind) return false;
    }
    return true;
}

// The rows that run in a layer; a MoD layer's are decided.
void choose(const Shape& shape, const Step& step, int64_t layer, int64_t router, const float* logits,
            std::vector<Row>& running) {
    running.clear();
    const Layer& here = *shape.layers[layer];
    for (int64_t r = 0; r < step.count; ++r) {
        const int64_t at = router * step.count + r;
        if (here.routed) {
            step.gates[at] = gate(logits[r * shape.routers + router], shape);
            step.runs[at] = step.gates[at] >= step.thresholds[at] || step.columns[r] < shape.anchors;
            if (!step.runs[at]) continue;
        }
        running.push_back({*step.places[r * shape.depth + layer], r, step.columns[r], here.window});
    }
}

// The rows' tokens through all layers, each through those that it is routed to, and through the head. A row is scored at
// every router at once after each layer that ran: a skipped layer leaves it as it is.
template <class T>
void take(const Shape& shape, const Step& step, int threads) {
    static thread_local std::vector<Row> running;
    static thread_local Scratch scratch;
    scratch.begin<T>(shape, step);
    float* x = scratch.x.data();
    for (int64_t layer = 0, router = 0; layer < shape.depth; ++layer) {
        choose(shape, step, layer, router, scratch.logits.data(), running);
        router += shape.layers[layer]->routed;
        if (!running.empty())
            run<T>(*shape.layers[layer], shape, running, x, scratch.cosines.data(), scratch.sines.data(),
                   scratch.logits.data(), threads);
    }
    project_head<T>(shape, x, step.count, step.logits, threads);
    for (int64_t r = 0; r < step.count; ++r)
        step.logprobs[r] = likeliest(step.logits + r * shape.vocabulary, shape.vocabulary, step.best + r);
}

// Count what was stored, once nothing can fail any more.
void settle(const Shape& shape, const Step& step) {
    for (int64_t r = 0; r < step.count; ++r) {
        step.written[r] = 0;
        for (int64_t layer = 0, router = 0; layer < shape.depth; ++layer) {
            const bool ran = !shape.layers[layer]->routed || step.runs[router * step.count + r];
            router += shape.layers[layer]->routed;
            step.places[r * shape.depth + layer]->end += ran;
            step.written[r] += ran;
        }
    }
}

}  // namespace

// Returns 0; 1 where memory ran out (nothing may be thrown into a caller that is not C++); 2, with nothing done, where a
// row has no room for another entry, or entries of another type.
extern "C" int32_t mod_step(const Shape* shape, const Step* step, int32_t threads) try {
    if (!prepared(*shape, *step)) return 2;
    const auto go = shape->kind == 2 ? take<bf16> : take<float>;
    go(*shape, *step, threads);
    settle(*shape, *step);
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

// Logits of hidden states x [count, width]. Returns 0, or 1 where memory ran out.
extern "C" int32_t mod_head(const Shape* shape, const float* x, int64_t count, float* logits, int32_t threads) try {
    const auto go = shape->kind == 2 ? project_head<bf16> : project_head<float>;
    go(*shape, x, count, logits, threads);
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

// Bytes of the records that native.py and storage.py mirror.
extern "C" int32_t mod_size(int32_t which) {
    const size_t sizes[] = {sizeof(Layer), sizeof(Shape), sizeof(Place), sizeof(Step)};
    return (int32_t)sizes[which];
}
