// Forward and backward of models/backends/reference.py, sample by sample in cache.
//
// Five facts make it fast:
//   1. Spikes are rare: a product with spikes is a sum of the weight rows of the neurons that fired, and the adjoint of a
//      spike is needed only where the surrogate derivative is not zero.
//   2. Between two spikes of key j nothing but the value traces acts on its column of the memory, and the column is needed
//      only when the key fires. So it stays behind in time and is brought up to date, in registers, when its key fires.
//   3. Until key j has fired its column is zero.
//   4. The loss sees a column only through the spikes of its key: after the last one its adjoint is zero.
//   5. A strongly driven neuron fires again as soon as it may. So the encoding neurons that fire at a step are mostly those that
//      fired so many steps before, and a sum over them differs from the sum then by few rows.
// The backward runs a sample forward again from its input currents, keeps the columns at the start of each chunk of time,
// and replays the steps within a chunk.
//
// The memory is held as x = 1 - W / w_max, stored [key][value], so that one Hebbian update is two fused multiply-adds:
//   x' = x (c_j - kappa_j gamma_pos nu_i) + (1 - c_j),   c_j = 1 - gamma_neg kappa_j^2.
// With 1 - c_j taken from the rounded c_j, a weight whose value neuron never fired stays exactly 0.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

struct Options {
    int64_t batch, pairs, embedding, memory;  // sizes B, L, E, M
    int64_t num_time_steps, readout_delay, readout_steps, refractory_time_steps, perfect_reset;
    int64_t threads;
    double memory_feedback, thr, alpha, dampening_factor, w_max, gamma_pos, gamma_neg, beta;
};

// Pointers to one call's tensors; those of gradients and recordings may be null.
template <class T> struct Tensors {
    const T *features, *labels, *query, *write_weight, *read_weight;
    T *readout, *counts, *spikes, *memory;
    int32_t* value_order;  // B x M, value neurons in the order of their first spikes: from forward to backward
    const T *grad_readout, *grad_counts;
    T *grad_features, *grad_labels, *grad_query, *grad_write_weight, *grad_read_weight;
};

namespace {

// ---------------------------------------------------------------------------------------------------------- vectors

// As wide as the machine's: the compiler takes comparisons and shuffles of wider ones apart lane by lane.
#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif
template <class T> constexpr int LANES = VECTOR_BYTES / sizeof(T);

template <class T> struct Vectors;
template <> struct Vectors<float> {
    typedef float type __attribute__((vector_size(VECTOR_BYTES)));
    typedef int32_t integers __attribute__((vector_size(VECTOR_BYTES)));
};
template <> struct Vectors<double> {
    typedef double type __attribute__((vector_size(VECTOR_BYTES)));
    typedef int64_t integers __attribute__((vector_size(VECTOR_BYTES)));
};
template <class T> using Vec = typename Vectors<T>::type;
template <class T> using IntVec = typename Vectors<T>::integers;

template <class T> Vec<T>* vec(T* p) { return reinterpret_cast<Vec<T>*>(p); }
template <class T> const Vec<T>* vec(const T* p) { return reinterpret_cast<const Vec<T>*>(p); }

// One bit for each lane of a comparison.
inline uint32_t bits(IntVec<float> v) {
#if defined(__AVX512DQ__)
    return _mm512_movepi32_mask((__m512i)v);
#elif defined(__AVX2__)
    return _mm256_movemask_ps((__m256)v);
#else
    uint32_t b = 0;
    for (int i = 0; i < LANES<float>; ++i) b |= uint32_t(v[i] & 1) << i;
    return b;
#endif
}
inline uint32_t bits(IntVec<double> v) {
#if defined(__AVX512DQ__)
    return _mm512_movepi64_mask((__m512i)v);
#elif defined(__AVX2__)
    return _mm256_movemask_pd((__m256d)v);
#else
    uint32_t b = 0;
    for (int i = 0; i < LANES<double>; ++i) b |= uint32_t(v[i] & 1) << i;
    return b;
#endif
}

// From a and b, group by group of 2 H lanes: the lower halves of both, or the upper halves.
template <class T, int H> struct Halves {
    IntVec<T> lower, upper;
    constexpr Halves() : lower{}, upper{} {
        for (int i = 0; i < LANES<T>; ++i) {
            const int group = i / (2 * H) * 2 * H, within = i % (2 * H);
            lower[i] = within < H ? group + within : LANES<T> + group + within - H;
            upper[i] = lower[i] + H;
        }
    }
};

// Writes first + i for every bit i, and perhaps rubbish up to 16 places further; returns how many.
inline int write_indices(uint32_t bits, int first, int32_t* to) {
#if defined(__AVX512F__)
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(bits, _mm512_add_epi32(lanes, _mm512_set1_epi32(first))));
    return __builtin_popcount(bits);
#else
    int n = 0;
    for (; bits; bits &= bits - 1) to[n++] = first + __builtin_ctz(bits);
    return n;
#endif
}

// Sums of LANES vectors, as the lanes of one.
template <class T, int H = LANES<T> / 2> Vec<T> sums(Vec<T>* v) {
    if constexpr (H == 0) return v[0];
    else {
        const Halves<T, H> halves;
        for (int i = 0; i < H; ++i)
            v[i] = __builtin_shuffle(v[i], v[i + H], halves.lower) + __builtin_shuffle(v[i], v[i + H], halves.upper);
        return sums<T, H / 2>(v);
    }
}

// Transposes a square of LANES vectors in place.
template <class T, int H = LANES<T> / 2> void transpose(Vec<T>* v) {
    if constexpr (H > 0) {
        const Halves<T, H> halves;
        for (int i = 0; i < LANES<T>; ++i)
            if (!(i & H)) {
                const Vec<T> a = v[i], b = v[i + H];
                v[i] = __builtin_shuffle(a, b, halves.lower);
                v[i + H] = __builtin_shuffle(a, b, halves.upper);
            }
        transpose<T, H / 2>(v);
    }
}

// Denormal numbers count as zero while this lives, in this thread only: decaying traces end in them.
class FlushToZero {
#if defined(__SSE2__)
    unsigned saved = _mm_getcsr();
public:
    FlushToZero() { _mm_setcsr(saved | 0x8040); }
    ~FlushToZero() { _mm_setcsr(saved); }
#endif
};

