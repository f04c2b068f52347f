// The forward pass of one sample: encode the pairs, write them into the memory, encode the query, read. It leaves a trajectory.

#pragma once

#include <limits>
#include <utility>
#include <vector>

#include "hebbian.h"
#include "lif.h"
#include "weights.h"

constexpr int BLOCK = 96;  // steps of the encoding population taken together; whole chunks

// What all samples of a call share.
template <class T> struct Network {
    const Options& o;
    const Tensors<T>& tensors;
    const Weights<T> weights;
    const int64_t E, M, T_, steps, chunks;  // steps: of writing
    const int Ep, Mp, ev, mv;               // E and M padded, and in vectors
    const T beta, gamma_neg, value_gain, key_gain, w_max, feedback;
    const T decayed;       // a key's trace below this counts as zero: beside that of a spike it is lost in rounding
    const int64_t period;  // steps after which a neuron that fired may fire again

    Network(const Options& o, const Tensors<T>& tensors)
        : o(o), tensors(tensors), weights(o, tensors), E(o.embedding), M(o.memory), T_(o.num_time_steps),
          steps(o.pairs * o.num_time_steps), chunks((steps + CHUNK - 1) / CHUNK), Ep(padded<T>(E)), Mp(padded<T>(M)),
          ev(Ep / LANES<T>), mv(Mp / LANES<T>), beta(o.beta), gamma_neg(o.gamma_neg), value_gain(o.gamma_pos * (1 - o.beta)),
          key_gain(1 - o.beta), w_max(o.w_max), feedback(o.memory_feedback * o.w_max),
          decayed(key_gain * std::numeric_limits<T>::epsilon() / 4),
          period(std::min<int64_t>(o.refractory_time_steps, BLOCK) + 1) {}
};

// The updates of column `key` in steps begin to end, between two spikes of its key and within one chunk.
struct Segment {
    int32_t key, begin, end;
    int32_t active;  // vectors of the column that are not zero
    int64_t start;   // where these are kept as they were before
    bool decayed;    // the key's trace is zero: the updates change nothing
};

// What a forward pass leaves.
template <class T> struct Trajectory {
    bool keep = false;  // for a backward
    int64_t sample = 0;
    Population<T> encoder, query, keys, values, read_keys, read_values;  // the encoder: vectors, then labels
    SpikeTrain changes;   // of the encoder's spikes, against those a period before, or against none at the start of a block
    Buffer<T> key_traces;              // chunk by chunk [key][CHUNK]: kappa
    Buffer<T> potentiation;            // [step][value]: gamma_pos nu
    Buffer<int64_t> first_key_spike;   // or `steps`
    Buffer<int32_t> active;            // at the end of each chunk, vectors of value neurons of which any has fired
    std::vector<Segment> segments;     // in the order of their ends
    Buffer<T> segment_starts;
    Buffer<T> stored;                  // [key][value]: columns after writing, values in their natural order
    Buffer<T> readout;

    explicit Trajectory(const Network<T>& n)
        : encoder(n.o, 2 * n.Ep), query(n.o, n.Ep), keys(n.o, n.Mp), values(n.o, n.Mp), read_keys(n.o, n.Mp), read_values(n.o, n.Mp) {}

    // Calls f(e, 1 or -1) for the encoding neurons by which a sum over those that fire at step t has changed.
    template <class F> void each_change(int64_t t, const F& f) const {
        changes.each(t, [&](int64_t e) { f(std::max(e, ~e), T(e < 0 ? -1 : 1)); });
    }
};

