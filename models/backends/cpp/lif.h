// Spike trains, and a population of LIF neurons: one step and its adjoint.
//
//   v(t) = m(t) + (1 - alpha) I(t)          m, the membrane's carry, is what the step before left
//   z(t) = 1 if v(t) > thr and the neuron is not refractory
//   m(t+1) = alpha v(t) - thr z(t),  or with a perfect reset  alpha v(t) (1 - z(t))
//
// and, with s the surrogate derivative dz/dv (zero while refractory),
//
//   dL/dv(t) = dm(t+1)/dv(t) dL/dv(t+1) + s(t) (dL/dz(t) + dm(t+1)/dz(t) dL/dv(t+1)),   dL/dI(t) = (1 - alpha) dL/dv(t).

#pragma once

#include "arguments.h"
#include "simd.h"

// Which neurons fired, step by step.
class SpikeTrain {
    Buffer<int32_t> neurons;
    Buffer<int64_t> ends;
    int64_t size = 0;
public:
    void start(int64_t steps, int64_t width) {
        neurons.resize(steps * width + 32);
        ends.resize(steps + 1);
        ends[0] = size = 0;
    }
    int32_t* next() { return neurons.at(size); }  // where the neurons that fire now go
    void end_step(int64_t t, const int32_t* end) { ends[t + 1] = size = end - neurons.at(); }
    const int32_t* begin(int64_t t) const { return neurons.at(ends[t]); }
    const int32_t* end(int64_t t) const { return neurons.at(ends[t + 1]); }

    template <class F> void each(int64_t t, const F& f) const {
        for (const int32_t *n = begin(t), *stop = end(t); n != stop; ++n) f(int64_t(*n));
    }
};

template <class T> class Population {
    using V = Vec<T>;
    const T alpha, gain, thr, inverse_thr, surrogate_at_thr, refractory_time_steps;
    const bool perfect_reset;
    bool keep = false;
    Buffer<T> carry, refractory;          // m; steps left in which a neuron cannot fire
    Buffer<T> surrogates, decays, resets; // [step][neuron]: s; with a perfect reset alpha (1 - z) and alpha v
    Buffer<char> near_threshold;          // [step][vector]: whether any s of the vector is not zero; if not, they are not written
public:
    const int nv;  // vectors
    Buffer<T> count;
    SpikeTrain spikes;

    Population(const Options& o, int width)
        : alpha(o.alpha), gain(1 - o.alpha), thr(o.thr), inverse_thr(1 / o.thr), surrogate_at_thr(o.dampening_factor / o.thr),
          refractory_time_steps(o.refractory_time_steps), perfect_reset(o.perfect_reset), nv(width / LANES<T>) {}

    int width() const { return nv * LANES<T>; }
    const T* surrogate(int64_t t) const { return surrogates.at(t * width()); }
    V surrogate(int64_t t, int b) const { return near_threshold[t * nv + b] ? vec(surrogate(t))[b] : V{}; }

    // From rest, for `steps` steps; keeps what `adjoint` needs, if asked.
    void start(int64_t steps, bool keep_trajectory) {
        keep = keep_trajectory;
        carry.zeros(width()), refractory.zeros(width()), count.zeros(width());
        spikes.start(steps, width());
        if (keep) surrogates.resize(steps * width()), near_threshold.resize(steps * nv);
        if (keep && perfect_reset) decays.resize(steps * width()), resets.resize(steps * width());
    }

    void step(int64_t t, const T* current) {
        if (!keep) step<false, false>(t, current);
        else if (!perfect_reset) step<true, false>(t, current);
        else step<true, true>(t, current);
    }

    template <bool keep, bool keep_resets> void step(int64_t t, const T* current) {
        const V zero = {}, one = zero + 1;
        const T alpha = this->alpha, gain = this->gain, thr = this->thr, inverse_thr = this->inverse_thr;
        const T refractory_time_steps = this->refractory_time_steps, surrogate_at_thr = this->surrogate_at_thr;
        const bool perfect_reset = this->perfect_reset;
        const int nv = this->nv;
        V *carry = vec(this->carry.at()), *refractory = vec(this->refractory.at()), *count = vec(this->count.at());
        V* surrogates = keep ? vec(this->surrogates.at(t * width())) : nullptr;
        char* near = keep ? near_threshold.at(t * nv) : nullptr;
        int32_t* fired = spikes.next();
        for (int b = 0; b < nv; ++b) {
            const V v = carry[b] + gain * vec(current)[b];
            const V r = refractory[b];
            const V u = (v - thr) * inverse_thr;
            const auto may_fire = r == zero, fires = (u > zero) & may_fire;
            const V z = fires ? one : zero, decayed = alpha * v;
            carry[b] = perfect_reset ? (fires ? zero : decayed) : decayed - thr * z;
            refractory[b] = may_fire ? refractory_time_steps * z : r - one;
            count[b] += z;
            fired += write_indices(bits<T>(fires), b * LANES<T>, fired);
            if (keep) {
                const V height = one - (u < zero ? -u : u);
                const auto is_near = may_fire & ~(height <= zero);  // what is not a number stays so
                near[b] = bits<T>(is_near) != 0;
                if (near[b]) surrogates[b] = is_near ? surrogate_at_thr * height : zero;
            }
            if (keep_resets) vec(decays.at())[t * nv + b] = alpha * (one - z), vec(resets.at())[t * nv + b] = decayed;
        }
        spikes.end_step(t, fired);
    }

    // The neurons whose spike at step t has an adjoint; returns how many. Up to 16 places further may be written.
    int list_near_threshold(int64_t t, int32_t* neurons) const {
        int n = 0;
        for (int b = 0; b < nv; ++b)
            if (near_threshold[t * nv + b]) n += write_indices(bits<T>(vec(surrogate(t))[b] != V{}), b * LANES<T>, neurons + n);
        return n;
    }

    // One step of the adjoint: `dv` from dL/dv(t+1) to dL/dv(t), given that of z(t); `dcurrent` is dL/dI(t).
    void adjoint(int64_t t, const T* dz, T* dv, T* dcurrent) const {
        const T alpha = this->alpha, gain = this->gain;
        const V thr = V{} + this->thr;
        const V *surrogates = vec(surrogate(t)), *decays = nullptr, *resets = nullptr;
        const char* near = near_threshold.at(t * nv);
        if (perfect_reset) decays = vec(this->decays.at()) + t * nv, resets = vec(this->resets.at()) + t * nv;
        for (int b = 0, n = nv; b < n; ++b) {
            const V later = vec(dv)[b];
            V now = decays ? decays[b] * later : alpha * later;
            if (near[b]) now += surrogates[b] * (vec(dz)[b] - (resets ? resets[b] : thr) * later);
            vec(dv)[b] = now;
            vec(dcurrent)[b] = gain * now;
        }
    }
};