// An array aligned to vectors, of at least the size last asked for.
template <class T> class Buffer {
    struct Free { void operator()(T* p) const { std::free(p); } };
    std::unique_ptr<T, Free> data;
    size_t size = 0;
public:
    T* get(size_t n) {
        if (n > size) {
            data.reset();
            data.reset(static_cast<T*>(std::aligned_alloc(VECTOR_BYTES, (n * sizeof(T) + VECTOR_BYTES - 1) / VECTOR_BYTES * VECTOR_BYTES)));
            if (!data) throw std::bad_alloc();
            size = n;
        }
        return data.get();
    }
    T* grow(size_t n) {  // keeps the contents
        if (n > size) {
            Buffer bigger;
            bigger.get(2 * n);
            if (size) std::copy_n(data.get(), size, bigger());
            std::swap(*this, bigger);
        }
        return data.get();
    }
    T* filled(size_t n, T value) {
        T* p = get(n);
        std::fill_n(p, n, value);
        return p;
    }
    T* zeros(size_t n) { return filled(n, 0); }
    T* operator()() { return data.get(); }
};

// ----------------------------------------------------------------------------------------------------------- neurons

// Which neurons fired, step by step.
class SpikeTrain {
    Buffer<int32_t> neurons;
    Buffer<int64_t> ends;
    int64_t size = 0;
public:
    void start(int64_t steps, int64_t width) {
        neurons.get(steps * width + 32);
        ends.get(steps + 1);
        ends()[0] = size = 0;
    }
    int32_t* next() { return neurons() + size; }  // where the neurons that fire now go
    void end_step(int64_t t, const int32_t* end) { ends()[t + 1] = size = end - neurons(); }
    const int32_t* begin(int64_t t) { return neurons() + ends()[t]; }
    const int32_t* end(int64_t t) { return neurons() + ends()[t + 1]; }

    // Makes step t of this train from another: the neurons i that fire then but not at step `before`, and those that fire only
    // before, as ~i. Nothing fires before step 0.
    void take_changes(SpikeTrain& other, int64_t t, int64_t before) {
        const int32_t *now = other.begin(t), *now_end = other.end(t), *then = now_end, *then_end = now_end;
        if (before >= 0) then = other.begin(before), then_end = other.end(before);
        int32_t* to = next();
        while (now != now_end || then != then_end) {
            if (then == then_end || (now != now_end && *now < *then)) *to++ = *now++;
            else if (now == now_end || *then < *now) *to++ = ~*then++;
            else ++now, ++then;
        }
        end_step(t, to);
    }
};

// A population of LIF neurons and, for the backward, what every step's adjoint needs.
template <class T> struct Lif {
    using V = Vec<T>;
    const T alpha, thr, inverse_thr, slope_at_thr, refractory;
    const bool perfect_reset;
    const int nv;
    bool keep = false;
    Buffer<T> carried, wait, count;   // alpha v minus the reset; steps without firing left; spikes so far
    Buffer<T> slopes, carries, resets;
    Buffer<char> near;  // [step][vector], whether any slope of the vector is not zero; if not, the slopes are not written
    SpikeTrain spikes;

    Lif(const Options& o, int width)
        : alpha(o.alpha), thr(o.thr), inverse_thr(1 / o.thr), slope_at_thr(o.dampening_factor / o.thr),
          refractory(o.refractory_time_steps), perfect_reset(o.perfect_reset), nv(width / LANES<T>) {}

    int width() const { return nv * LANES<T>; }
    T* slope(int64_t t) { return slopes() + t * width(); }  // dz/dv

    void rest(int64_t steps, bool keep_trajectory) {
        keep = keep_trajectory;
        carried.zeros(width()), wait.zeros(width()), count.zeros(width());
        spikes.start(steps, width());
        if (keep) slopes.get(steps * width()), near.get(steps * nv);
        if (keep && perfect_reset) carries.get(steps * width()), resets.get(steps * width());
    }

    // One step.
    void step(int64_t t, const T* current) {
        if (!keep) step<false, false>(t, current);
        else if (!perfect_reset) step<true, false>(t, current);
        else step<true, true>(t, current);
    }

    template <bool keep, bool keep_resets> void step(int64_t t, const T* current) {
        const V zero = {}, one = zero + 1;
        const T alpha = this->alpha, thr = this->thr, inverse_thr = this->inverse_thr, refractory = this->refractory;
        const T gain = 1 - alpha, slope_at_thr = this->slope_at_thr;
        const bool perfect_reset = this->perfect_reset;
        const int nv = this->nv;
        V *carried = vec(this->carried()), *wait = vec(this->wait()), *count = vec(this->count()), *slopes = nullptr;
        char* near = nullptr;
        if (keep) slopes = vec(slope(t)), near = this->near() + t * nv;
        int32_t* fired = spikes.next();
        for (int b = 0; b < nv; ++b) {
            const V v = carried[b] + gain * vec(current)[b];
            const V r = wait[b];
            const V u = (v - thr) * inverse_thr;
            const auto may_fire = r == zero, fires = (u > zero) & may_fire;
            const V z = fires ? one : zero, decayed = alpha * v;
            carried[b] = perfect_reset ? (fires ? zero : decayed) : decayed - thr * z;
            wait[b] = may_fire ? refractory * z : r - 1;
            count[b] += z;
            fired += write_indices(bits(fires), b * LANES<T>, fired);
            if (keep) {
                const V height = 1 - (u < zero ? -u : u);
                const auto is_near = may_fire & (height > zero);
                near[b] = bits(is_near) != 0;
                if (near[b]) slopes[b] = is_near ? slope_at_thr * height : zero;
            }
            if (keep_resets) vec(carries())[t * nv + b] = alpha * (1 - z), vec(resets())[t * nv + b] = decayed;
        }
        spikes.end_step(t, fired);
    }

    V slopes_of(int64_t t, int b) { return near()[t * nv + b] ? vec(slope(t))[b] : V{}; }

    // The neurons whose spike at step t has an adjoint; returns how many.
    int list_near(int64_t t, int32_t* neurons) {
        int n = 0;
        for (int b = 0; b < nv; ++b)
            if (near()[t * nv + b]) n += write_indices(bits(vec(slope(t))[b] != V{}), b * LANES<T>, neurons + n);
        return n;
    }

    // One step of the adjoint: `dv` from dL/dv(t+1) to dL/dv(t), given that of z(t); `dcurrent` is dL/d current(t).
    void adjoint(int64_t t, const T* dz, T* dv, T* dcurrent) {
        const T alpha = this->alpha, gain = 1 - alpha;
        const V thr = V{} + this->thr;
        const V *slopes = vec(slope(t)), *carries = nullptr, *resets = nullptr;
        const char* near = this->near() + t * nv;
        if (perfect_reset) carries = vec(this->carries()) + t * nv, resets = vec(this->resets()) + t * nv;
        for (int b = 0, n = nv; b < n; ++b) {
            const V later = vec(dv)[b];
            V now = carries ? carries[b] * later : alpha * later;
            if (near[b]) now += slopes[b] * (vec(dz)[b] - (resets ? resets[b] : thr) * later);
            vec(dv)[b] = now;
            vec(dcurrent)[b] = gain * now;
        }
    }
};

