// What Python hands over. `build.py` reads the fields of both structs from this file.

#pragma once

#include <cstdint>

struct Options {
    int64_t batch, pairs, embedding, memory;  // sizes B, L, E, M
    int64_t threads;
    int64_t num_time_steps, readout_delay, readout_steps, refractory_time_steps, perfect_reset;
    double memory_feedback, thr, dampening_factor, w_max, gamma_pos, gamma_neg;
    double alpha, beta;  // decay of membranes and of traces in one step
};

// Pointers to one call's tensors, row by row in memory; those of gradients and recordings may be null.
template <class T> struct Tensors {
    const T *features, *labels, *query;       // input currents, B x L x E, B x L x E, B x E
    const T *write_weight, *read_weight;      // 2M x 2E, M x (E + M)
    T *readout, *counts, *spikes, *memory;    // B x M, B x (3E + 4M), all populations one after the other, B x M x M
    const T *grad_readout, *grad_counts;
    T *grad_features, *grad_labels, *grad_query, *grad_write_weight, *grad_read_weight;
};