template <class T> class Forward {
    using V = Vec<T>;
    const Network<T>& net;
    const Options& o;
    const int Ep, Mp, mv;
    Trajectory<T>& trajectory;
    Buffer<T> current, drives, trace_rows;
    Buffer<T> columns;               // [key][value], y
    Buffer<int64_t> updated_until;   // the step before which each column stands
    int active = 0;                  // vectors of value neurons of which any has fired: the rest of the memory is zero
    int64_t starts_size = 0;

public:
    Forward(const Network<T>& net, Trajectory<T>& trajectory)
        : net(net), o(net.o), Ep(net.Ep), Mp(net.Mp), mv(net.mv), trajectory(trajectory) {}

    void run(int64_t sample, bool keep) {
        trajectory.sample = sample;
        trajectory.keep = keep;
        write();
        read();
    }

    void store_results() {
        const Tensors<T>& to = net.tensors;
        const int64_t E = net.E, M = net.M, sample = trajectory.sample;
        std::copy_n(trajectory.readout.at(), M, to.readout + sample * M);
        T* counts = to.counts + sample * (3 * E + 4 * M);
        const auto append = [&](const T* from, int64_t n) { counts = std::copy_n(from, n, counts); };
        append(trajectory.encoder.count.at(), E);
        append(trajectory.encoder.count.at(Ep), E);
        append(trajectory.query.count.at(), E);
        for (auto* population : {&trajectory.keys, &trajectory.values, &trajectory.read_keys, &trajectory.read_values})
            append(population->count.at(), M);
    }

    // The spikes of all populations, whose recordings follow one another in one array, and the memory.
    void record() {
        const int64_t E = net.E, M = net.M, sample = trajectory.sample;
        T* to = net.tensors.spikes;
        const auto append = [&](const SpikeTrain& spikes, int64_t length, int64_t first, int64_t n) {
            T* train = to + sample * length * n;
            for (int64_t t = 0; t < length; ++t)
                spikes.each(t, [&](int64_t j) {
                    if (j >= first && j < first + n) train[t * n + j - first] = 1;
                });
            to += o.batch * length * n;
        };
        append(trajectory.encoder.spikes, net.steps, 0, E);
        append(trajectory.encoder.spikes, net.steps, Ep, E);
        append(trajectory.query.spikes, net.T_, 0, E);
        append(trajectory.keys.spikes, net.steps, 0, M);
        append(trajectory.values.spikes, net.steps, 0, M);
        append(trajectory.read_keys.spikes, net.T_, 0, M);
        append(trajectory.read_values.spikes, net.T_, 0, M);
        T* memory = net.tensors.memory + sample * M * M;
        for (int64_t j = 0; j < M; ++j) {
            const T* column = stored(j);
            for (int64_t i = 0; i < M; ++i) memory[i * M + j] = net.w_max * column[i];
        }
    }

private:
    T* column(int64_t j) { return columns.at(j * Mp); }

    // Column j after writing, values in their natural order.
    const T* stored(int64_t j) {
        if (trajectory.keep) return trajectory.stored.at(j * Mp);
        catch_up(j, net.steps);
        return column(j);
    }

    // Applies to column j all updates before step t.
    void catch_up(int64_t j, int64_t t) {
        if (trajectory.first_key_spike[j] >= t) return;
        for (int64_t& until = updated_until[j]; until < t;) {
            const int64_t start = until / CHUNK * CHUNK, end = std::min(t, start + CHUNK);
            const T* trace = trajectory.key_traces.at(start * Mp + j * CHUNK);
            const bool decayed = trace[until - start] == 0;
            if (trajectory.keep) {
                trajectory.segments.push_back({int32_t(j), int32_t(until), int32_t(end), active, starts_size, decayed});
                std::copy_n(column(j), active * LANES<T>, trajectory.segment_starts.grow(starts_size + Mp) + starts_size);
                starts_size += active * LANES<T>;
                for (int b = 8; b < 8 + active; ++b) __builtin_prefetch(vec(trajectory.segment_starts.at(starts_size)) + b, 1);
            }
            const KeyTrace<T> key(trace, net.gamma_neg);
            if (!decayed) in_groups(active, [&](int b, auto n) {
                V* y = vec(column(j)) + b;
                update<T, n>(y, key, trajectory.potentiation.at(start * Mp + b * LANES<T>), mv, until - start, end - start, [](int, V*) {}, y);
            });
            until = end;
        }
    }

    void write() {
        const int64_t steps = net.steps, chunks = net.chunks;
        const bool keep = trajectory.keep;
        trajectory.encoder.start(steps, keep), trajectory.keys.start(steps, keep), trajectory.values.start(steps, keep);
        trajectory.changes.start(steps, 2 * Ep);
        trajectory.potentiation.resize(chunks * CHUNK * Mp);
        std::fill(trajectory.potentiation.at(steps * Mp), trajectory.potentiation.at(chunks * CHUNK * Mp), T(0));
        trajectory.key_traces.resize(chunks * CHUNK * Mp);
        trajectory.first_key_spike.fill(Mp, steps);
        trajectory.active.resize(chunks);
        trajectory.segments.clear();
        starts_size = 0;
        columns.zeros(net.M * Mp);
        updated_until.zeros(net.M);
        active = 0;
        trace_rows.zeros((CHUNK + 1) * Mp);
        drives.resize(BLOCK * 2 * Mp);
        for (int64_t block = 0; block < steps; block += BLOCK) {
            const int64_t end = std::min(steps, block + BLOCK);
            encode(block, end);
            drive(block, end);
            for (int64_t start = block; start < end; start += CHUNK) write_chunk(start, std::min(end, start + CHUNK));
        }
        if (!keep) return;
        trajectory.stored.resize(net.M * Mp);
        for (int64_t j = 0; j < net.M; ++j)
            if (trajectory.first_key_spike[j] < steps)
                std::copy_n(column(j), Mp, trajectory.stored.at(j * Mp));
    }

    void encode(int64_t begin, int64_t end) {
        current.zeros(2 * Ep);
        for (int64_t t = begin; t < end; ++t) {
            if (t == begin || t % net.T_ == 0) {
                const int64_t pair = (trajectory.sample * o.pairs + t / net.T_) * net.E;
                std::copy_n(net.tensors.features + pair, net.E, current.at());
                std::copy_n(net.tensors.labels + pair, net.E, current.at(Ep));
            }
            trajectory.encoder.step(t, current.at());
            trajectory.changes.take_changes(trajectory.encoder.spikes, t, t - begin < net.period ? -1 : t - net.period);
        }
    }

    // The currents of keys and values from the encoding neurons.
    void drive(int64_t begin, int64_t end) {
        const T* rows = net.weights.write(0);
        for (int64_t t = begin; t < end; ++t) {
            T* sum = drives.at((t - begin) * 2 * Mp);
            std::copy_n(t - begin < net.period ? rows + 2l * Ep * 2 * Mp : sum - net.period * 2 * Mp, 2 * Mp, sum);
            trajectory.each_change(t, [&](int64_t e, T sign) { add(sum, rows + e * 2 * Mp, 2 * mv, sign); });
        }
    }

    void write_chunk(int64_t start, int64_t end) {
        T* now = drives.at(start % BLOCK * 2 * Mp);
        const T feedback = net.feedback;
        fire_keys(start, end, now);
        for (int64_t t = start; t < end; ++t) {
            T* value_drive = now + (t - start) * 2 * Mp + Mp;
            trajectory.keys.spikes.each(t, [&](int64_t j) {
                if (trajectory.first_key_spike[j] == t) updated_until[j] = t;
                catch_up(j, t);
                add(value_drive, column(j), active, feedback);
            });
            fire_values(t, value_drive);
        }
        trajectory.active[start / CHUNK] = active;
        if (trajectory.keep)
            for (int64_t j = 0; j < net.M; ++j) catch_up(j, end);
    }

    // Keys and their traces, which do not depend on the memory.
    void fire_keys(int64_t start, int64_t end, const T* key_drive) {
        T* last = trace_rows.at(CHUNK * Mp);
        const T beta = net.beta;
        const V decayed = V{} + net.decayed;
        for (int s = 0; s < CHUNK; ++s) {
            T* row = trace_rows.at(s * Mp);
            const T* before = s ? row - Mp : last;
            if (start + s >= end) {
                std::fill_n(row, Mp, T(0));
                continue;
            }
            trajectory.keys.step(start + s, key_drive + s * 2 * Mp);
            for (int b = 0, n = mv; b < n; ++b) {
                const V trace = beta * vec(before)[b];
                vec(row)[b] = trace < decayed ? V{} : trace;
            }
            trajectory.keys.spikes.each(start + s, [&](int64_t j) {
                row[j] += net.key_gain;
                trajectory.first_key_spike[j] = std::min(trajectory.first_key_spike[j], start + s);
            });
        }
        std::copy_n(trace_rows.at((CHUNK - 1) * Mp), Mp, last);
        T* traces = trajectory.key_traces.at(start * Mp);
        for (int b = 0; b < mv; ++b)
            for (int q = 0; q < CHUNK; q += LANES<T>) {
                V square[LANES<T>];
                for (int s = 0; s < LANES<T>; ++s) square[s] = vec(trace_rows.at((q + s) * Mp))[b];
                transpose<T>(square);
                for (int k = 0; k < LANES<T>; ++k) *vec(traces + (b * LANES<T> + k) * CHUNK + q) = square[k];
            }
    }

    void fire_values(int64_t t, const T* value_drive) {
        trajectory.values.step(t, value_drive);
        T* row = trajectory.potentiation.at(t * Mp);
        const T beta = net.beta;
        if (t == 0) std::fill_n(row, Mp, T(0));
        else for (int b = 0, n = mv; b < n; ++b) vec(row)[b] = beta * vec(row - Mp)[b];
        trajectory.values.spikes.each(t, [&](int64_t i) {
            row[i] += net.value_gain;
            active = std::max<int>(active, i / LANES<T> + 1);
        });
    }

    void read() {
        const int64_t T_ = net.T_;
        const bool keep = trajectory.keep;
        auto &query = trajectory.query, &keys = trajectory.read_keys, &values = trajectory.read_values;
        query.start(T_, keep), keys.start(T_, keep), values.start(T_, keep);
        std::copy_n(net.tensors.query + trajectory.sample * net.E, net.E, current.zeros(Ep));
        trajectory.readout.zeros(Mp);
        T* sum = drives.resize(2 * Mp);
        for (int64_t t = 0; t < T_; ++t) {
            query.step(t, current.at());
            std::copy_n(net.weights.query(Ep), Mp, sum);
            query.spikes.each(t, [&](int64_t e) { add(sum, net.weights.query(e), mv); });
            if (const int64_t then = t - o.readout_delay; then >= 0)
                values.spikes.each(then, [&](int64_t i) { add(sum, net.weights.feedback(i), mv); });
            keys.step(t, sum);

            std::fill_n(sum, Mp, T(0));
            keys.spikes.each(t, [&](int64_t j) {
                if (trajectory.first_key_spike[j] < net.steps) add(sum, stored(j), mv, net.w_max);
            });
            values.step(t, sum);
            if (t >= T_ - o.readout_steps) values.spikes.each(t, [&](int64_t i) { trajectory.readout[i] += 1; });
        }
    }
};