// ----------------------------------------------------------------------------------------------------------- products

template <class T> void add(T* to, const T* from, int nv, T factor = 1) {
    for (int b = 0; b < nv; ++b) vec(to)[b] += factor * vec(from)[b];
}

// out[j] += scale * term(row(j), g) summed over nv vectors, for the n listed j.
template <class T, class Row, class Term>
void dots(const int32_t* index, int n, const Row& row, const Term& term, const T* g, int nv, T scale, T* out) {
    using V = Vec<T>;
    for (int first = 0; first < n; first += LANES<T>) {
        V partial[LANES<T>] = {};
        const int some = std::min(n - first, LANES<T>);
        for (int k = 0; k < some; ++k) {
            const V* r = vec(row(index[first + k]));
            V s = {};
            for (int b = 0; b < nv; ++b) s += term(r[b]) * vec(g)[b];
            partial[k] = s;
        }
        const V total = sums<T>(partial);
        for (int k = 0; k < some; ++k) out[index[first + k]] += scale * total[k];
    }
}

// The weights, transposed and padded, so that the row of a neuron that fired lies in whole vectors.
template <class T> struct Weights {
    const int Ep, Mp;                  // E and M, padded
    Buffer<T> write, query, feedback;  // [2 Ep][2 Mp], [Ep][Mp], [Mp][Mp]

    Weights(int Ep, int Mp) : Ep(Ep), Mp(Mp) {
        write.zeros(4l * Ep * Mp);
        query.zeros(1l * Ep * Mp);
        feedback.zeros(1l * Mp * Mp);
    }
    // Visits (element of a weight, its place here).
    template <class W, class Visit> void each(const Options& o, W* write_weight, W* read_weight, const Visit& visit) {
        const int64_t E = o.embedding, M = o.memory;
        for (int64_t i = 0; i < 2 * M; ++i)
            for (int64_t e = 0; e < 2 * E; ++e)
                visit(write_weight[i * 2 * E + e], write()[(e < E ? e : Ep + e - E) * 2 * Mp + (i < M ? i : Mp + i - M)]);
        for (int64_t j = 0; j < M; ++j) {
            for (int64_t e = 0; e < E; ++e) visit(read_weight[j * (E + M) + e], query()[e * Mp + j]);
            for (int64_t i = 0; i < M; ++i) visit(read_weight[j * (E + M) + E + i], feedback()[i * Mp + j]);
        }
    }
};

// ------------------------------------------------------------------------------------------------------------- memory

template <class T> constexpr int CHUNK = LANES<T>;  // steps of time taken together: as many as a vector has lanes
constexpr int BLOCK = 96;                          // steps of the encoding population taken together; whole chunks

// What the updates of one chunk have of their key: one entry a step.
template <class T> struct KeyTrace {
    alignas(VECTOR_BYTES) T kappa[CHUNK<T>], c[CHUNK<T>], d[CHUNK<T>], h[CHUNK<T>];
    KeyTrace(const T* trace, T gamma_neg) {
        const Vec<T> k = *vec(trace), decayed = 1 - gamma_neg * k * k;
        *vec(kappa) = k, *vec(c) = decayed, *vec(d) = 1 - decayed, *vec(h) = 2 * gamma_neg * k;
    }
};

// Calls f(first vector, how many) for all nv vectors of a column, in groups that fit into registers.
constexpr int GROUP = 8;
template <class F> inline void in_groups(int nv, const F& f) {
    for (int first = 0, groups = (nv + GROUP - 1) / GROUP; groups > 0; --groups) {
        const int n = (nv - first + groups - 1) / groups;
        switch (n) {
            case 1: f(first, std::integral_constant<int, 1>()); break;
            case 2: f(first, std::integral_constant<int, 2>()); break;
            case 3: f(first, std::integral_constant<int, 3>()); break;
            case 4: f(first, std::integral_constant<int, 4>()); break;
            case 5: f(first, std::integral_constant<int, 5>()); break;
            case 6: f(first, std::integral_constant<int, 6>()); break;
            case 7: f(first, std::integral_constant<int, 7>()); break;
            case 8: f(first, std::integral_constant<int, 8>()); break;
        }
        first += n;
    }
}

// N vectors of a column through the updates of steps begin to end of a chunk; `visit(s, x)` sees it before each.
template <class T, int N, class Visit>
inline void update(const Vec<T>* from, const KeyTrace<T>& key, const T* gnu, int nv, int begin, int end, const Visit& visit, Vec<T>* to) {
    Vec<T> x[N];
    for (int b = 0; b < N; ++b) x[b] = from[b];
    for (int s = begin; s < end; ++s) {
        visit(s, x);
        const Vec<T>* trace = vec(gnu) + s * nv;
        const T kappa = key.kappa[s], c = key.c[s], d = key.d[s];
        for (int b = 0; b < N; ++b) x[b] = x[b] * (c - kappa * trace[b]) + d;
    }
    for (int b = 0; b < N; ++b) to[b] = x[b];
}

// The adjoint of `update`, from step `end` back to `begin`, for dL/dW_j / w_max = -dL/dx in `adjoint`. Adds to dL/d nu in
// `dnu`, and the terms of dL/d kappa (to be summed over lanes) in `dkappa`.
template <class T, int N>
inline void update_adjoint(const Vec<T>* from, const KeyTrace<T>& key, const T* gnu, int nv, int begin, int end, Vec<T>* adjoint, T* dnu,
                           Vec<T>* dkappa) {
    Vec<T> replayed[CHUNK<T>][N], a[N];
    for (int b = 0; b < N; ++b) a[b] = from[b];
    for (int s = begin; s < end; ++s) {
        const T kappa = key.kappa[s], c = key.c[s], d = key.d[s];
        for (int b = 0; b < N; ++b) {
            replayed[s][b] = a[b];
            a[b] = a[b] * (c - kappa * vec(gnu)[s * nv + b]) + d;
        }
    }
    for (int b = 0; b < N; ++b) a[b] = adjoint[b];
    for (int s = end - 1; s >= begin; --s) {
        const Vec<T>* trace = vec(gnu) + s * nv;
        Vec<T>* to = vec(dnu) + s * nv;
        const T kappa = key.kappa[s], c = key.c[s], h = key.h[s];
        Vec<T> direct = {}, through_decay = {};
        for (int b = 0; b < N; ++b) {
            const Vec<T> p = a[b] * replayed[s][b];
            to[b] += p * kappa;
            direct += p * (trace[b] + h);
            through_decay += a[b];
            a[b] *= c - kappa * trace[b];
        }
        dkappa[s] += direct - h * through_decay;
    }
    for (int b = 0; b < N; ++b) adjoint[b] = a[b];
}

