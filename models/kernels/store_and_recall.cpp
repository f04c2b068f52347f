// Forward and backward of models/kernels/reference.py, sample by sample in cache.
//
// Four facts make it fast:
//   1. Spikes are rare: a product with spikes is a sum of the weight rows of the neurons that fired, and the adjoint of a
//      spike is needed only where the surrogate derivative is not zero.
//   2. Between two spikes of key j nothing but the value traces acts on its column of the memory, and the column is needed
//      only when the key fires. So it stays behind in time and is brought up to date, in registers, when its key fires.
//   3. Until key j has fired its column is zero.
//   4. The loss sees a column only through the spikes of its key: after the last one its adjoint is zero.
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
    const T *grad_readout, *grad_counts;
    T *grad_features, *grad_labels, *grad_query, *grad_write_weight, *grad_read_weight;
};

namespace {

// ---------------------------------------------------------------------------------------------------------- vectors

constexpr int VECTOR_BYTES = 64;
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
#else
    uint32_t b = 0;
    for (int i = 0; i < LANES<float>; ++i) b |= uint32_t(v[i] & 1) << i;
    return b;
#endif
}
inline uint32_t bits(IntVec<double> v) {
#if defined(__AVX512DQ__)
    return _mm512_movepi64_mask((__m512i)v);
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
    // The neurons `first` + i for every bit i.
    void add(uint32_t bits, int first) {
        for (; bits; bits &= bits - 1) neurons()[size++] = first + __builtin_ctz(bits);
    }
    void end_step(int64_t t) { ends()[t + 1] = size; }
    const int32_t* begin(int64_t t) { return neurons() + ends()[t]; }
    const int32_t* end(int64_t t) { return neurons() + ends()[t + 1]; }
};

// The indices at which a padded row is not zero.
template <class T> int nonzeros(const T* row, int nv, int32_t* index) {
    int n = 0;
    for (int b = 0; b < nv; ++b)
        for (uint32_t some = bits(vec(row)[b] != Vec<T>{}); some; some &= some - 1)
            index[n++] = b * LANES<T> + __builtin_ctz(some);
    return n;
}

// A population of LIF neurons and, for the backward, what every step's adjoint needs.
template <class T> struct Lif {
    using V = Vec<T>;
    const T alpha, thr, inverse_thr, slope_at_thr, refractory;
    const bool perfect_reset;
    const int nv;
    bool keep = false;
    Buffer<T> carried, wait, count;   // alpha v minus the reset; steps without firing left; spikes so far
    Buffer<T> slopes, carries, resets;
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
        if (keep) slopes.get(steps * width());
        if (keep && perfect_reset) carries.get(steps * width()), resets.get(steps * width());
    }

    // One step.
    void step(int64_t t, const T* current) {
        const V zero = {}, one = zero + 1;
        for (int b = 0; b < nv; ++b) {
            const V v = vec(carried())[b] + (1 - alpha) * vec(current)[b];
            const V r = vec(wait())[b];
            const V u = (v - thr) * inverse_thr;
            const auto may_fire = r == zero, fires = (u > zero) & may_fire;
            const V z = fires ? one : zero;
            const V reset = perfect_reset ? alpha * v : zero + thr;
            vec(carried())[b] = fires ? alpha * v - reset : alpha * v;
            vec(wait())[b] = may_fire ? refractory * z : r - 1;
            vec(count())[b] += z;
            spikes.add(bits(fires), b * LANES<T>);
            if (keep) {
                const V height = 1 - (u < zero ? -u : u);
                vec(slope(t))[b] = may_fire & (height > zero) ? slope_at_thr * height : zero;
                if (perfect_reset) vec(carries())[t * nv + b] = alpha * (1 - z), vec(resets())[t * nv + b] = reset;
            }
        }
        spikes.end_step(t);
    }

    // One step of the adjoint: `dv` from dL/dv(t+1) to dL/dv(t), given that of z(t).
    void adjoint(int64_t t, const T* dz, T* dv) {
        for (int b = 0; b < nv; ++b) {
            V carry = {}, reset = {};
            if (perfect_reset) carry = vec(carries())[t * nv + b], reset = vec(resets())[t * nv + b];
            else carry += alpha, reset += thr;
            const V next = vec(dv)[b];
            vec(dv)[b] = carry * next + vec(slope(t))[b] * (vec(dz)[b] - reset * next);
        }
    }
};

