// The weights, and products with spikes.

#pragma once

#include "arguments.h"
#include "simd.h"

template <class T> int padded(int64_t n) { return (n + LANES<T> - 1) / LANES<T> * LANES<T>; }

template <class T> void add(T* to, const T* from, int nv, T factor = 1) {
    for (int b = 0; b < nv; ++b) vec(to)[b] += factor * vec(from)[b];
}

// out[j] += scale * (row(j) . g) over nv vectors, for the n listed j.
template <class T, class Row> void dots(const int32_t* index, int n, const Row& row, const T* g, int nv, T scale, T* out) {
    using V = Vec<T>;
    for (int first = 0; first < n; first += LANES<T>) {
        V partial[LANES<T>] = {};
        const int some = std::min(n - first, LANES<T>);
        for (int k = 0; k < some; ++k) {
            const V* r = vec(row(int64_t(index[first + k])));
            V s = {};
            for (int b = 0; b < nv; ++b) s += r[b] * vec(g)[b];
            partial[k] = s;
        }
        const V total = sums<T>(partial);
        for (int k = 0; k < some; ++k) out[index[first + k]] += scale * total[k];
    }
}

// Transposed and padded, so that the row of a neuron that fired lies in whole vectors.
template <class T> class Weights {
    const int64_t Ep, Mp;
    Buffer<T> writing, from_query, from_values;  // [2 Ep + 1][2 Mp], [Ep + 1][Mp], [Mp][Mp]
public:
    Weights(int64_t Ep, int64_t Mp) : Ep(Ep), Mp(Mp) {
        writing.zeros((2 * Ep + 1) * 2 * Mp);
        from_query.zeros((Ep + 1) * Mp);
        from_values.zeros(Mp * Mp);
    }
    Weights(const Options& o, const Tensors<T>& tensors) : Weights(padded<T>(o.embedding), padded<T>(o.memory)) {
        each(o, tensors.write_weight, tensors.read_weight, [](const T& weight, T& here, T& rest) {
            here = weight;
            rest += 0 * weight;
        });
    }

    // Row e goes out from neuron e. The last row is where a drive starts: 0, or NaN for a driven neuron of which any weight is
    // not finite, as in a matrix product.
    T* write(int64_t e) { return writing.at(e * 2 * Mp); }
    T* query(int64_t e) { return from_query.at(e * Mp); }
    T* feedback(int64_t i) { return from_values.at(i * Mp); }
    const T* write(int64_t e) const { return writing.at(e * 2 * Mp); }
    const T* query(int64_t e) const { return from_query.at(e * Mp); }
    const T* feedback(int64_t i) const { return from_values.at(i * Mp); }

    // Visits (element of a weight, its place here, its place in the last row).
    template <class W, class Visit> void each(const Options& o, W* write_weight, W* read_weight, const Visit& visit) {
        const int64_t E = o.embedding, M = o.memory;
        for (int64_t i = 0; i < 2 * M; ++i) {
            const int64_t to = i < M ? i : Mp + i - M;
            for (int64_t e = 0; e < 2 * E; ++e)
                visit(write_weight[i * 2 * E + e], write(e < E ? e : Ep + e - E)[to], write(2 * Ep)[to]);
        }
        for (int64_t j = 0; j < M; ++j) {
            for (int64_t e = 0; e < E; ++e) visit(read_weight[j * (E + M) + e], query(e)[j], query(Ep)[j]);
            for (int64_t i = 0; i < M; ++i) visit(read_weight[j * (E + M) + E + i], feedback(i)[j], query(Ep)[j]);
        }
    }
};
