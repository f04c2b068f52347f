// The Hebbian rule on one column of the memory: updates one after the other, and their adjoint.
//
// A column belongs to key neuron j; element i to value neuron i. It is held as y = W / w_max. With kappa the trace of the key,
// p_i = gamma_pos nu_i the potentiation that the trace of value i brings, and c = 1 - gamma_neg kappa^2, an update is
//
//   y' = y (c - kappa p) + kappa p.
//
// A weight whose value neuron never fired stays exactly 0. With a = dL/dy',
//
//   dL/dy = a (c - kappa p),    dL/dp = (a - a y) kappa,    dL/dkappa = (a - a y) p - 2 gamma_neg kappa a y.

#pragma once

#include <type_traits>

#include "simd.h"

constexpr int CHUNK = 16;  // steps of time taken together: whole vectors

// What the updates of one chunk have of their key: one entry a step.
template <class T> struct KeyTrace {
    alignas(VECTOR_BYTES) T kappa[CHUNK], c[CHUNK], h[CHUNK];
    KeyTrace(const T* trace, T gamma_neg) {
        for (int q = 0; q < CHUNK / LANES<T>; ++q) {
            const Vec<T> k = vec(trace)[q];
            vec(kappa)[q] = k, vec(c)[q] = 1 - gamma_neg * k * k, vec(h)[q] = 2 * gamma_neg * k;
        }
    }
};

// Calls f(first vector, how many) for all nv vectors of a column, in groups that fit into registers; `how many` is a constant.
template <int N = GROUP, class F> void with_constant(int n, int first, const F& f) {
    if constexpr (N > 0) {
        if (n == N) f(first, std::integral_constant<int, N>());
        else with_constant<N - 1>(n, first, f);
    }
}
template <class F> inline void in_groups(int nv, const F& f) {
    for (int first = 0, groups = (nv + GROUP - 1) / GROUP; groups > 0; --groups) {
        const int n = (nv - first + groups - 1) / groups;
        with_constant(n, first, f);
        first += n;
    }
}

// N vectors of a column through the updates of steps begin to end of a chunk; `visit(s, y)` sees them before each.
// `p` is [step][value], nv vectors wide.
template <class T, int N, class Visit>
inline void update(const Vec<T>* from, const KeyTrace<T>& key, const T* p, int nv, int begin, int end, const Visit& visit, Vec<T>* to) {
    Vec<T> y[N];
    for (int b = 0; b < N; ++b) y[b] = from[b];
    for (int s = begin; s < end; ++s) {
        visit(s, y);
        const T kappa = key.kappa[s], c = key.c[s];
        for (int b = 0; b < N; ++b) {
            const Vec<T> gain = kappa * vec(p)[s * nv + b];
            y[b] = y[b] * (c - gain) + gain;
        }
    }
    for (int b = 0; b < N; ++b) to[b] = y[b];
}

// The adjoint of `update`, from step `end` back to `begin`, for dL/dy in `adjoint`. Adds to dL/dp in `dp`, and the terms of
// dL/dkappa (to be summed over lanes) in `dkappa`.
template <class T, int N>
inline void update_adjoint(const Vec<T>* from, const KeyTrace<T>& key, const T* p, int nv, int begin, int end, Vec<T>* adjoint, T* dp,
                           Vec<T>* dkappa) {
    Vec<T> before[CHUNK][N], a[N];
    update<T, N>(from, key, p, nv, begin, end, [&](int s, const Vec<T>* y) {
        for (int b = 0; b < N; ++b) before[s][b] = y[b];
    }, a);
    for (int b = 0; b < N; ++b) a[b] = adjoint[b];
    for (int s = end - 1; s >= begin; --s) {
        const T kappa = key.kappa[s], c = key.c[s], h = key.h[s];
        Vec<T> through_growth = {}, through_decay = {};
        for (int b = 0; b < N; ++b) {
            const Vec<T> decaying = a[b] * before[s][b], growing = a[b] - decaying, potentiation = vec(p)[s * nv + b];
            vec(dp)[s * nv + b] += growing * kappa;
            through_growth += growing * potentiation;
            through_decay += decaying;
            a[b] *= c - kappa * potentiation;
        }
        dkappa[s] += through_growth - h * through_decay;
    }
    for (int b = 0; b < N; ++b) adjoint[b] = a[b];
}

// The same for N vectors whose value neurons have not fired yet: y = 0 and p = 0, and nothing reaches kappa.
template <class T, int N>
inline void silent_update_adjoint(const KeyTrace<T>& key, int nv, int begin, int end, Vec<T>* adjoint, T* dp) {
    Vec<T> a[N];
    for (int b = 0; b < N; ++b) a[b] = adjoint[b];
    for (int s = end - 1; s >= begin; --s) {
        const T kappa = key.kappa[s], c = key.c[s];
        for (int b = 0; b < N; ++b) {
            vec(dp)[s * nv + b] += a[b] * kappa;
            a[b] *= c;
        }
    }
    for (int b = 0; b < N; ++b) adjoint[b] = a[b];
}