// ----------------------------------------------------------------------------------------------------------- products

constexpr int TILE = 2;  // vectors of a weight row taken at a time, so that the tile of all rows stays in first-level cache

// The sum of the rows of the neurons that fired, for steps begin to end: out[t] = sum of rows[j], each of nv vectors.
template <class T> void sum_rows(SpikeTrain& spikes, int64_t begin, int64_t end, const T* rows, int nv, T* out) {
    using V = Vec<T>;
    for (int tile = 0; tile < nv; tile += TILE)
        for (int64_t t = begin; t < end; ++t) {
            V total[TILE] = {};
            for (const int32_t *j = spikes.begin(t), *last = spikes.end(t); j != last; ++j)
                for (int b = 0; b < TILE; ++b) total[b] += vec(rows)[int64_t(*j) * nv + tile + b];
            for (int b = 0; b < TILE; ++b) vec(out)[(t - begin) * nv + tile + b] = total[b];
        }
}

template <class T> void add(T* to, const T* from, int nv) {
    for (int b = 0; b < nv; ++b) vec(to)[b] += vec(from)[b];
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
constexpr int BLOCK = 128;                          // steps of the encoding population taken together; whole chunks

// What the updates of one chunk have of their key: one entry a step.
template <class T> struct KeyTrace {
    alignas(VECTOR_BYTES) T kappa[CHUNK<T>], c[CHUNK<T>], d[CHUNK<T>], h[CHUNK<T>];
    KeyTrace(const T* trace, T gamma_neg) {
        const Vec<T> k = *vec(trace), decayed = 1 - gamma_neg * k * k;
        *vec(kappa) = k, *vec(c) = decayed, *vec(d) = 1 - decayed, *vec(h) = 2 * gamma_neg * k;
    }
};

// N vectors of a column through the updates of steps begin to end of a chunk; `visit(s, x)` sees it before each.
template <class T, int N, class Visit>
inline void update(Vec<T>* column, const KeyTrace<T>& key, const T* gnu, int nv, int begin, int end, const Visit& visit) {
    Vec<T> x[N];
    for (int b = 0; b < N; ++b) x[b] = column[b];
    for (int s = begin; s < end; ++s) {
        visit(s, x);
        const Vec<T>* trace = vec(gnu) + s * nv;
        for (int b = 0; b < N; ++b) x[b] = x[b] * (key.c[s] - key.kappa[s] * trace[b]) + key.d[s];
    }
    for (int b = 0; b < N; ++b) column[b] = x[b];
}

// The adjoint of `update`, from step `end` back to `begin`, for dL/dW_j / w_max = -dL/dx in `adjoint`. Adds to dL/d nu in
// `dnu`, and the terms of dL/d kappa (to be summed over lanes) in `dkappa`.
template <class T, int N>
inline void update_adjoint(Vec<T>* adjoint, const Vec<T>* replayed, const KeyTrace<T>& key, const T* gnu, T* dnu, int nv, int begin,
                           int end, Vec<T>* dkappa) {
    Vec<T> a[N];
    for (int b = 0; b < N; ++b) a[b] = adjoint[b];
    for (int s = end - 1; s >= begin; --s) {
        const Vec<T>*trace = vec(gnu) + s * nv, *x = replayed + s * nv;
        Vec<T>* to = vec(dnu) + s * nv;
        Vec<T> direct = {}, through_decay = {};
        for (int b = 0; b < N; ++b) {
            const Vec<T> p = a[b] * x[b];
            to[b] += p * key.kappa[s];
            direct += p * (trace[b] + key.h[s]);
            through_decay += a[b];
            a[b] *= key.c[s] - key.kappa[s] * trace[b];
        }
        dkappa[s] += direct - key.h[s] * through_decay;
    }
    for (int b = 0; b < N; ++b) adjoint[b] = a[b];
}

// One sample, run forward and, if asked, backward: the working memory of a thread. N: vectors of a column held in registers.
template <class T, int N> class Sample {
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
    bool keep = false;

    Lif<T> encoder, query, keys, values, read_keys, read_values;
    Buffer<T> current, drive, readout;
    Buffer<T> x_;            // [key][value], 1 - W / w_max
    Buffer<T> traces;        // [key][steps], kappa
    Buffer<T> trace_rows;    // [chunk step][key]
    Buffer<T> gnu_;          // [steps][value], gamma_pos nu
    Buffer<T> checkpoints;   // [chunk][key][value], x at the start of the chunk
    Buffer<int64_t> up_to_, first_spike_;
    // backward
    Buffer<T> mu_;           // [key][value], dL/dW / w_max
    Buffer<T> replay_;       // [key][chunk step][value], x before each step
    Buffer<T> dnu_, g_, dz_, dv_, dquery_, dkappa_, through_memory, sums_of_keys, count_grads, encoder_dv;
    Buffer<int32_t> index, times;
    Buffer<uint32_t> fired_bits;
    std::vector<char> seen;  // whether anything later in time sees column j

    T* x(int64_t j) { return x_() + j * Mp; }
    T* trace(int64_t j) { return traces() + j * chunks * C; }
    T* gnu(int64_t t) { return gnu_() + t * Mp; }
    T* mu(int64_t j) { return mu_() + j * Mp; }
    T* checkpoint(int64_t chunk, int64_t j) { return checkpoints() + (chunk * M + j) * Mp; }
    T* replay(int64_t j) { return replay_() + j * C * Mp; }
    T* g(int64_t t) { return g_() + t % BLOCK * 2 * Mp; }  // adjoint of the currents of keys and values, for a block
    int64_t& up_to(int64_t j) { return up_to_()[j]; }          // the step before which column j stands
    int64_t& first_spike(int64_t j) { return first_spike_()[j]; }  // or `steps`

public:
    Sample(const Options& o, const Tensors<T>& tensors, Weights<T>& weights)
        : o(o), tensors(tensors), weights(weights), E(o.embedding), M(o.memory), T_(o.num_time_steps),
          steps(o.pairs * o.num_time_steps), chunks((steps + C - 1) / C), Ep(weights.Ep), Mp(weights.Mp), mv(Mp / LANES<T>),
          alpha(o.alpha), beta(o.beta), gamma_pos(o.gamma_pos), gamma_neg(o.gamma_neg), w_max(o.w_max),
          feedback(o.memory_feedback * o.w_max), encoder(o, 2 * Ep), query(o, Ep), keys(o, Mp), values(o, Mp),
          read_keys(o, Mp), read_values(o, Mp) {}

    void forward(int64_t b, bool keep_trajectory) {
        sample = b;
        keep = keep_trajectory;
        write();
        read();
    }

    void store_results() {
        std::copy_n(readout(), M, tensors.readout + sample * M);
        T* to = tensors.counts + sample * (3 * E + 4 * M);
        auto append = [&](const T* from, int64_t n) { to = std::copy_n(from, n, to); };
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
        index.get(std::max(2 * Ep, Mp));
        read_adjoint(grads);
        write_adjoint(grads);
    }

private:
    // ------------------------------------------------------------------------------------------------------- forward

    // Applies to column j all updates before step t.
    void catch_up(int64_t j, int64_t t) {
        if (first_spike(j) >= t) return;
        while (up_to(j) < t) {
            const int64_t start = up_to(j) / C * C, end = std::min(t, start + C);
            const KeyTrace<T> key(trace(j) + start, gamma_neg);
            for (int b = 0; b < mv; b += N)
                update<T, N>(vec(x(j)) + b, key, gnu(start) + b * LANES<T>, mv, up_to(j) - start, end - start, [](int, V*) {});
            up_to(j) = end;
        }
    }

    void write() {
        encoder.rest(steps, keep), keys.rest(steps, keep), values.rest(steps, keep);
        x_.filled(M * Mp, 1);
        gnu_.zeros(chunks * C * Mp);
        traces.get(Mp * chunks * C);
        trace_rows.zeros((C + 1) * Mp);
        up_to_.zeros(M);
        first_spike_.filled(M, steps);
        drive.get(BLOCK * 2 * Mp);
        if (keep) checkpoints.get(chunks * M * Mp);
        for (int64_t block = 0; block < steps; block += BLOCK) {
            const int64_t end = std::min(steps, block + BLOCK);
            encode(block, end);
            sum_rows(encoder.spikes, block, end, weights.write(), 2 * mv, drive());
            for (int64_t start = block; start < end; start += C) write_chunk(start, std::min(end, start + C));
        }
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
        }
    }

    void write_chunk(int64_t start, int64_t end) {
        T* now = drive() + start % BLOCK * 2 * Mp;
        fire_keys(start, end, now);
        if (keep) std::copy_n(x_(), M * Mp, checkpoint(start / C, 0));
        for (int64_t t = start; t < end; ++t) {
            T* value_drive = now + (t - start) * 2 * Mp + Mp;
            for (auto j = keys.spikes.begin(t); j != keys.spikes.end(t); ++j) {
                if (first_spike(*j) == t) up_to(*j) = t;
                catch_up(*j, t);
                for (int b = 0; b < mv; ++b) vec(value_drive)[b] += feedback * (1 - vec(x(*j))[b]);
            }
            fire_values(t, value_drive);
        }
        if (keep)
            for (int64_t j = 0; j < M; ++j) catch_up(j, end);
    }

    // Keys and their traces, which do not depend on the memory.
    void fire_keys(int64_t start, int64_t end, const T* key_drive) {
        T* last = trace_rows() + C * Mp;
        for (int s = 0; s < C; ++s) {
            T* row = trace_rows() + s * Mp;
            const T* before = s ? row - Mp : last;
            if (start + s >= end) {
                std::fill_n(row, Mp, T(0));
                continue;
            }
            keys.step(start + s, key_drive + s * 2 * Mp);
            for (int b = 0; b < mv; ++b) vec(row)[b] = beta * vec(before)[b];
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
            for (int k = 0; k < LANES<T>; ++k) *vec(trace(b * LANES<T> + k) + start) = square[k];
        }
    }

    void fire_values(int64_t t, const T* value_drive) {
        values.step(t, value_drive);
        T* row = gnu(t);
        for (int b = 0; b < mv; ++b) {
            V before = {};
            if (t > 0) before = vec(row - Mp)[b];
            vec(row)[b] = beta * before;
        }
        for (auto i = values.spikes.begin(t); i != values.spikes.end(t); ++i) row[*i] += gamma_pos * (1 - beta);
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
                catch_up(*j, steps);
                for (int b = 0; b < mv; ++b) vec(sum)[b] += w_max * (1 - vec(x(*j))[b]);
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
                dots<T>(index(), nonzeros(read_values.slope(t), mv, index()), [&](int64_t i) { return weights.feedback() + i * Mp; },
                     plain, dkeys + then * Mp, mv, T(1), dz);
            read_values.adjoint(t, dz, dv_values);
            for (int b = 0; b < mv; ++b) vec(dvalues)[b] = (1 - alpha) * vec(dv_values)[b];

            std::copy_n(count_grad(READ_KEYS), Mp, dz);
            const int n = nonzeros(read_keys.slope(t), mv, index());
            for (int k = 0; k < n; ++k) if (index()[k] < M) catch_up(index()[k], steps);
            dots<T>(index(), std::remove_if(index(), index() + n, [&](int64_t j) { return j >= M; }) - index(), [&](int64_t j) { return x(j); },
                 [](V x) { return 1 - x; }, dvalues, mv, w_max, dz);
            for (auto j = read_keys.spikes.begin(t); j != read_keys.spikes.end(t); ++j)
                for (int b = 0; b < mv; ++b) vec(mu(*j))[b] += w_max * vec(dvalues)[b];
            read_keys.adjoint(t, dz, dv_keys);
            T* dkey = dkeys + t * Mp;
            for (int b = 0; b < mv; ++b) vec(dkey)[b] = (1 - alpha) * vec(dv_keys)[b];
            if (const int64_t then = t - o.readout_delay; then >= 0)
                for (auto i = read_values.spikes.begin(then); i != read_values.spikes.end(then); ++i)
                    add(grads.feedback() + *i * Mp, dkey, mv);
            for (auto e = query.spikes.begin(t); e != query.spikes.end(t); ++e) add(grads.query() + *e * Mp, dkey, mv);

            std::copy_n(count_grad(QUERY), Ep, dz);
            dots<T>(index(), nonzeros(query.slope(t), query.nv, index()), [&](int64_t e) { return weights.query() + e * Mp; }, plain,
                 dkey, mv, T(1), dz);
            query.adjoint(t, dz, dv_query);
            for (int b = 0; b < query.nv; ++b) vec(dquery)[b] += (1 - alpha) * vec(dv_query)[b];
        }
        std::copy_n(dquery, E, tensors.grad_query + sample * E);
    }

    void write_adjoint(Weights<T>& grads) {
        dnu_.get((C + 1) * Mp);
        dkappa_.get((C + 1) * Mp);
        std::fill_n(dnu_() + C * Mp, Mp, T(0));
        std::fill_n(dkappa_() + C * Mp, Mp, T(0));
        replay_.get(M * C * Mp);
        through_memory.get(C * Mp);
        sums_of_keys.get(C * Mp * LANES<T>);
        dz_.get(std::max(Mp, 2 * Ep));
        dv_.zeros(2 * Mp);
        encoder_dv.zeros(4 * Ep);
        fired_bits.get(Mp);
        seen.assign(M, 0);
        for (int64_t j = 0; j < M; ++j) seen[j] = read_keys.count()[j] > 0;
        for (int64_t block = (steps - 1) / BLOCK * BLOCK; block >= 0; block -= BLOCK) {
            const int64_t end = std::min(steps, block + BLOCK);
            for (int64_t start = (end - 1) / C * C; start >= block; start -= C) chunk_adjoint(start, std::min(end, start + C));
            encoder_adjoint(block, end, grads);
        }
    }

    // Adjoint of column j from step `end` of the chunk back to `begin`.
    void column_adjoint(int64_t start, int64_t j, int begin, int end) {
        const KeyTrace<T> key(trace(j) + start, gamma_neg);
        V* dkappa = vec(sums_of_keys()) + j * C;
        for (int b = 0; b < mv; b += N)
            update_adjoint<T, N>(vec(mu(j)) + b, vec(replay(j)) + b, key, gnu(start) + b * LANES<T>, dnu_() + b * LANES<T>, mv, begin,
                                 end, dkappa);
    }
    // Before its first spike column j is zero and its adjoint constant.
    void silent_adjoint(int64_t start, int64_t j) {
        V* dkappa = vec(sums_of_keys()) + j * C;
        for (int s = 0; s < C; ++s)
            for (int b = 0; b < mv; ++b) dkappa[s] += vec(mu(j))[b] * vec(gnu(start + s))[b];
    }
    // The step of the last spike of key j before step s of the chunk, or 0.
    int spike_before(int64_t j, int s) {
        const uint32_t before = fired_bits()[j] & ((1u << s) - 1);
        return before ? 31 - __builtin_clz(before) : 0;
    }

    void chunk_adjoint(int64_t start, int64_t end) {
        std::fill_n(dnu_(), C * Mp, T(0));
        std::fill_n(through_memory(), C * Mp, T(0));
        std::fill_n(fired_bits(), Mp, 0u);
        for (int64_t t = start; t < end; ++t)
            for (auto j = keys.spikes.begin(t); j != keys.spikes.end(t); ++j) fired_bits()[*j] |= 1u << (t - start);
        std::fill_n(sums_of_keys(), M * C * LANES<T>, T(0));
        for (int64_t j = 0; j < M; ++j) {
            if (first_spike(j) >= end) {
                if (seen[j]) silent_adjoint(start, j);
                continue;
            }
            const KeyTrace<T> key(trace(j) + start, gamma_neg);
            for (int b = 0; b < mv; b += N)
                update<T, N>(vec(checkpoint(start / C, j)) + b, key, gnu(start) + b * LANES<T>, mv, 0, C, [&](int s, V* x) {
                    for (int k = 0; k < N; ++k) vec(replay(j))[s * mv + b + k] = x[k];
                });
            if (seen[j]) column_adjoint(start, j, spike_before(j, C), C);
        }
        T *dv_keys = dv_(), *dv_values = dv_() + Mp;
        for (int64_t t = end - 1; t >= start; --t) {
            const int s = t - start;
            T *dz = dz_(), *dnu = dnu_() + s * Mp, *dnu_later = t + 1 == end ? dnu_() + C * Mp : dnu + Mp, *dvalues = g(t) + Mp;
            for (int b = 0; b < mv; ++b) {
                vec(dnu)[b] += beta * vec(dnu_later)[b];
                vec(dz)[b] = vec(count_grad(VALUES))[b] + gamma_pos * (1 - beta) * vec(dnu)[b];
            }
            values.adjoint(t, dz, dv_values);
            for (int b = 0; b < mv; ++b) vec(dvalues)[b] = (1 - alpha) * vec(dv_values)[b];
            int n = nonzeros(keys.slope(t), mv, index());
            n = std::remove_if(index(), index() + n, [&](int64_t j) { return j >= M || first_spike(j) >= t; }) - index();
            dots<T>(index(), n, [&](int64_t j) { return replay(j) + s * Mp; }, [](V x) { return 1 - x; }, dvalues, mv, feedback,
                 through_memory() + s * Mp);
            for (auto j = keys.spikes.begin(t); j != keys.spikes.end(t); ++j) {
                for (int b = 0; b < mv; ++b) vec(mu(*j))[b] += feedback * vec(dvalues)[b];
                seen[*j] = 1;
                column_adjoint(start, *j, spike_before(*j, s), s);
            }
        }
        std::copy_n(dnu_(), Mp, dnu_() + C * Mp);
        for (int b = 0; b < mv; ++b) {
            V square[C];
            for (int k = 0; k < LANES<T>; ++k) {
                const int64_t j = b * LANES<T> + k;
                square[k] = V{};
                if (j < M) square[k] = sums<T>(vec(sums_of_keys()) + j * C);
            }
            transpose<T>(square);
            for (int s = 0; s < C; ++s) vec(dkappa_())[s * mv + b] = square[s];
        }
        for (int64_t t = end - 1; t >= start; --t) {
            const int s = t - start;
            T *dz = dz_(), *dkappa = dkappa_() + s * Mp, *dkappa_later = t + 1 == end ? dkappa_() + C * Mp : dkappa + Mp;
            for (int b = 0; b < mv; ++b) {
                vec(dkappa)[b] += beta * vec(dkappa_later)[b];
                vec(dz)[b] = vec(count_grad(KEYS))[b] + (1 - beta) * vec(dkappa)[b] + vec(through_memory())[s * mv + b];
            }
            keys.adjoint(t, dz, dv_keys);
            for (int b = 0; b < mv; ++b) vec(g(t))[b] = (1 - alpha) * vec(dv_keys)[b];
        }
        std::copy_n(dkappa_(), Mp, dkappa_() + C * Mp);
    }

    void encoder_adjoint(int64_t begin, int64_t end, Weights<T>& grads) {
        weight_grads(begin, end, grads);
        T *dz = dz_(), *dv = encoder_dv(), *total = dv + 2 * Ep;
        const auto plain = [](V w) { return w; };
        for (int64_t t = end - 1; t >= begin; --t) {
            const int n = nonzeros(encoder.slope(t), encoder.nv, index());
            for (int k = 0; k < n; ++k) dz[index()[k]] = count_grad(FEATURES)[index()[k]];
            dots<T>(index(), n, [&](int64_t e) { return weights.write() + e * 2 * Mp; }, plain, g(t), 2 * mv, T(1), dz);
            encoder.adjoint(t, dz, dv);
            add(total, dv, encoder.nv);
            if (t % T_ == 0) {
                const int64_t pair = (sample * o.pairs + t / T_) * E;
                for (int64_t e = 0; e < E; ++e) {
                    tensors.grad_features[pair + e] = (1 - alpha) * total[e];
                    tensors.grad_labels[pair + e] = (1 - alpha) * total[Ep + e];
                }
                std::fill_n(total, 2 * Ep, T(0));
            }
        }
    }

    // Adds the adjoint of the drive at each step to the rows of the encoding neurons that fired.
    void weight_grads(int64_t begin, int64_t end, Weights<T>& grads) {
        times.get(2 * Ep * BLOCK);
        std::vector<int> n(2 * Ep, 0);
        for (int64_t t = begin; t < end; ++t)
            for (auto e = encoder.spikes.begin(t); e != encoder.spikes.end(t); ++e) times()[*e * BLOCK + n[*e]++] = t - begin;
        for (int tile = 0; tile < 2 * mv; tile += TILE)
            for (int e = 0; e < 2 * Ep; ++e) {
                V* to = vec(grads.write()) + int64_t(e) * 2 * mv + tile;
                V sum[TILE];
                for (int b = 0; b < TILE; ++b) sum[b] = to[b];
                for (int k = 0; k < n[e]; ++k)
                    for (int b = 0; b < TILE; ++b) sum[b] += vec(g_())[int64_t(times()[e * BLOCK + k]) * 2 * mv + tile + b];
                for (int b = 0; b < TILE; ++b) to[b] = sum[b];
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

template <class T, int N> struct Call {
    static int padded(int64_t n, int vectors) {
        const int unit = vectors * LANES<T>;
        return (n + unit - 1) / unit * unit;
    }
    static Weights<T> blank(const Options& o) { return Weights<T>(padded(o.embedding, 1), padded(o.memory, N)); }
    static Weights<T> load(const Options& o, const Tensors<T>& tensors) {
        Weights<T> weights = blank(o);
        weights.each(o, tensors.write_weight, tensors.read_weight, [](const T& weight, T& here) { here = weight; });
        return weights;
    }

    static void forward(const Options& o, const Tensors<T>& tensors) {
        Weights<T> weights = load(o, tensors);
        in_parallel(o, [&](const auto& each_part) {
            Sample<T, N> sample(o, tensors, weights);
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
            Sample<T, N> sample(o, tensors, weights);
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

// Calls `run` with the number of vectors of a column to hold in registers that wastes least of the last ones.
template <class T, class Run> int dispatch(const Options& o, const Run& run) try {
    const int64_t vectors = (o.memory + LANES<T> - 1) / LANES<T>;
    if (vectors == 1) run(std::integral_constant<int, 1>());
    else if (vectors == 2) run(std::integral_constant<int, 2>());
    else if (vectors <= 4) run(std::integral_constant<int, 4>());
    else run(std::integral_constant<int, 7>());
    return 0;
} catch (...) {
    return 1;
}

}  // namespace

extern "C" {
int forward_float32(const Options* o, const Tensors<float>* t) {
    return dispatch<float>(*o, [&](auto n) { Call<float, n>::forward(*o, *t); });
}
int forward_float64(const Options* o, const Tensors<double>* t) {
    return dispatch<double>(*o, [&](auto n) { Call<double, n>::forward(*o, *t); });
}
int backward_float32(const Options* o, const Tensors<float>* t) {
    return dispatch<float>(*o, [&](auto n) { Call<float, n>::backward(*o, *t); });
}
int backward_float64(const Options* o, const Tensors<double>* t) {
    return dispatch<double>(*o, [&](auto n) { Call<double, n>::backward(*o, *t); });
}
}
