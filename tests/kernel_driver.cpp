// Runs the kernels on cases from files, without Python: under an emulator of another processor, or with sanitizers.
// test_cpp_machines.py writes the cases, compiles this with the kernels' folder among the include paths, and reads the status.

#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "store_and_recall.cpp"

static std::FILE* file;

template <class T> std::vector<T> read(int64_t count) {
    std::vector<T> data(count);
    if (int64_t(std::fread(data.data(), sizeof(T), count, file)) != count) std::puts("the case is cut short"), std::exit(2);
    return data;
}

// Whether two arrays differ by no more than `tolerance` of the norm of what is expected.
template <class T> bool close(const char* name, const std::vector<T>& ours, const std::vector<T>& expected, double tolerance) {
    double error = 0, norm = 0;
    for (size_t i = 0; i < ours.size(); ++i)
        error += std::pow(double(ours[i]) - expected[i], 2), norm += std::pow(double(expected[i]), 2);
    if (std::sqrt(error) <= tolerance * std::sqrt(norm)) return true;
    std::printf("%s differs by %.3g of %.3g\n", name, std::sqrt(error), std::sqrt(norm));
    return false;
}

template <class T> bool agrees(int (*forward)(const Options*, const Tensors<T>*), int (*backward)(const Options*, const Tensors<T>*)) {
    const double tolerance = read<double>(1)[0];
    const Options o = read<Options>(1)[0];
    const int64_t B = o.batch, L = o.pairs, E = o.embedding, M = o.memory, T_ = o.num_time_steps;
    const int64_t spikes = B * T_ * (L * (2 * E + 2 * M) + E + 2 * M), counts = B * (3 * E + 4 * M);
    const int64_t inputs[] = {B * L * E, B * L * E, B * E, 2 * M * 2 * E, M * (E + M)}, outputs[] = {B * M, counts, spikes, B * M * M};
    std::vector<T> input[5], expected[4], ours[4], expected_grads[5], grads[5];
    for (int i = 0; i < 5; ++i) input[i] = read<T>(inputs[i]), grads[i].resize(inputs[i]);
    for (int i = 0; i < 4; ++i) expected[i] = read<T>(outputs[i]), ours[i].resize(outputs[i]);
    const auto grad_readout = read<T>(B * M), grad_counts = read<T>(counts);
    for (int i = 0; i < 5; ++i) expected_grads[i] = read<T>(inputs[i]);
    std::vector<int32_t> order(B * M);
    const Tensors<T> tensors{input[0].data(), input[1].data(), input[2].data(), input[3].data(), input[4].data(),
                             ours[0].data(), ours[1].data(), ours[2].data(), ours[3].data(), order.data(),
                             grad_readout.data(), grad_counts.data(),
                             grads[0].data(), grads[1].data(), grads[2].data(), grads[3].data(), grads[4].data()};
    if (forward(&o, &tensors) || backward(&o, &tensors)) return std::puts("out of memory"), false;
    const char *names[] = {"readout", "counts", "spikes", "memory"}, *grad_names[] = {"features", "labels", "query", "write_weight", "read_weight"};
    bool all = true;
    for (int i = 0; i < 4; ++i) all &= close(names[i], ours[i], expected[i], tolerance);
    for (int i = 0; i < 5; ++i) all &= close(grad_names[i], grads[i], expected_grads[i], tolerance);
    return all;
}

int main(int argc, char** argv) {
    bool all = true;
    for (int i = 1; i < argc; ++i) {
        file = std::fopen(argv[i], "rb");
        const bool single = read<int64_t>(1)[0] == sizeof(float);
        const bool agree = single ? agrees<float>(forward_float32, backward_float32) : agrees<double>(forward_float64, backward_float64);
        std::printf("%s: %s\n", argv[i], agree ? "agrees" : "DIFFERS");
        all &= agree;
        std::fclose(file);
    }
    return !all;
}