// The updates of one column in steps begin to end, between two spikes of its key and within one chunk. Its state before them is
// kept.
struct Segment {
    int32_t key, begin, end;
    int32_t live;   // vectors of it that are not zero
    int64_t start;  // where these are kept
};

// One sample, run forward and, if asked, backward: the working memory of a thread.
template <class T> class Sample {
    using V = Vec<T>;
    static constexpr int C = CHUNK<T>;
    enum { FEATURES, LABELS, QUERY, KEYS, VALUES, READ_KEYS, READ_VALUES };

    const Options& o;
    const Tensors<T>& tensors;
    Weights<T>& weights;
    const int64_t E, M, T_, steps, chunks;  // steps: of writing
    const int Ep, Mp, mv;                   // E and M padded, vectors of M
    const T alpha, beta, gamma_pos, gamma_neg, w_max, feedback;
    int64_t sample = 0;
    size_t open_segments = 0;  // those before the time the backward has reached
    bool keep = false;

    Lif<T> encoder, query, keys, values, read_keys, read_values;
    const int64_t period;           // steps after which a neuron that fired may fire again
    SpikeTrain changes;             // of the encoding neurons that fire, against a period before, or none at the start of a block
    Buffer<T> current, drive, readout;
    Buffer<int32_t> order;          // the value neuron at each place; `write` to `drive` and all of the memory follow it
    Buffer<T> write_rows_, write_grads;  // weights.write and its gradient, values in this order
    int live = 0;                   // vectors of value neurons of which any has fired: the rest of the memory is zero
    Buffer<int32_t> first_value_spike, live_at;  // live at the end of each chunk
    Buffer<T> natural;  // the memory after writing, values in their natural order
    Buffer<T> x_;            // [key][value], 1 - W / w_max
    Buffer<T> traces;        // [key][steps], kappa
    Buffer<T> trace_rows;    // [chunk step][key]
    Buffer<T> gnu_;          // [steps][value], gamma_pos nu
    std::vector<Segment> segments;  // in the order of their ends
    Buffer<T> starts;               // x before each segment
    int64_t starts_size = 0;
    Buffer<int64_t> up_to_, first_spike_;
    // backward
    Buffer<T> mu_;           // [key][value], dL/dW / w_max
    Buffer<T> dnu_, g_, dz_, dv_, dquery_, dkappa_, through_memory, sums_of_keys, count_grads, encoder_dv;
    Buffer<int32_t> index;
    Buffer<uint32_t> near_bits;  // the steps of the chunk at which a key's surrogate derivative is not zero
    std::vector<char> seen, touched;  // whether anything later in time sees column j; whether it has sums in this chunk

    T* x(int64_t j) { return x_() + j * Mp; }
    T* trace(int64_t start, int64_t j) { return traces() + (start * Mp + j * C); }  // in the chunk from step `start`
    T* gnu(int64_t t) { return gnu_() + t * Mp; }
    T* mu(int64_t j) { return mu_() + j * Mp; }
    T* g(int64_t t) { return g_() + t % BLOCK * 2 * Mp; }  // adjoint of the currents of keys and values, for a block
    int64_t& up_to(int64_t j) { return up_to_()[j]; }          // the step before which column j stands
    int64_t& first_spike(int64_t j) { return first_spike_()[j]; }  // or `steps`

public:
    Sample(const Options& o, const Tensors<T>& tensors, Weights<T>& weights)
        : o(o), tensors(tensors), weights(weights), E(o.embedding), M(o.memory), T_(o.num_time_steps),
          steps(o.pairs * o.num_time_steps), chunks((steps + C - 1) / C), Ep(weights.Ep), Mp(weights.Mp), mv(Mp / LANES<T>),
          alpha(o.alpha), beta(o.beta), gamma_pos(o.gamma_pos), gamma_neg(o.gamma_neg), w_max(o.w_max),
          feedback(o.memory_feedback * o.w_max), encoder(o, 2 * Ep), query(o, Ep), keys(o, Mp), values(o, Mp),
          read_keys(o, Mp), read_values(o, Mp), period(o.refractory_time_steps + 1) {}

    void forward(int64_t b, bool keep_trajectory) {
        sample = b;
        keep = keep_trajectory;
        order_values();
        write();
        read();
    }

    void store_results() {
        std::copy_n(readout(), M, tensors.readout + sample * M);
        T* to = tensors.counts + sample * (3 * E + 4 * M);
        auto append = [&](const T* from, int64_t n) { to = std::copy_n(from, n, to); };
        int32_t* by_first_spike = tensors.value_order + sample * M;
        for (int64_t i = 0; i < M; ++i) by_first_spike[i] = i;
        std::sort(by_first_spike, by_first_spike + M, [&](int32_t a, int32_t b) {
            return std::make_pair(first_value_spike()[a], a) < std::make_pair(first_value_spike()[b], b);
        });
        append(encoder.count(), E);
        append(encoder.count() + Ep, E);
        append(query.count(), E);
        for (Lif<T>* lif : {&keys, &values, &read_keys, &read_values}) append(lif->count(), M);
    }

    // The spikes of all populations, whose recordings follow one another in one array, and the memory.
    void record() {
        T* to = tensors.spikes;
        auto append = [&](SpikeTrain& spikes, int64_t length, int64_t first, int64_t n) {
            T* train = to + sample * length * n;
            for (int64_t t = 0; t < length; ++t)
                for (auto j = spikes.begin(t); j != spikes.end(t); ++j)
                    if (*j >= first && *j < first + n) train[t * n + *j - first] = 1;
            to += o.batch * length * n;
        };
        append(encoder.spikes, steps, 0, E);
        append(encoder.spikes, steps, Ep, E);
        append(query.spikes, T_, 0, E);
        append(keys.spikes, steps, 0, M);
        append(values.spikes, steps, 0, M);
        append(read_keys.spikes, T_, 0, M);
        append(read_values.spikes, T_, 0, M);
        T* memory = tensors.memory + sample * M * M;
        for (int64_t j = 0; j < M; ++j) {
            catch_up(j, steps);
            for (int64_t i = 0; i < M; ++i) memory[i * M + j] = w_max * (1 - x(j)[i]);
        }
    }

    // The adjoint of everything, after forward(b, true); adds the gradients of the weights to `grads`.
    void backward(Weights<T>& grads) {
        load_count_grads();
        mu_.zeros(M * Mp);
        index.get(std::max(2 * Ep, Mp) + 16);
        read_adjoint(grads);
        write_adjoint(grads);
    }

private:
    // ------------------------------------------------------------------------------------------------------- forward

    // In the backward value neurons stand in the order of their first spikes, so that those which have fired by a step fill
    // few vectors, and only these have any memory.
    void order_values() {
        order.get(Mp);
        for (int i = 0; i < Mp; ++i) order()[i] = i;
        if (!keep) return;
        std::copy_n(tensors.value_order + sample * M, M, order());
        write_rows_.get(4l * Ep * Mp);
        for (int64_t e = 0; e < 2 * Ep; ++e) {
            const T* from = weights.write() + e * 2 * Mp;
            T* to = write_rows_() + e * 2 * Mp;
            std::copy_n(from, Mp, to);
            for (int i = 0; i < Mp; ++i) to[Mp + i] = from[Mp + order()[i]];
        }
    }
    const T* write_rows() { return keep ? write_rows_() : weights.write(); }

    // Column j after writing, values in their natural order.
    const T* stored(int64_t j) {
        if (keep) return natural() + j * Mp;
        catch_up(j, steps);
        return x(j);
    }

    // Applies to column j all updates before step t.
    void catch_up(int64_t j, int64_t t) {
        if (first_spike(j) >= t) return;
        while (up_to(j) < t) {
            const int64_t start = up_to(j) / C * C, end = std::min(t, start + C);
            const KeyTrace<T> key(trace(start, j), gamma_neg);
            if (keep) {
                segments.push_back({int32_t(j), int32_t(up_to(j)), int32_t(end), live, starts_size});
                std::copy_n(x(j), live * LANES<T>, starts.grow(starts_size + Mp) + starts_size);
                starts_size += live * LANES<T>;
                for (int b = 8; b < 8 + live; ++b) __builtin_prefetch(vec(starts() + starts_size) + b, 1);
            }
            in_groups(live, [&](int b, auto n) {
                update<T, n>(vec(x(j)) + b, key, gnu(start) + b * LANES<T>, mv, up_to(j) - start, end - start, [](int, V*) {}, vec(x(j)) + b);
            });
            up_to(j) = end;
        }
    }

    void write() {
        encoder.rest(steps, keep), keys.rest(steps, keep), values.rest(steps, keep);
        changes.start(steps, 2 * Ep);
        x_.filled(M * Mp, 1);
        gnu_.get(chunks * C * Mp);
        std::fill(gnu(steps), gnu(chunks * C), T(0));
        first_value_spike.filled(Mp, steps);
        live_at.get(chunks);
        live = 0;
        starts_size = 0;
        traces.get(Mp * chunks * C);
        trace_rows.zeros((C + 1) * Mp);
        up_to_.zeros(M);
        first_spike_.filled(M, steps);
        drive.get(BLOCK * 2 * Mp);
        segments.clear();
        for (int64_t block = 0; block < steps; block += BLOCK) {
            const int64_t end = std::min(steps, block + BLOCK);
            encode(block, end);
            sum_rows(block, end);
            for (int64_t start = block; start < end; start += C) write_chunk(start, std::min(end, start + C));
        }
        if (!keep) return;
        natural.get(M * Mp);
        for (int64_t j = 0; j < M; ++j)
            if (first_spike(j) < steps)
                for (int i = 0; i < Mp; ++i) natural()[j * Mp + order()[i]] = x(j)[i];
    }

    void encode(int64_t begin, int64_t end) {
        current.zeros(2 * Ep);
        for (int64_t t = begin; t < end; ++t) {
            if (t == begin || t % T_ == 0) {
                const int64_t pair = (sample * o.pairs + t / T_) * E;
                std::copy_n(tensors.features + pair, E, current());
                std::copy_n(tensors.labels + pair, E, current() + Ep);
            }
            encoder.step(t, current());
            changes.take_changes(encoder.spikes, t, t - begin < period ? -1 : t - period);
        }
    }

    // Calls f(row, 1 or -1) for those of `rows` by which the sum over the encoding neurons that fire at step t has changed.
    template <class Row, class F> void each_change(int64_t t, Row* rows, const F& f) {
        for (auto e = changes.begin(t); e != changes.end(t); ++e) f(rows + std::max(*e, ~*e) * 2l * Mp, T(*e < 0 ? -1 : 1));
    }

    void sum_rows(int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
            T* sum = drive() + (t - begin) * 2 * Mp;
            if (t - begin < period) std::fill_n(sum, 2 * Mp, T(0));
            else std::copy_n(sum - period * 2 * Mp, 2 * Mp, sum);
            each_change(t, write_rows(), [&](const T* row, T sign) { add(sum, row, 2 * mv, sign); });
        }
    }

    void write_chunk(int64_t start, int64_t end) {
        T* now = drive() + start % BLOCK * 2 * Mp;
        const T feedback = this->feedback;
        fire_keys(start, end, now);
        for (int64_t t = start; t < end; ++t) {
            T* value_drive = now + (t - start) * 2 * Mp + Mp;
            for (auto j = keys.spikes.begin(t); j != keys.spikes.end(t); ++j) {
                if (first_spike(*j) == t) up_to(*j) = t;
                catch_up(*j, t);
                const V* column = vec(x(*j));
                for (int b = 0, n = live; b < n; ++b) vec(value_drive)[b] += feedback * (1 - column[b]);
            }
            fire_values(t, value_drive);
        }
        live_at()[start / C] = live;
        if (keep)
            for (int64_t j = 0; j < M; ++j) catch_up(j, end);
    }

    // Keys and their traces, which do not depend on the memory.
    void fire_keys(int64_t start, int64_t end, const T* key_drive) {
        T* last = trace_rows() + C * Mp;
        const T beta = this->beta;
        for (int s = 0; s < C; ++s) {
            T* row = trace_rows() + s * Mp;
            const T* before = s ? row - Mp : last;
            if (start + s >= end) {
                std::fill_n(row, Mp, T(0));
                continue;
            }
            keys.step(start + s, key_drive + s * 2 * Mp);
            for (int b = 0, n = mv; b < n; ++b) vec(row)[b] = beta * vec(before)[b];
            for (auto j = keys.spikes.begin(start + s); j != keys.spikes.end(start + s); ++j) {
                row[*j] += 1 - beta;
                first_spike(*j) = std::min(first_spike(*j), start + s);
            }
        }
        std::copy_n(trace_rows() + (C - 1) * Mp, Mp, last);
        for (int b = 0; b < mv; ++b) {
            V square[C];
            for (int s = 0; s < C; ++s) square[s] = vec(trace_rows())[s * mv + b];
            transpose<T>(square);
            for (int k = 0; k < LANES<T>; ++k) *vec(trace(start, b * LANES<T> + k)) = square[k];
        }
    }

    void fire_values(int64_t t, const T* value_drive) {
        values.step(t, value_drive);
        T* row = gnu(t);
        const T beta = this->beta;
        if (t == 0) std::fill_n(row, Mp, T(0));
        else for (int b = 0, n = mv; b < n; ++b) vec(row)[b] = beta * vec(row - Mp)[b];
        for (auto i = values.spikes.begin(t); i != values.spikes.end(t); ++i) {
            row[*i] += gamma_pos * (1 - beta);
            first_value_spike()[*i] = std::min<int32_t>(first_value_spike()[*i], t);
            live = std::max(live, *i / LANES<T> + 1);
        }
    }

    void read() {
        query.rest(T_, keep), read_keys.rest(T_, keep), read_values.rest(T_, keep);
        std::copy_n(tensors.query + sample * E, E, current.zeros(Ep));
        readout.zeros(Mp);
        for (int64_t t = 0; t < T_; ++t) {
            query.step(t, current());
            T* sum = drive.zeros(2 * Mp);
            for (auto e = query.spikes.begin(t); e != query.spikes.end(t); ++e) add(sum, weights.query() + *e * Mp, mv);
            if (const int64_t then = t - o.readout_delay; then >= 0)
                for (auto i = read_values.spikes.begin(then); i != read_values.spikes.end(then); ++i)
                    add(sum, weights.feedback() + *i * Mp, mv);
            read_keys.step(t, sum);

            std::fill_n(sum, Mp, T(0));
            for (auto j = read_keys.spikes.begin(t); j != read_keys.spikes.end(t); ++j) {
                if (first_spike(*j) == steps) continue;
                const T* column = stored(*j);
                for (int b = 0; b < mv; ++b) vec(sum)[b] += w_max * (1 - vec(column)[b]);
            }
            read_values.step(t, sum);
            if (t >= T_ - o.readout_steps)
                for (auto i = read_values.spikes.begin(t); i != read_values.spikes.end(t); ++i) readout()[*i] += 1;
        }
    }

    // ------------------------------------------------------------------------------------------------------ backward

    // dL/d spike count, a constant added to the adjoint of every spike of a neuron; padded.
    T* count_grad(int population) {
        const int at[] = {0, Ep, 2 * Ep, 3 * Ep, 3 * Ep + Mp, 3 * Ep + 2 * Mp, 3 * Ep + 3 * Mp};
        return count_grads() + at[population];
    }
    void load_count_grads() {
        count_grads.zeros(3 * Ep + 4 * Mp);
        const T* from = tensors.grad_counts + sample * (3 * E + 4 * M);
        for (int population = FEATURES; population <= READ_VALUES; ++population) {
            const int64_t n = population < KEYS ? E : M;
            std::copy_n(from, n, count_grad(population));
            from += n;
        }
        T* values = count_grad(VALUES);
        std::copy_n(values, Mp, dz_.get(std::max(Ep, Mp)));
        for (int i = 0; i < Mp; ++i) values[i] = dz_()[order()[i]];
    }

    void read_adjoint(Weights<T>& grads) {
        const auto plain = [](V w) { return w; };
        const int wide = std::max(Ep, Mp);
        T *dz = dz_.get(2 * wide), *dvalues = dz + wide;
        T *dv_keys = dv_.zeros(2 * Mp + Ep), *dv_values = dv_keys + Mp, *dv_query = dv_keys + 2 * Mp;
        T *dkeys = g_.get(std::max<int64_t>(T_, 2 * BLOCK) * Mp), *dquery = dquery_.zeros(Ep);
        for (int64_t t = T_ - 1; t >= 0; --t) {
            std::copy_n(count_grad(READ_VALUES), Mp, dz);
            if (t >= T_ - o.readout_steps)
                for (int64_t i = 0; i < M; ++i) dz[i] += tensors.grad_readout[sample * M + i];
            if (const int64_t then = t + o.readout_delay; then < T_)
                dots<T>(index(), read_values.list_near(t, index()), [&](int64_t i) { return weights.feedback() + i * Mp; },
                     plain, dkeys + then * Mp, mv, T(1), dz);
            read_values.adjoint(t, dz, dv_values, dvalues);

            std::copy_n(count_grad(READ_KEYS), Mp, dz);
            const int n = read_keys.list_near(t, index());
            dots<T>(index(), std::remove_if(index(), index() + n, [&](int64_t j) { return j >= M || first_spike(j) == steps; }) - index(),
                    [&](int64_t j) { return stored(j); }, [](V x) { return 1 - x; }, dvalues, mv, w_max, dz);
            for (auto j = read_keys.spikes.begin(t); j != read_keys.spikes.end(t); ++j)
                for (int b = 0; b < mv; ++b) vec(mu(*j))[b] += w_max * vec(dvalues)[b];
            T* dkey = dkeys + t * Mp;
            read_keys.adjoint(t, dz, dv_keys, dkey);
            if (const int64_t then = t - o.readout_delay; then >= 0)
                for (auto i = read_values.spikes.begin(then); i != read_values.spikes.end(then); ++i)
                    add(grads.feedback() + *i * Mp, dkey, mv);
            for (auto e = query.spikes.begin(t); e != query.spikes.end(t); ++e) add(grads.query() + *e * Mp, dkey, mv);

            std::copy_n(count_grad(QUERY), Ep, dz);
            dots<T>(index(), query.list_near(t, index()), [&](int64_t e) { return weights.query() + e * Mp; }, plain,
                 dkey, mv, T(1), dz);
            query.adjoint(t, dz, dv_query, dz);
            add(dquery, dz, query.nv);
        }
        std::copy_n(dquery, E, tensors.grad_query + sample * E);
    }

    void write_adjoint(Weights<T>& grads) {
        dnu_.get((C + 1) * Mp);
        dkappa_.get((C + 1) * Mp);
        std::fill_n(dnu_() + C * Mp, Mp, T(0));
        std::fill_n(dkappa_() + C * Mp, Mp, T(0));
        through_memory.get(C * Mp);
        sums_of_keys.get(C * Mp * LANES<T>);
        dz_.get(std::max(Mp, 2 * Ep));
        dv_.zeros(2 * Mp);
        encoder_dv.zeros(6 * Ep);
        open_segments = segments.size();
        near_bits.get(Mp);
        touched.assign(M, 0);
        seen.assign(M, 0);
        for (int64_t j = 0; j < M; ++j) {
            seen[j] = read_keys.count()[j] > 0;
            if (!seen[j]) continue;
            std::copy_n(mu(j), Mp, dz_());
            for (int i = 0; i < Mp; ++i) mu(j)[i] = dz_()[order()[i]];
        }
        write_grads.zeros(4l * Ep * Mp);
        for (int64_t block = (steps - 1) / BLOCK * BLOCK; block >= 0; block -= BLOCK) {
            const int64_t end = std::min(steps, block + BLOCK);
            for (int64_t start = (end - 1) / C * C; start >= block; start -= C) chunk_adjoint(start, std::min(end, start + C));
            encoder_adjoint(block, end);
        }
        for (int64_t e = 0; e < 2 * Ep; ++e) {
            const T* from = write_grads() + e * 2 * Mp;
            T* to = grads.write() + e * 2 * Mp;
            add(to, from, mv);
            for (int i = 0; i < Mp; ++i) to[Mp + order()[i]] += from[Mp + i];
        }
    }

    // The terms of a key's dL/d kappa in this chunk, to be summed over lanes.
    V* kappa_terms(int64_t j) {
        V* terms = vec(sums_of_keys()) + j * C;
        if (!touched[j]) std::fill_n(terms, C, V{}), touched[j] = 1;
        return terms;
    }

    void segment_adjoint(int64_t start, const Segment& segment) {
        const int64_t j = segment.key;
        const int begin = segment.begin - start, end = segment.end - start;
        const KeyTrace<T> key(trace(start, j), gamma_neg);
        V *terms = kappa_terms(j), *column = vec(starts() + segment.start);
        in_groups(segment.live, [&](int b, auto n) {
            update_adjoint<T, n>(column + b, key, gnu(start) + b * LANES<T>, mv, begin, end, vec(mu(j)) + b, dnu_() + b * LANES<T>, terms);
        });
        if (segment.live < mv) in_groups(mv - segment.live, [&](int first, auto n) {  // values that have not fired yet: x = 1, nu = 0
            V a[n], *to = vec(dnu_()) + segment.live + first, *adjoint = vec(mu(j)) + segment.live + first;
            for (int b = 0; b < n; ++b) a[b] = adjoint[b];
            for (int s = end - 1; s >= begin; --s) {
                const T kappa = key.kappa[s], c = key.c[s];
                for (int b = 0; b < n; ++b) {
                    to[s * mv + b] += a[b] * kappa;
                    a[b] *= c;
                }
            }
            for (int b = 0; b < n; ++b) adjoint[b] = a[b];
        });
    }

    // Before its first spike column j is zero and its adjoint constant.
    void silent_adjoint(int64_t start, int64_t end, int64_t j) {
        V* terms = kappa_terms(j);
        for (int s = 0; s < end - start; ++s)
            for (int b = 0; b < live_at()[start / C]; ++b) terms[s] += vec(mu(j))[b] * vec(gnu(start + s))[b];
    }

    // What the values were fed back from the memory, through its keys: adds the sum over i of W_ij g_i(s).
    void recall_adjoint(int64_t start, const Segment& segment, T* terms) {
        const int64_t j = segment.key;
        const int begin = segment.begin - start, end = segment.end - start;
        const uint32_t within = near_bits()[j] & ((1u << end) - (1u << begin));
        if (!within) return;
        const int last = 32 - __builtin_clz(within);
        const KeyTrace<T> key(trace(start, j), gamma_neg);
        V *column = vec(starts() + segment.start), *sums = vec(terms) + j * C;
        const T feedback = this->feedback;
        in_groups(segment.live, [&](int b, auto n) {
            update<T, n>(column + b, key, gnu(start) + b * LANES<T>, mv, begin, last, [&](int s, V* x) {
                V sum = {};
                for (int k = 0; k < n; ++k) sum += (1 - x[k]) * vec(g(start + s) + Mp)[b + k];
                sums[s] += feedback * sum;
            }, column + b);
        });
    }

    // From the terms of all keys, [key][step] to be summed over lanes, the sums [step][key].
    void sum_terms(const T* terms, T* out) {
        for (int b = 0; b < mv; ++b) {
            V square[C], partial[C];
            for (int k = 0; k < LANES<T>; ++k) {
                const int64_t j = b * LANES<T> + k;
                square[k] = V{};
                if (j >= M || !touched[j]) continue;
                for (int s = 0; s < C; ++s) partial[s] = vec(terms)[j * C + s];
                square[k] = sums<T>(partial);
            }
            transpose<T>(square);
            for (int s = 0; s < C; ++s) vec(out)[s * mv + b] = square[s];
        }
    }

    // Asks for what the chunk before this one needs: it was written long ago and comes from far.
    void prefetch_chunk(int64_t start) {
        if (start == 0) return;
        const int64_t before = (start - C) * mv;
        for (int n = 0; n < C * mv; ++n) {
            __builtin_prefetch(vec(traces()) + before + n);
            __builtin_prefetch(vec(gnu_()) + before + n);
            __builtin_prefetch(vec(keys.slopes()) + before + n);
            __builtin_prefetch(vec(values.slopes()) + before + n);
        }
    }

    void chunk_adjoint(int64_t start, int64_t end) {
        prefetch_chunk(start);
        std::fill_n(dnu_(), C * Mp, T(0));
        std::fill(touched.begin(), touched.end(), 0);
        for (int64_t j = 0; j < M; ++j)
            if (seen[j] && first_spike(j) >= end) silent_adjoint(start, end, j);
        const size_t last_segment = open_segments;
        const auto back_from = [&](int64_t t) {
            for (; open_segments > 0 && segments[open_segments - 1].end == t; --open_segments) {
                if (open_segments >= 4) {  // comes from far
                    const Segment& soon = segments[open_segments - 4];
                    for (int b = 0; b < soon.live; ++b) __builtin_prefetch(vec(starts() + soon.start) + b);
                }
                if (seen[segments[open_segments - 1].key]) segment_adjoint(start, segments[open_segments - 1]);
            }
        };
        back_from(end);
        T *dv_keys = dv_(), *dv_values = dv_() + Mp;
        for (int64_t t = end - 1; t >= start; --t) {
            const int s = t - start;
            T *dnu = dnu_() + s * Mp, *dvalues = g(t) + Mp;
            add_trace(dnu, t + 1 == end ? dnu_() + C * Mp : dnu + Mp, gamma_pos * (1 - beta), count_grad(VALUES));
            values.adjoint(t, dz_(), dv_values, dvalues);
            const T feedback = this->feedback;
            for (auto j = keys.spikes.begin(t); j != keys.spikes.end(t); ++j) {
                for (int b = 0; b < mv; ++b) vec(mu(*j))[b] += feedback * vec(dvalues)[b];
                seen[*j] = 1;
                if (first_spike(*j) == t) silent_adjoint(start, t, *j);
            }
            if (t > start) back_from(t);
        }
        std::copy_n(dnu_(), Mp, dnu_() + C * Mp);
        sum_terms(sums_of_keys(), dkappa_());

        find_near(start, end);
        std::fill(touched.begin(), touched.end(), 0);
        for (size_t n = open_segments; n < last_segment; ++n) {
            kappa_terms(segments[n].key);
            recall_adjoint(start, segments[n], sums_of_keys());
        }
        sum_terms(sums_of_keys(), through_memory());

        for (int64_t t = end - 1; t >= start; --t) {
            const int s = t - start;
            T *dkappa = dkappa_() + s * Mp, *dz = dz_();
            add_trace(dkappa, t + 1 == end ? dkappa_() + C * Mp : dkappa + Mp, 1 - beta, count_grad(KEYS));
            for (int b = 0; b < mv; ++b) vec(dz)[b] += vec(through_memory())[s * mv + b];
            keys.adjoint(t, dz, dv_keys, g(t));
        }
        std::copy_n(dkappa_(), Mp, dkappa_() + C * Mp);
    }

    // The adjoint of a trace, from the step after; and from it and the spike counts that of the spike, in `dz_`.
    void add_trace(T* trace, const T* later, T gain, const T* count_grad) {
        const T beta = this->beta;
        T* dz = dz_();
        for (int b = 0, n = mv; b < n; ++b) {
            vec(trace)[b] += beta * vec(later)[b];
            vec(dz)[b] = vec(count_grad)[b] + gain * vec(trace)[b];
        }
    }

    void find_near(int64_t start, int64_t end) {
        for (int b = 0; b < mv; ++b) {
            V square[C];
            for (int s = 0; s < C; ++s) square[s] = start + s < end ? keys.slopes_of(start + s, b) : V{};
            transpose<T>(square);
            for (int k = 0; k < LANES<T>; ++k) near_bits()[b * LANES<T> + k] = bits(square[k] != V{});
        }
    }

    void encoder_adjoint(int64_t begin, int64_t end) {
        T *dz = dz_(), *dv = encoder_dv(), *total = dv + 2 * Ep, *dcurrent = total + 2 * Ep;
        const auto plain = [](V w) { return w; };
        for (int64_t t = end - 1; t >= begin; --t) {
            const int n = encoder.list_near(t, index());
            for (int k = 0; k < n; ++k) dz[index()[k]] = count_grad(FEATURES)[index()[k]];
            dots<T>(index(), n, [&](int64_t e) { return write_rows() + e * 2 * Mp; }, plain, g(t), 2 * mv, T(1), dz);
            encoder.adjoint(t, dz, dv, dcurrent);
            add(total, dcurrent, encoder.nv);
            if (t % T_ == 0) {
                const int64_t pair = (sample * o.pairs + t / T_) * E;
                for (int64_t e = 0; e < E; ++e) {
                    tensors.grad_features[pair + e] = total[e];
                    tensors.grad_labels[pair + e] = total[Ep + e];
                }
                std::fill_n(total, 2 * Ep, T(0));
            }
        }
        weight_grads(begin, end);
    }

    // Adds the adjoint of the drive at each step to the rows of the encoding neurons that fired: the adjoint of `sum_rows`.
    void weight_grads(int64_t begin, int64_t end) {
        for (int64_t t = end - 1; t >= begin; --t) {
            if (t + period < end) add(g(t), g(t + period), 2 * mv);
            each_change(t, write_grads(), [&](T* row, T sign) { add(row, g(t), 2 * mv, sign); });
        }
    }
};

