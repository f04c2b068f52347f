// Forward and backward of the network in time, sample by sample in cache.
//
// Six facts make it fast:
//   1. Spikes are rare: a product with spikes is a sum of the weight rows of the neurons that fired, and the adjoint of a
//      spike is needed only where the surrogate derivative is not zero.                            (weights.h, lif.h)
//   2. Between two spikes of key j nothing but the value traces acts on its column of the memory, and the column is needed
//      only when the key fires. So it stays behind in time and is brought up to date, in registers, when its key fires.
//                                                                                                  (hebbian.h, forward.h)
//   3. Until key j has fired its column is zero.
//   4. The loss sees a column only through the spikes of its key: after the last one its adjoint is zero.   (backward.h)
//   5. A strongly driven neuron fires again as soon as it may. So the encoding neurons that fire at a step are mostly those that
//      fired that many steps before, and a sum over them differs from the sum then by few rows.      (forward.h)
//   6. Some hundred steps after its last spike a key's trace has decayed below rounding. It counts as zero from there on: an update
//      of its column changes nothing, and its adjoint is a sum.                                    (hebbian.h)
// The backward runs a sample forward again from its input currents, keeps the columns at the start of each chunk of time,
// and replays the steps within a chunk.

#include <atomic>
#include <thread>

#include "backward.h"

namespace {

constexpr int MAX_PARTS = 64;  // of the batch; each part sums its own weight gradients, so the result does not depend on the threads

// Runs `body` on several threads. `body` gets a function that calls run(part, first sample, end) for parts of the batch.
template <class Body> void in_parallel(const Options& o, const Body& body) {
    const int64_t parts = std::min<int64_t>(o.batch, MAX_PARTS);
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    const auto work = [&] {
        const FlushToZero flush;
        try {
            body([&](const auto& run) {
                for (int64_t part; !failed && (part = next++) < parts;) run(part, part * o.batch / parts, (part + 1) * o.batch / parts);
            });
        } catch (...) {  // only running out of memory throws
            failed = true;
        }
    };
    std::vector<std::thread> threads;
    try {
        for (int64_t i = 1; i < std::min(o.threads, parts); ++i) threads.emplace_back(work);
    } catch (...) {  // the system allows no more threads: fewer do the work
    }
    work();
    for (auto& thread : threads) thread.join();
    if (failed) throw std::bad_alloc();
}

template <class T> void forward(const Options& o, const Tensors<T>& tensors) {
    const Network<T> network(o, tensors);
    in_parallel(o, [&](const auto& each_part) {
        Trajectory<T> trajectory(network);
        Forward<T> forward(network, trajectory);
        each_part([&](int64_t, int64_t first, int64_t end) {
            for (int64_t sample = first; sample < end; ++sample) {
                forward.run(sample, false);
                forward.store_results();
                if (tensors.spikes) forward.record();
            }
        });
    });
}

template <class T> void backward(const Options& o, const Tensors<T>& tensors) {
    const Network<T> network(o, tensors);
    std::vector<std::unique_ptr<Weights<T>>> grads(MAX_PARTS);
    in_parallel(o, [&](const auto& each_part) {
        Trajectory<T> trajectory(network);
        Forward<T> forward(network, trajectory);
        Backward<T> backward(network, trajectory);
        each_part([&](int64_t part, int64_t first, int64_t end) {
            grads[part] = std::make_unique<Weights<T>>(network.Ep, network.Mp);
            for (int64_t sample = first; sample < end; ++sample) {
                forward.run(sample, true);
                backward.run(*grads[part]);
            }
        });
    });
    for (auto& part : grads)
        if (part) part->each(o, tensors.grad_write_weight, tensors.grad_read_weight, [](T& grad, const T& here, T&) { grad += here; });
}

// Returns 0, or 1 if memory ran out.
template <class T> int run(void (*pass)(const Options&, const Tensors<T>&), const Options* o, const Tensors<T>* tensors) {
    try {
        pass(*o, *tensors);
        return 0;
    } catch (...) {
        return 1;
    }
}

}  // namespace

extern "C" {
int forward_float32(const Options* o, const Tensors<float>* t) { return run(forward<float>, o, t); }
int forward_float64(const Options* o, const Tensors<double>* t) { return run(forward<double>, o, t); }
int backward_float32(const Options* o, const Tensors<float>* t) { return run(backward<float>, o, t); }
int backward_float64(const Options* o, const Tensors<double>* t) { return run(backward<double>, o, t); }
}
