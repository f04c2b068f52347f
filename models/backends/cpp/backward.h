// The adjoint of a forward pass, from the trajectory it left, backward in time. The steps within a chunk are replayed from the
// columns kept at their start.

#pragma once

#include <vector>

#include "forward.h"

template <class T> class Backward {
    using V = Vec<T>;
    enum { FEATURES, LABELS, QUERY, KEYS, VALUES, READ_KEYS, READ_VALUES };

    const Network<T>& net;
    const Options& o;
    const int64_t E, M, steps;
    const int Ep, Mp, mv;
    const Trajectory<T>& trajectory;

    Buffer<T> columns_adjoint;  // [key][value], dL/dy; values of writing in the order of the trajectory, of reading in their natural one
    Buffer<T> currents_adjoint; // [step of a block][keys, values], dL/dI
    Buffer<T> potentiation_adjoint, kappa_adjoint;  // [step of a chunk and the first one after it]
    Buffer<T> from_memory;      // [step of a chunk][key]: dL/dz by what the values were fed back
    Buffer<T> key_terms;        // [key][step of a chunk]: what is to be summed over lanes
    Buffer<T> dz, dv, dquery, encoder_dv, counts, write_grads;
    Buffer<int32_t> index;
    Buffer<uint32_t> near_steps;      // the steps of the chunk at which a key's surrogate derivative is not zero
    std::vector<char> seen, touched;  // whether anything later in time sees column j; whether it has terms in this chunk
    size_t open_segments = 0;         // those before the time that the backward has reached

    T* column_adjoint(int64_t j) { return columns_adjoint.at(j * Mp); }
    T* current_adjoint(int64_t t) { return currents_adjoint.at(t % BLOCK * 2 * Mp); }
    const T* potentiation(int64_t t) const { return trajectory.potentiation.at(t * Mp); }

public:
    Backward(const Network<T>& net, const Trajectory<T>& trajectory)
        : net(net), o(net.o), E(net.E), M(net.M), steps(net.steps), Ep(net.Ep), Mp(net.Mp), mv(net.mv), trajectory(trajectory) {}

    // Writes the gradients of the currents, and adds those of the weights to `grads`.
    void run(Weights<T>& grads) {
        load_count_grads();
        columns_adjoint.zeros(M * Mp);
        index.resize(std::max(2 * Ep, Mp) + 16);
        read_adjoint(grads);
        write_adjoint(grads);
    }

private:
    // dL/d spike count, a constant added to the adjoint of every spike of a neuron; padded.
    T* count_grad(int population) {
        const int at[] = {0, Ep, 2 * Ep, 3 * Ep, 3 * Ep + Mp, 3 * Ep + 2 * Mp, 3 * Ep + 3 * Mp};
        return counts.at(at[population]);
    }
    void load_count_grads() {
        counts.zeros(3 * Ep + 4 * Mp);
        const T* from = net.tensors.grad_counts + trajectory.sample * (3 * E + 4 * M);
        for (int population = FEATURES; population <= READ_VALUES; ++population) {
            const int64_t n = population < KEYS ? E : M;
            std::copy_n(from, n, count_grad(population));
            from += n;
        }
    }

    // ------------------------------------------------------------------------------------------------------- reading

    void read_adjoint(Weights<T>& grads) {
        const auto &query = trajectory.query, &keys = trajectory.read_keys, &values = trajectory.read_values;
        const int64_t T_ = net.T_, sample = trajectory.sample;
        const int wide = std::max(Ep, Mp);
        T *dz = this->dz.resize(2 * wide), *dvalues = dz + wide;
        T *dv_keys = dv.zeros(2 * Mp + Ep), *dv_values = dv_keys + Mp, *dv_query = dv_keys + 2 * Mp;
        T *dkeys = currents_adjoint.resize(std::max<int64_t>(T_, 2 * BLOCK) * Mp), *dquery = this->dquery.zeros(Ep);
        int32_t* near = index.at();
        for (int64_t t = T_ - 1; t >= 0; --t) {
            std::copy_n(count_grad(READ_VALUES), Mp, dz);
            if (t >= T_ - o.readout_steps)
                for (int64_t i = 0; i < M; ++i) dz[i] += net.tensors.grad_readout[sample * M + i];
            if (o.readout_delay < T_ - t)
                dots<T>(near, values.list_near_threshold(t, near), [&](int64_t i) { return net.weights.feedback(i); },
                        dkeys + (t + o.readout_delay) * Mp, mv, T(1), dz);
            values.adjoint(t, dz, dv_values, dvalues);

            std::copy_n(count_grad(READ_KEYS), Mp, dz);
            const auto unwritten = [&](int64_t j) { return j >= M || trajectory.first_key_spike[j] == steps; };
            const int n = std::remove_if(near, near + keys.list_near_threshold(t, near), unwritten) - near;
            dots<T>(near, n, [&](int64_t j) { return trajectory.stored.at(j * Mp); }, dvalues, mv, net.w_max, dz);
            keys.spikes.each(t, [&](int64_t j) { add(column_adjoint(j), dvalues, mv, net.w_max); });
            T* dkey = dkeys + t * Mp;
            keys.adjoint(t, dz, dv_keys, dkey);
            if (const int64_t then = t - o.readout_delay; then >= 0)
                values.spikes.each(then, [&](int64_t i) { add(grads.feedback(i), dkey, mv); });
            query.spikes.each(t, [&](int64_t e) { add(grads.query(e), dkey, mv); });

            std::copy_n(count_grad(QUERY), Ep, dz);
            dots<T>(near, query.list_near_threshold(t, near), [&](int64_t e) { return net.weights.query(e); }, dkey, mv, T(1), dz);
            query.adjoint(t, dz, dv_query, dz);
            add(dquery, dz, net.ev);
        }
        std::copy_n(dquery, E, net.tensors.grad_query + sample * E);
    }

    // ------------------------------------------------------------------------------------------------------- writing

    void write_adjoint(Weights<T>& grads) {
        potentiation_adjoint.resize((CHUNK + 1) * Mp);
        kappa_adjoint.resize((CHUNK + 1) * Mp);
        std::fill_n(potentiation_adjoint.at(CHUNK * Mp), Mp, T(0));
        std::fill_n(kappa_adjoint.at(CHUNK * Mp), Mp, T(0));
        from_memory.resize(CHUNK * Mp);
        key_terms.resize(CHUNK * Mp * LANES<T>);
        dz.zeros(std::max(Mp, 2 * Ep));  // what is not set is multiplied by a surrogate derivative of zero
        dv.zeros(2 * Mp);
        encoder_dv.zeros(6 * Ep);
        near_steps.resize(Mp);
        open_segments = trajectory.segments.size();
        touched.assign(M, 0);
        seen.assign(M, 0);
        for (int64_t j = 0; j < M; ++j)
            seen[j] = trajectory.read_keys.count[j] > 0;
        write_grads.zeros(4l * Ep * Mp);
        for (int64_t block = (steps - 1) / BLOCK * BLOCK; block >= 0; block -= BLOCK) {
            const int64_t end = std::min(steps, block + BLOCK);
            for (int64_t start = (end - 1) / CHUNK * CHUNK; start >= block; start -= CHUNK) chunk_adjoint(start, std::min(end, start + CHUNK));
            encoder_adjoint(block, end);
        }
        for (int64_t e = 0; e < 2 * Ep; ++e) {
            const T* from = write_grads.at(e * 2 * Mp);
            T* to = grads.write(e);
            add(to, from, 2 * mv);
        }
    }

    void chunk_adjoint(int64_t start, int64_t end) {
        prefetch_chunk_before(start);
        const size_t last_segment = open_segments;
        values_and_memory_adjoint(start, end);
        find_near_steps(start, end);
        std::fill(touched.begin(), touched.end(), 0);
        for (size_t n = open_segments; n < last_segment; ++n) feedback_adjoint(start, trajectory.segments[n]);
        sum_key_terms(from_memory.at());
        keys_adjoint(start, end);
    }

    // From the last step of a chunk to its first: the values, the columns, and dL/dkappa as far as it comes from the updates.
    void values_and_memory_adjoint(int64_t start, int64_t end) {
        std::fill_n(potentiation_adjoint.at(), CHUNK * Mp, T(0));
        std::fill(touched.begin(), touched.end(), 0);
        for (int64_t j = 0; j < M; ++j)
            if (seen[j] && trajectory.first_key_spike[j] >= end) empty_column_adjoint(start, end, j);
        const auto updates_before = [&](int64_t t) {
            const auto& segments = trajectory.segments;
            for (; open_segments > 0 && segments[open_segments - 1].end == t; --open_segments) {
                if (open_segments >= 4) {  // no longer in cache
                    const Segment& soon = segments[open_segments - 4];
                    for (int b = 0; b < soon.active; ++b) __builtin_prefetch(vec(trajectory.segment_starts.at(soon.start)) + b);
                }
                if (seen[segments[open_segments - 1].key]) segment_adjoint(start, segments[open_segments - 1]);
            }
        };
        updates_before(end);
        T *dv_values = dv.at(Mp), *after = potentiation_adjoint.at(CHUNK * Mp);
        for (int64_t t = end - 1; t >= start; --t) {
            T *trace = potentiation_adjoint.at((t - start) * Mp), *dvalues = current_adjoint(t) + Mp;
            trace_adjoint(trace, t + 1 == end ? after : trace + Mp, net.value_gain, count_grad(VALUES));
            trajectory.values.adjoint(t, dz.at(), dv_values, dvalues);
            trajectory.keys.spikes.each(t, [&](int64_t j) {
                add(column_adjoint(j), dvalues, mv, net.feedback);
                seen[j] = 1;
                if (trajectory.first_key_spike[j] == t) empty_column_adjoint(start, t, j);
            });
            if (t > start) updates_before(t);
        }
        std::copy_n(potentiation_adjoint.at(), Mp, after);
        sum_key_terms(kappa_adjoint.at());
    }

    void keys_adjoint(int64_t start, int64_t end) {
        T *dv_keys = dv.at(), *after = kappa_adjoint.at(CHUNK * Mp);
        for (int64_t t = end - 1; t >= start; --t) {
            T* trace = kappa_adjoint.at((t - start) * Mp);
            trace_adjoint(trace, t + 1 == end ? after : trace + Mp, net.key_gain, count_grad(KEYS));
            add(dz.at(), from_memory.at((t - start) * Mp), mv);
            trajectory.keys.adjoint(t, dz.at(), dv_keys, current_adjoint(t));
        }
        std::copy_n(kappa_adjoint.at(), Mp, after);
    }

    // The adjoint of a trace, from the step after; and from it and the spike counts that of the spike, in `dz`.
    void trace_adjoint(T* trace, const T* later, T gain, const T* count_grad) {
        const T beta = net.beta;
        T* dz = this->dz.at();
        for (int b = 0, n = mv; b < n; ++b) {
            vec(trace)[b] += beta * vec(later)[b];
            vec(dz)[b] = vec(count_grad)[b] + gain * vec(trace)[b];
        }
    }

    // One sum over lanes for each step of the chunk, to which a key's columns add.
    V* terms_of(int64_t j) {
        V* terms = vec(key_terms.at(j * CHUNK * LANES<T>));
        if (!touched[j]) std::fill_n(terms, CHUNK, V{}), touched[j] = 1;
        return terms;
    }

    void segment_adjoint(int64_t start, const Segment& segment) {
        const int64_t j = segment.key;
        const int begin = segment.begin - start, end = segment.end - start;
        const KeyTrace<T> key(trajectory.key_traces.at(start * Mp + j * CHUNK), net.gamma_neg);
        V *terms = terms_of(j), *adjoint = vec(column_adjoint(j));
        const V* before = vec(trajectory.segment_starts.at(segment.start));
        if (segment.decayed) {
            in_groups(segment.active, [&](int b, auto n) {
                identity_adjoint<T, n>(before + b, potentiation(start) + b * LANES<T>, mv, begin, end, adjoint + b, terms);
            });
            return;
        }
        in_groups(segment.active, [&](int b, auto n) {
            update_adjoint<T, n>(before + b, key, potentiation(start) + b * LANES<T>, mv, begin, end, adjoint + b,
                                 potentiation_adjoint.at(b * LANES<T>), terms);
        });
        in_groups(mv - segment.active, [&](int first, auto n) {
            const int b = segment.active + first;
            silent_update_adjoint<T, n>(key, mv, begin, end, adjoint + b, potentiation_adjoint.at(b * LANES<T>));
        });
    }

    // Before the first spike of its key a column is zero and its adjoint constant.
    void empty_column_adjoint(int64_t start, int64_t end, int64_t j) {
        V* terms = terms_of(j);
        for (int s = 0; s < end - start; ++s)
            for (int b = 0; b < trajectory.active[start / CHUNK]; ++b) terms[s] += vec(column_adjoint(j))[b] * vec(potentiation(start + s))[b];
    }

    // What the values were fed back from the memory, through the spikes of a key: adds sum over i of W_ij dL/dI_i(s).
    void feedback_adjoint(int64_t start, const Segment& segment) {
        const int64_t j = segment.key;
        const int begin = segment.begin - start, end = segment.end - start;
        V* terms = terms_of(j);
        const uint32_t within = near_steps[j] & ((1u << end) - (1u << begin));
        if (!within) return;
        const int last = 32 - __builtin_clz(within);
        const KeyTrace<T> key(trajectory.key_traces.at(start * Mp + j * CHUNK), net.gamma_neg);
        const V* before = vec(trajectory.segment_starts.at(segment.start));
        const T feedback = net.feedback;
        in_groups(segment.active, [&](int b, auto n) {
            V after[n];
            if (segment.decayed) {
                for (int s = begin; s < last; ++s) {
                    V sum = {};
                    for (int k = 0; k < n; ++k) sum += before[b + k] * vec(current_adjoint(start + s) + Mp)[b + k];
                    terms[s] += feedback * sum;
                }
                return;
            }
            update<T, n>(before + b, key, potentiation(start) + b * LANES<T>, mv, begin, last, [&](int s, const V* y) {
                V sum = {};
                for (int k = 0; k < n; ++k) sum += y[k] * vec(current_adjoint(start + s) + Mp)[b + k];
                terms[s] += feedback * sum;
            }, after);
        });
    }

    // From the terms of all keys, [key][step] to be summed over lanes, the sums [step][key].
    void sum_key_terms(T* out) {
        for (int b = 0; b < mv; ++b)
            for (int q = 0; q < CHUNK; q += LANES<T>) {
                V square[LANES<T>];
                for (int k = 0; k < LANES<T>; ++k) {
                    const int64_t j = b * LANES<T> + k;
                    square[k] = V{};
                    if (j >= M || !touched[j]) continue;
                    V terms[LANES<T>];
                    std::copy_n(vec(key_terms.at((j * CHUNK + q) * LANES<T>)), LANES<T>, terms);
                    square[k] = sums<T>(terms);
                }
                transpose<T>(square);
                for (int s = 0; s < LANES<T>; ++s) vec(out)[(q + s) * mv + b] = square[s];
            }
    }

    void find_near_steps(int64_t start, int64_t end) {
        std::fill_n(near_steps.at(), Mp, 0);
        for (int b = 0; b < mv; ++b)
            for (int q = 0; q < CHUNK; q += LANES<T>) {
                V square[LANES<T>];
                for (int s = 0; s < LANES<T>; ++s) square[s] = start + q + s < end ? trajectory.keys.surrogate(start + q + s, b) : V{};
                transpose<T>(square);
                for (int k = 0; k < LANES<T>; ++k) near_steps[b * LANES<T> + k] |= bits<T>(square[k] != V{}) << q;
            }
    }

    void prefetch_chunk_before(int64_t start) {
        if (start == 0) return;
        const int64_t before = (start - CHUNK) * Mp, bytes = CHUNK * Mp * sizeof(T);
        for (const T* from : {trajectory.key_traces.at(before), potentiation(start - CHUNK), trajectory.keys.surrogate(start - CHUNK),
                              trajectory.values.surrogate(start - CHUNK)})
            for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(reinterpret_cast<const char*>(from) + line);
    }

    // ------------------------------------------------------------------------------------------------------ encoding

    void encoder_adjoint(int64_t begin, int64_t end) {
        T *dz = this->dz.at(), *dv = encoder_dv.at(), *total = dv + 2 * Ep, *dcurrent = total + 2 * Ep;
        const Tensors<T>& to = net.tensors;
        for (int64_t t = end - 1; t >= begin; --t) {
            const int n = trajectory.encoder.list_near_threshold(t, index.at());
            for (int k = 0; k < n; ++k) dz[index[k]] = count_grad(FEATURES)[index[k]];
            dots<T>(index.at(), n, [&](int64_t e) { return net.weights.write(e); }, current_adjoint(t), 2 * mv, T(1), dz);
            trajectory.encoder.adjoint(t, dz, dv, dcurrent);
            add(total, dcurrent, 2 * net.ev);
            if (t % net.T_ == 0) {
                const int64_t pair = (trajectory.sample * o.pairs + t / net.T_) * E;
                std::copy_n(total, E, to.grad_features + pair);
                std::copy_n(total + Ep, E, to.grad_labels + pair);
                std::fill_n(total, 2 * Ep, T(0));
            }
        }
        weight_grads(begin, end);
    }

    // Adds the adjoint of the drive at each step to the rows of the encoding neurons that fired, as `Forward::drive` took them.
    void weight_grads(int64_t begin, int64_t end) {
        for (int64_t t = end - 1; t >= begin; --t) {
            if (t + net.period < end) add(current_adjoint(t), current_adjoint(t + net.period), 2 * mv);
            trajectory.each_change(t, [&](int64_t e, T sign) { add(write_grads.at(e * 2 * Mp), current_adjoint(t), 2 * mv, sign); });
        }
    }
};