// ---------------------------------------------------------------------------------------------------------- the batch

constexpr int MAX_CHUNKS = 64;  // of the batch; each sums its own weight gradients, so that the number of threads does not matter

// Runs `body` on several threads; it is given a function that calls run(part, first sample, end) for parts of the batch.
template <class Body> void in_parallel(const Options& o, const Body& body) {
    const int64_t parts = std::min<int64_t>(o.batch, MAX_CHUNKS);
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    const auto work = [&] {
        const FlushToZero flush;
        try {
            body([&](const auto& run) {
                for (int64_t part; !failed && (part = next++) < parts;) run(part, part * o.batch / parts, (part + 1) * o.batch / parts);
            });
        } catch (const std::bad_alloc&) {
            failed = true;
        }
    };
    std::vector<std::thread> threads;
    for (int64_t i = 1; i < std::min(o.threads, parts); ++i) threads.emplace_back(work);
    work();
    for (auto& thread : threads) thread.join();
    if (failed) throw std::bad_alloc();
}

template <class T> struct Call {
    static int padded(int64_t n) { return (n + LANES<T> - 1) / LANES<T> * LANES<T>; }
    static Weights<T> blank(const Options& o) { return Weights<T>(padded(o.embedding), padded(o.memory)); }
    static Weights<T> load(const Options& o, const Tensors<T>& tensors) {
        Weights<T> weights = blank(o);
        weights.each(o, tensors.write_weight, tensors.read_weight, [](const T& weight, T& here) { here = weight; });
        return weights;
    }

    static void forward(const Options& o, const Tensors<T>& tensors) {
        Weights<T> weights = load(o, tensors);
        in_parallel(o, [&](const auto& each_part) {
            Sample<T> sample(o, tensors, weights);
            each_part([&](int64_t, int64_t first, int64_t end) {
                for (int64_t b = first; b < end; ++b) {
                    sample.forward(b, false);
                    sample.store_results();
                    if (tensors.spikes) sample.record();
                }
            });
        });
    }

    static void backward(const Options& o, const Tensors<T>& tensors) {
        Weights<T> weights = load(o, tensors);
        std::vector<std::unique_ptr<Weights<T>>> grads(MAX_CHUNKS);
        in_parallel(o, [&](const auto& each_part) {
            Sample<T> sample(o, tensors, weights);
            each_part([&](int64_t part, int64_t first, int64_t end) {
                grads[part] = std::make_unique<Weights<T>>(blank(o));
                for (int64_t b = first; b < end; ++b) {
                    sample.forward(b, true);
                    sample.backward(*grads[part]);
                }
            });
        });
        for (auto& part : grads)
            if (part) part->each(o, tensors.grad_write_weight, tensors.grad_read_weight, [](T& grad, const T& here) { grad += here; });
    }
};

template <class Body> int guarded(const Body& body) {
    try {
        body();
        return 0;
    } catch (...) {
        return 1;
    }
}

}  // namespace

extern "C" {
int forward_float32(const Options* o, const Tensors<float>* t) { return guarded([&] { Call<float>::forward(*o, *t); }); }
int forward_float64(const Options* o, const Tensors<double>* t) { return guarded([&] { Call<double>::forward(*o, *t); }); }
int backward_float32(const Options* o, const Tensors<float>* t) { return guarded([&] { Call<float>::backward(*o, *t); }); }
int backward_float64(const Options* o, const Tensors<double>* t) { return guarded([&] { Call<double>::backward(*o, *t); }); }
}
