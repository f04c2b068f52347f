// Forward and backward of models/kernels/reference.py, sample by sample in cache.
//
// Four facts make it fast:
//   1. Spikes are rare: a product with spikes is a sum of the weight rows of the neurons that fired, and the adjoint of a
//      spike is needed only where the surrogate derivative is not zero.
//   2. Between two spikes of key j nothing but the value traces acts on its column of the memory, which is needed only when
//      the key fires. So a column stays behind in time and is brought up to date, in registers, when its key fires.
//   3. Until key j has fired its column is zero.
//   4. The loss sees a column only through the spikes of its key: after the last one its adjoint is zero.
// The backward replays a sample from its input currents, keeps each column at the start of each of its segments (the
// stretch between two spikes, cut to at most SEGMENT steps), and replays the steps within.
//
// The memory is held as x = 1 - W / w_max, stored [key][value], so that one Hebbian update is two fused multiply-adds:
//   x' = x (c_j - kappa_j gamma_pos nu_i) + (1 - c_j),   c_j = 1 - gamma_neg kappa_j^2.
// With 1 - c_j taken from the rounded c_j, a weight whose value neuron never fired stays exactly 0.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
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

namespace {

constexpr int VECTOR_BYTES = 64;
constexpr int SEGMENT = 16;     // steps
constexpr int MAX_CHUNKS = 64;  // of the batch; each sums its own weight gradients

template <class T> constexpr int LANES = VECTOR_BYTES / sizeof(T);
template <class T> struct VectorOf { typedef T type __attribute__((vector_size(VECTOR_BYTES))); };
template <class T> using Vec = typename VectorOf<T>::type;

template <class T> int vectors(int64_t n) { return (n + LANES<T> - 1) / LANES<T>; }
template <class T> Vec<T>* vec(T* p) { return reinterpret_cast<Vec<T>*>(p); }
template <class T> const Vec<T>* vec(const T* p) { return reinterpret_cast<const Vec<T>*>(p); }

template <class T> T sum(Vec<T> v) {
    T s = 0;
    for (int i = 0; i < LANES<T>; ++i) s += v[i];
    return s;
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

// An array aligned to vectors. Grows to the largest size asked for.
template <class T> class Buffer {
    struct Free { void operator()(T* p) const { std::free(p); } };
    std::unique_ptr<T, Free> data;
    size_t size = 0;
public:
    T* get(size_t n) {
        if (n > size) {
            size_t bytes = (n * sizeof(T) + VECTOR_BYTES - 1) / VECTOR_BYTES * VECTOR_BYTES;
            data.reset();
            data.reset(static_cast<T*>(std::aligned_alloc(VECTOR_BYTES, bytes)));
            if (!data) throw std::bad_alloc();
            size = n;
        }
        return data.get();
    }
    T* zeros(size_t n) {
        T* p = get(n);
        std::fill_n(p, n, T(0));
        return p;
    }
    void grow(size_t n) {  // keeps the contents
        if (n <= size) return;
        Buffer bigger;
        T* p = bigger.get(std::max(n, 2 * size));
        if (size) std::copy_n(data.get(), size, p);
        std::swap(*this, bigger);
    }
    T* operator()() { return data.get(); }
};

// Which neurons fired, step by step.
struct SpikeTrain {
    std::vector<int32_t> neurons;
    std::vector<size_t> begins;
    void clear() { neurons.clear(); begins.assign(1, 0); }
    void end_step() { begins.push_back(neurons.size()); }
    const int32_t* begin(int64_t t) const { return neurons.data() + begins[t]; }
    const int32_t* end(int64_t t) const { return neurons.data() + begins[t + 1]; }
};

// A population of LIF neurons: its state, and for the backward what each step's adjoint needs.
template <class T> struct Lif {
    using V = Vec<T>;
    T alpha, thr, inv_thr, slope_at_thr, refractory;
    bool perfect_reset, keep = false;
    int nv;
    Buffer<T> state, slopes, carries, resets;
    SpikeTrain spikes;

    Lif(const Options& o, int width)
        : alpha(o.alpha), thr(o.thr), inv_thr(1 / o.thr), slope_at_thr(o.dampening_factor / o.thr),
          refractory(o.refractory_time_steps), perfect_reset(o.perfect_reset), nv(width / LANES<T>) {}

    T* v() { return state(); }
    T* z() { return state() + nv * LANES<T>; }
    T* r() { return state() + 2 * nv * LANES<T>; }
    T* count() { return state() + 3 * nv * LANES<T>; }
    T* slope(int64_t t) { return slopes() + t * nv * LANES<T>; }  // dz/dv

    void rest(int64_t steps, bool keep_trajectory) {
        keep = keep_trajectory;
        state.zeros(4 * nv * LANES<T>);
        spikes.clear();
        if (keep) slopes.get(steps * nv * LANES<T>);
        if (keep && perfect_reset) carries.get(steps * nv * LANES<T>), resets.get(steps * nv * LANES<T>);
    }

    // One step; adds the neurons that fire to `spikes`.
    void step(int64_t t, const T* current) {
        V *vs = vec(v()), *zs = vec(z()), *rs = vec(r()), *counts = vec(count());
        const V zero = {}, one = zero + T(1);
        for (int b = 0; b < nv; ++b) {
            V z = zs[b], r = rs[b];
            V input = (1 - alpha) * vec(current)[b];
            V membrane = perfect_reset ? alpha * vs[b] * (1 - z) + input : alpha * vs[b] + input - thr * z;
            V u = (membrane - thr) * inv_thr;
            auto may_fire = r == zero;
            auto fires = (u > zero) & may_fire;
            zs[b] = fires ? one : zero;
            vs[b] = membrane;
            rs[b] = r > zero ? r - 1 : refractory * zs[b];
            counts[b] += zs[b];
            if (keep) {
                V height = 1 - (u < zero ? -u : u);
                vec(slope(t))[b] = may_fire & (height > zero) ? slope_at_thr * height : zero;
                if (perfect_reset) {
                    vec(carries())[t * nv + b] = alpha * (1 - zs[b]);
                    vec(resets())[t * nv + b] = alpha * membrane;
                }
            }
        }
        for (int i = 0; i < nv * LANES<T>; ++i)
            if (z()[i] != 0) spikes.neurons.push_back(i);
        spikes.end_step();
    }

    // One step of the adjoint: from dL/dv(t+1) in `dv` and the adjoint of z(t) to dL/dv(t) in `dv`, dL/d current(t).
    void adjoint(int64_t t, const T* dz, T* dv, T* dcurrent) {
        for (int b = 0; b < nv; ++b) {
            V carry = {}, reset = {};
            if (perfect_reset) carry = vec(carries())[t * nv + b], reset = vec(resets())[t * nv + b];
            else carry += alpha, reset += thr;
            V next = vec(dv)[b];
            vec(dv)[b] = carry * next + vec(slope(t))[b] * (vec(dz)[b] - reset * next);
            vec(dcurrent)[b] = (1 - alpha) * vec(dv)[b];
        }
    }
};

// A stretch of time in which one column of the memory changes by its traces alone.
template <class T> struct Segment {
    int32_t begin, end;  // steps whose updates it holds
    int64_t previous;    // the segment of the same key before this one, or -1
    T trace;             // kappa after step `begin`
    int32_t key;
    bool after_spike, first;  // whether the key fires at `begin`, and for the first time
};

// What every update of a segment has of the key.
template <class T> struct KeyTrace {
    T kappa[SEGMENT], c[SEGMENT];
    KeyTrace(T trace, int length, T beta, T gamma_neg) {
        for (int s = 0; s < length; ++s, trace *= beta) {
            kappa[s] = trace;
            c[s] = 1 - gamma_neg * trace * trace;
        }
    }
};

// Pointers to one call's tensors; those of gradients and recordings may be null.
template <class T> struct Tensors {
    const T *features, *labels, *query, *write_weight, *read_weight;
    T *readout, *counts, *spikes, *memory;
    const T *grad_readout, *grad_counts;
    T *grad_features, *grad_labels, *grad_query, *grad_write_weight, *grad_read_weight;
};

// The weights, transposed and padded, so that the row of a neuron that fired lies in whole vectors.
template <class T> struct Weights {
    int Ep, Mp;  // E and M, padded
    Buffer<T> write, query, feedback;  // [2 Ep][2 Mp], [Ep][Mp], [Mp][Mp]

    Weights(const Options& o, const T* write_weight, const T* read_weight)
        : Ep(vectors<T>(o.embedding) * LANES<T>), Mp(vectors<T>(o.memory) * LANES<T>) {
        allocate();
        const int64_t E = o.embedding, M = o.memory;
        for (int64_t half = 0; half < 2; ++half)
            for (int64_t i = 0; i < M; ++i)
                for (int64_t e = 0; e < 2 * E; ++e)
                    write()[column(e, E) * 2 * Mp + half * Mp + i] = write_weight[(half * M + i) * 2 * E + e];
        for (int64_t j = 0; j < M; ++j) {
            for (int64_t e = 0; e < E; ++e) query()[e * Mp + j] = read_weight[j * (E + M) + e];
            for (int64_t i = 0; i < M; ++i) feedback()[i * Mp + j] = read_weight[j * (E + M) + E + i];
        }
    }
    Weights(const Options& o)
        : Ep(vectors<T>(o.embedding) * LANES<T>), Mp(vectors<T>(o.memory) * LANES<T>) { allocate(); }

    void allocate() {
        write.zeros(4l * Ep * Mp);
        query.zeros(1l * Ep * Mp);
        feedback.zeros(1l * Mp * Mp);
    }
    int64_t column(int64_t e, int64_t E) const { return e < E ? e : Ep + e - E; }

    void add_to(const Options& o, T* write_weight, T* read_weight) {
        const int64_t E = o.embedding, M = o.memory;
        for (int64_t half = 0; half < 2; ++half)
            for (int64_t i = 0; i < M; ++i)
                for (int64_t e = 0; e < 2 * E; ++e)
                    write_weight[(half * M + i) * 2 * E + e] += write()[column(e, E) * 2 * Mp + half * Mp + i];
        for (int64_t j = 0; j < M; ++j) {
            for (int64_t e = 0; e < E; ++e) read_weight[j * (E + M) + e] += query()[e * Mp + j];
            for (int64_t i = 0; i < M; ++i) read_weight[j * (E + M) + E + i] += feedback()[i * Mp + j];
        }
    }
};

template <class T> void add(T* to, const T* from, int nv) {
    for (int b = 0; b < nv; ++b) vec(to)[b] += vec(from)[b];
}

template <class T> T dot(const T* a, const T* b, int nv) {
    Vec<T> s = {};
    for (int i = 0; i < nv; ++i) s += vec(a)[i] * vec(b)[i];
    return sum<T>(s);
}

// One sample, run forward and, if asked, backward. Holds the working memory of a thread.
template <class T> class Sample {
    using V = Vec<T>;
    const Options& o;
    const Tensors<T>& tensors;
    Weights<T>& weights;
    const int64_t E, M, T_, steps;  // steps: of writing
    const int Ep, Mp, mv;           // E and M padded, vectors of M
    const T beta, gamma_pos, gamma_neg, w_max, feedback;
    int64_t sample = 0;
    bool keep = false;

    Lif<T> encoder, query, keys, values, read_keys, read_values;
    Buffer<T> current, drive, gnu_, x_, trace_, readout;
    std::vector<Segment<T>> segments;
    std::vector<int64_t> last_segment, cursor, keys_fired_at;
    std::vector<int64_t> up_to;  // the step before which column j stands, -1 while it is zero
    Buffer<T> starts;            // column at the start of each segment
    // backward
    Buffer<T> mu_, dnu_, dkappa_, g_, dz_, dv_, out_, replay_, count_grads;

    T* x(int64_t j) { return x_() + j * Mp; }
    T* gnu(int64_t t) { return gnu_() + t * Mp; }      // gamma_pos nu after step t
    T* mu(int64_t j) { return mu_() + j * Mp; }        // adjoint of W_j / w_max
    T* dnu(int64_t t) { return dnu_() + t * Mp; }
    T* dkappa(int64_t t) { return dkappa_() + t * Mp; }
    T* g(int64_t t) { return g_() + t * 2 * Mp; }      // adjoint of the currents of keys and values

public:
    Sample(const Options& o, const Tensors<T>& tensors, Weights<T>& weights)
        : o(o), tensors(tensors), weights(weights), E(o.embedding), M(o.memory), T_(o.num_time_steps),
          steps(o.pairs * o.num_time_steps), Ep(weights.Ep), Mp(weights.Mp), mv(Mp / LANES<T>), beta(o.beta),
          gamma_pos(o.gamma_pos), gamma_neg(o.gamma_neg), w_max(o.w_max), feedback(o.memory_feedback * o.w_max),
          encoder(o, 2 * Ep), query(o, Ep), keys(o, Mp), values(o, Mp), read_keys(o, Mp), read_values(o, Mp) {}

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

    // Spikes of the population `index`, whose recordings follow one another in one array.
    void record() {
        T* to = tensors.spikes;
        auto append = [&](const SpikeTrain& spikes, int64_t length, int64_t first, int64_t n) {
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
            bring_up_to_date(j, steps);
            for (int64_t i = 0; i < M; ++i) memory[i * M + j] = w_max * (1 - x(j)[i]);
        }
    }

private:
    // Applies to column j the updates of all steps before t.
    void bring_up_to_date(int64_t j, int64_t t) {
        if (up_to[j] < 0) return;
        while (up_to[j] < t) {
            int64_t begin = up_to[j], end = std::min<int64_t>(t, begin + SEGMENT);
            if (keep) {
                segments.push_back({int32_t(begin), int32_t(end), last_segment[j], trace_()[j], int32_t(j),
                                    keys_fired_at[j] == begin, last_segment[j] < 0});
                last_segment[j] = segments.size() - 1;
                starts.grow(segments.size() * Mp);
                std::copy_n(x(j), Mp, starts() + (segments.size() - 1) * Mp);
            }
            KeyTrace<T> key(trace_()[j], end - begin, beta, gamma_neg);
            for (int b = 0; b < mv; ++b) {
                V column = vec(x(j))[b];
                for (int64_t s = begin; s < end; ++s) {
                    T kappa = key.kappa[s - begin], c = key.c[s - begin];
                    column = column * (c - kappa * vec(gnu(s))[b]) + (1 - c);
                }
                vec(x(j))[b] = column;
            }
            trace_()[j] = key.kappa[end - begin - 1] * beta;
            up_to[j] = end;
        }
    }

    void write() {
        encoder.rest(steps, keep), keys.rest(steps, keep), values.rest(steps, keep);
        current.zeros(2 * Ep);
        drive.get(2 * Mp);
        gnu_.get(steps * Mp);
        trace_.zeros(Mp);
        std::fill_n(x_.get(Mp * Mp), Mp * Mp, T(1));
        segments.clear();
        last_segment.assign(Mp, -1);
        up_to.assign(Mp, -1);
        keys_fired_at.assign(Mp, -1);
        for (int64_t t = 0; t < steps; ++t) {
            if (t % T_ == 0) {
                const int64_t pair = (sample * o.pairs + t / T_) * E;
                std::copy_n(tensors.features + pair, E, current());
                std::copy_n(tensors.labels + pair, E, current() + Ep);
            }
            encoder.step(t, current());
            std::fill_n(drive(), 2 * Mp, T(0));
            for (auto j = encoder.spikes.begin(t); j != encoder.spikes.end(t); ++j)
                add(drive(), weights.write() + *j * 2 * Mp, 2 * mv);

            keys.step(t, drive());
            T* value_drive = drive() + Mp;
            for (auto j = keys.spikes.begin(t); j != keys.spikes.end(t); ++j) {
                bring_up_to_date(*j, t);
                for (int b = 0; b < mv; ++b) vec(value_drive)[b] += feedback * (1 - vec(x(*j))[b]);
                trace_()[*j] += 1 - beta;
                up_to[*j] = keys_fired_at[*j] = t;
            }
            values.step(t, value_drive);
            for (int b = 0; b < mv; ++b) {
                V z = vec(values.z())[b], before = {};
                if (t > 0) before = vec(gnu(t - 1))[b];
                vec(gnu(t))[b] = beta * before + gamma_pos * (1 - beta) * z;
            }
        }
    }

    void read() {
        for (int64_t j = 0; keep && j < M; ++j) bring_up_to_date(j, steps);
        query.rest(T_, keep), read_keys.rest(T_, keep), read_values.rest(T_, keep);
        std::copy_n(tensors.query + sample * E, E, current.zeros(2 * Ep));
        readout.zeros(Mp);
        for (int64_t t = 0; t < T_; ++t) {
            query.step(t, current());
            std::fill_n(drive(), 2 * Mp, T(0));
            for (auto e = query.spikes.begin(t); e != query.spikes.end(t); ++e)
                add(drive(), weights.query() + *e * Mp, mv);
            if (int64_t then = t - o.readout_delay; then >= 0)
                for (auto i = read_values.spikes.begin(then); i != read_values.spikes.end(then); ++i)
                    add(drive(), weights.feedback() + *i * Mp, mv);
            read_keys.step(t, drive());

            std::fill_n(drive(), Mp, T(0));
            for (auto j = read_keys.spikes.begin(t); j != read_keys.spikes.end(t); ++j) {
                bring_up_to_date(*j, steps);
                for (int b = 0; b < mv; ++b) vec(drive())[b] += w_max * (1 - vec(x(*j))[b]);
            }
            read_values.step(t, drive());
            if (t >= T_ - o.readout_steps) add(readout(), read_values.z(), mv);
        }
    }

public:
    // The adjoint of everything, after forward(b, true); adds the gradients of the weights to `grads`.
    void backward(Weights<T>& grads) {
        mu_.zeros(Mp * Mp);
        dnu_.zeros(steps * Mp);
        dkappa_.zeros(steps * Mp);
        g_.get(steps * 2 * Mp);
        load_count_grads();
        read_adjoint(grads);
        value_adjoint();
        key_adjoint();
        encoder_adjoint(grads);
    }

private:
    enum { FEATURES, LABELS, QUERY, KEYS, VALUES, READ_KEYS, READ_VALUES };
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
        Buffer<T> dkeys_, dvk_, dvv_, dvq_, dread_, dout_;
        T* di = dkeys_.get(T_ * Mp);  // adjoint of the current of the keys
        T *dvk = dvk_.zeros(Mp), *dvv = dvv_.zeros(Mp), *dvq = dvq_.zeros(Ep), *out = dout_.zeros(std::max(Ep, Mp));
        T* dz = dread_.zeros(std::max(Ep, Mp));
        T* dquery = tensors.grad_query + sample * E;
        std::fill_n(dquery, E, T(0));
        for (int64_t t = T_ - 1; t >= 0; --t) {
            std::copy_n(count_grad(READ_VALUES), Mp, dz);
            if (t >= T_ - o.readout_steps)
                for (int64_t i = 0; i < M; ++i) dz[i] += tensors.grad_readout[sample * M + i];
            if (const int64_t then = t + o.readout_delay; then < T_)
                for (int64_t i = 0; i < M; ++i)
                    if (read_values.slope(t)[i] != 0) dz[i] += dot(weights.feedback() + i * Mp, di + then * Mp, mv);
            read_values.adjoint(t, dz, dvv, out);

            std::copy_n(count_grad(READ_KEYS), Mp, dz);
            for (int64_t j = 0; j < M; ++j)
                if (read_keys.slope(t)[j] != 0 && up_to[j] >= 0) {
                    bring_up_to_date(j, steps);
                    V s = {};
                    for (int b = 0; b < mv; ++b) s += (1 - vec(x(j))[b]) * vec(out)[b];
                    dz[j] += w_max * sum<T>(s);
                }
            for (auto j = read_keys.spikes.begin(t); j != read_keys.spikes.end(t); ++j)
                for (int b = 0; b < mv; ++b) vec(mu(*j))[b] += w_max * vec(out)[b];
            read_keys.adjoint(t, dz, dvk, di + t * Mp);
            if (const int64_t then = t - o.readout_delay; then >= 0)
                for (auto i = read_values.spikes.begin(then); i != read_values.spikes.end(then); ++i)
                    add(grads.feedback() + *i * Mp, di + t * Mp, mv);
            for (auto e = query.spikes.begin(t); e != query.spikes.end(t); ++e)
                add(grads.query() + *e * Mp, di + t * Mp, mv);

            std::copy_n(count_grad(QUERY), Ep, dz);
            for (int64_t e = 0; e < E; ++e)
                if (query.slope(t)[e] != 0) dz[e] += dot(weights.query() + e * Mp, di + t * Mp, mv);
            query.adjoint(t, dz, dvq, out);
            for (int64_t e = 0; e < E; ++e) dquery[e] += out[e];
        }
    }

    // Takes the adjoint of column j from step t back to the spike of its key before t.
    void walk_back(int64_t j, int64_t t) {
        while (cursor[j] >= 0) {
            const Segment<T>& segment = segments[cursor[j]];
            const int length = segment.end - segment.begin;
            KeyTrace<T> key(segment.trace, length, beta, gamma_neg);
            V* replay = vec(replay_.get(SEGMENT * LANES<T>));
            for (int b = 0; b < mv; ++b) {
                V column = vec(starts() + cursor[j] * Mp)[b];
                for (int s = 0; s < length; ++s) {
                    replay[s] = column;
                    column = column * (key.c[s] - key.kappa[s] * vec(gnu(segment.begin + s))[b]) + (1 - key.c[s]);
                }
                V adjoint = vec(mu(j))[b];
                for (int s = length - 1; s >= 0; --s) {
                    const V trace = vec(gnu(segment.begin + s))[b];
                    const V p = adjoint * replay[s];
                    const T h = 2 * gamma_neg * key.kappa[s];
                    vec(dnu(segment.begin + s))[b] += p * (gamma_pos * key.kappa[s]);
                    dkappa(segment.begin + s)[j] += sum<T>(p * (trace + h) - h * adjoint);
                    adjoint = adjoint * (key.c[s] - key.kappa[s] * trace);
                }
                vec(mu(j))[b] = adjoint;
            }
            cursor[j] = segment.previous;
            if (segment.after_spike) return;
        }
        for (int64_t s = 0; s < t; ++s) dkappa(s)[j] += dot(mu(j), gnu(s), mv);  // the key has not fired yet
    }

    // Values, and the memory through which they were stored: back from the last step, all but the adjoint of the keys.
    void value_adjoint() {
        cursor = last_segment;
        for (int64_t j = 0; j < M; ++j)
            if (read_keys.count()[j] > 0) walk_back(j, steps);
            else while (cursor[j] >= 0) {  // nothing sees the column after its key's last spike
                const Segment<T>& segment = segments[cursor[j]];
                cursor[j] = segment.previous;
                if (segment.after_spike) break;
            }
        T *nu = dz_.zeros(2 * Mp), *dz = nu + Mp, *dv = dv_.zeros(Mp);
        for (int64_t t = steps - 1; t >= 0; --t) {
            for (int b = 0; b < mv; ++b) {
                vec(nu)[b] = vec(dnu(t))[b] + beta * vec(nu)[b];
                vec(dz)[b] = vec(count_grad(VALUES))[b] + (1 - beta) * vec(nu)[b];
            }
            T* dcurrent = g(t) + Mp;
            values.adjoint(t, dz, dv, dcurrent);
            for (auto j = keys.spikes.begin(t); j != keys.spikes.end(t); ++j) {
                for (int b = 0; b < mv; ++b) vec(mu(*j))[b] += feedback * vec(dcurrent)[b];
                walk_back(*j, t);
            }
        }
    }

    void key_adjoint() {
        for (int64_t t = 0; t < steps; ++t) std::copy_n(count_grad(KEYS), Mp, g(t));
        for (size_t n = 0; n < segments.size(); ++n) {  // through what the memory recalled while writing
            const Segment<T>& segment = segments[n];
            const int length = segment.end - segment.begin;
            KeyTrace<T> key(segment.trace, length, beta, gamma_neg);
            V* column = vec(starts() + n * Mp);
            for (int s = 0; s < length; ++s) {
                const int64_t t = segment.begin + s;
                if (keys.slope(t)[segment.key] != 0 && !(segment.first && s == 0)) {
                    V recalled = {};
                    for (int b = 0; b < mv; ++b) recalled += (1 - column[b]) * vec(g(t) + Mp)[b];
                    g(t)[segment.key] += feedback * sum<T>(recalled);
                }
                for (int b = 0; b < mv; ++b)
                    column[b] = column[b] * (key.c[s] - key.kappa[s] * vec(gnu(t))[b]) + (1 - key.c[s]);
            }
        }
        T *kappa = dz_.zeros(2 * Mp), *dz = kappa + Mp, *dv = dv_.zeros(Mp);
        for (int64_t t = steps - 1; t >= 0; --t) {
            for (int b = 0; b < mv; ++b) {
                vec(kappa)[b] = vec(dkappa(t))[b] + beta * vec(kappa)[b];
                vec(dz)[b] = vec(g(t))[b] + (1 - beta) * vec(kappa)[b];
            }
            keys.adjoint(t, dz, dv, g(t));
        }
    }

    void encoder_adjoint(Weights<T>& grads) {
        T *dz = dz_.zeros(2 * Ep), *dv = dv_.zeros(2 * Ep), *dcurrent = out_.get(2 * Ep);
        std::vector<T> total(2 * Ep);
        for (int64_t t = steps - 1; t >= 0; --t) {
            for (int64_t e = 0; e < 2 * Ep; ++e)
                if (encoder.slope(t)[e] != 0) dz[e] = count_grad(FEATURES)[e] + dot(weights.write() + e * 2 * Mp, g(t), 2 * mv);
            for (auto e = encoder.spikes.begin(t); e != encoder.spikes.end(t); ++e)
                add(grads.write() + *e * 2 * Mp, g(t), 2 * mv);
            encoder.adjoint(t, dz, dv, dcurrent);
            for (int64_t e = 0; e < 2 * Ep; ++e) total[e] += dcurrent[e];
            if (t % T_ == 0) {
                const int64_t pair = (sample * o.pairs + t / T_) * E;
                std::copy_n(total.data(), E, tensors.grad_features + pair);
                std::copy_n(total.data() + Ep, E, tensors.grad_labels + pair);
                std::fill(total.begin(), total.end(), T(0));
            }
        }
    }
};

// Runs body(chunk, first sample, end) for every chunk of the batch on several threads.
template <class Body> void for_chunks(const Options& o, const Body& body) {
    const int64_t chunks = std::min<int64_t>(o.batch, MAX_CHUNKS);
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    auto work = [&] {
        FlushToZero flush;
        try {
            body([&](auto run) {
                for (int64_t c; (c = next++) < chunks && !failed;) run(c, c * o.batch / chunks, (c + 1) * o.batch / chunks);
            });
        } catch (const std::bad_alloc&) {
            failed = true;
        }
    };
    std::vector<std::thread> threads;
    for (int64_t i = 1; i < std::min(o.threads, chunks); ++i) threads.emplace_back(work);
    work();
    for (auto& thread : threads) thread.join();
    if (failed) throw std::bad_alloc();
}

template <class T> void forward(const Options& o, const Tensors<T>& tensors) {
    Weights<T> weights(o, tensors.write_weight, tensors.read_weight);
    for_chunks(o, [&](auto each) {
        Sample<T> sample(o, tensors, weights);
        each([&](int64_t, int64_t first, int64_t end) {
            for (int64_t b = first; b < end; ++b) {
                sample.forward(b, false);
                sample.store_results();
                if (tensors.spikes) sample.record();
            }
        });
    });
}

template <class T> void backward(const Options& o, const Tensors<T>& tensors) {
    Weights<T> weights(o, tensors.write_weight, tensors.read_weight);
    std::vector<std::unique_ptr<Weights<T>>> grads(std::min<int64_t>(o.batch, MAX_CHUNKS));
    for_chunks(o, [&](auto each) {
        Sample<T> sample(o, tensors, weights);
        each([&](int64_t chunk, int64_t first, int64_t end) {
            grads[chunk] = std::make_unique<Weights<T>>(o);
            for (int64_t b = first; b < end; ++b) {
                sample.forward(b, true);
                sample.backward(*grads[chunk]);
            }
        });
    });
    for (auto& part : grads) part->add_to(o, tensors.grad_write_weight, tensors.grad_read_weight);
}

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
int forward_float32(const Options* o, const Tensors<float>* t) { return guarded([&] { forward(*o, *t); }); }
int forward_float64(const Options* o, const Tensors<double>* t) { return guarded([&] { forward(*o, *t); }); }
int backward_float32(const Options* o, const Tensors<float>* t) { return guarded([&] { backward(*o, *t); }); }
int backward_float64(const Options* o, const Tensors<double>* t) { return guarded([&] { backward(*o, *t); }); }
}
