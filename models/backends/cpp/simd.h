// Vectors as wide as the machine's registers, by the compiler's vector types (g++ and clang++), and memory aligned to them.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

// Comparisons and shuffles of wider vectors would be taken apart lane by lane.
#if defined(__AVX512F__) && defined(__AVX512DQ__)
#define VECTOR_BYTES 64
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#else  // SSE2, NEON
#define VECTOR_BYTES 16
#endif

// Vectors of a column that are updated in registers together.
#if VECTOR_BYTES == 64 || defined(__aarch64__)  // 32 registers
constexpr int GROUP = 8;
#else  // 16 registers
constexpr int GROUP = 7;
#endif

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
template <class T> using IntVec = typename Vectors<T>::integers;  // the result of a comparison: each lane 0 or -1

template <class T> Vec<T>* vec(T* p) { return reinterpret_cast<Vec<T>*>(p); }
template <class T> const Vec<T>* vec(const T* p) { return reinterpret_cast<const Vec<T>*>(p); }

// One bit for each lane of a comparison.
template <class T> uint32_t bits(IntVec<T> v) {
    constexpr bool single = sizeof(T) == 4;
#if VECTOR_BYTES == 64
    return single ? _mm512_movepi32_mask((__m512i)v) : _mm512_movepi64_mask((__m512i)v);
#elif VECTOR_BYTES == 32
    return single ? _mm256_movemask_ps((__m256)v) : _mm256_movemask_pd((__m256d)v);
#elif defined(__SSE2__)
    return single ? _mm_movemask_ps((__m128)v) : _mm_movemask_pd((__m128d)v);
#else
    if constexpr (single) {
        const IntVec<T> each = v & IntVec<T>{1, 2, 4, 8};
        return each[0] | each[1] | each[2] | each[3];
    } else return (v[0] & 1) | (v[1] & 2);
#endif
}

// Writes first + i for every bit i, and returns the number of bits. May write up to 16 places further.
inline int write_indices(uint32_t bits, int first, int32_t* to) {
#if VECTOR_BYTES == 64
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(bits, _mm512_add_epi32(lanes, _mm512_set1_epi32(first))));
    return __builtin_popcount(bits);
#else
    int n = 0;
    for (; bits; bits &= bits - 1) to[n++] = first + __builtin_ctz(bits);
    return n;
#endif
}

// A vector whose lane i is lane(i) of a, or of b, whose lanes are counted after those of a.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define HAS_SHUFFLEVECTOR  // clang, g++ 12
#endif
#endif
template <class T, class Lane, int... I> Vec<T> shuffle(Vec<T> a, Vec<T> b, Lane lane, std::integer_sequence<int, I...>) {
#ifdef HAS_SHUFFLEVECTOR
    (void)lane;
    return __builtin_shufflevector(a, b, Lane()(I)...);
#else
    return __builtin_shuffle(a, b, IntVec<T>{lane(I)...});
#endif
}

// From a and b, group by group of 2 H lanes: the lower halves of both, or the upper halves.
template <class T, int H, bool upper> struct HalfOfGroup {
    constexpr int operator()(int i) const {
        const int group = i / (2 * H) * 2 * H, within = i % (2 * H);
        return (within < H ? group + within : LANES<T> + group + within - H) + (upper ? H : 0);
    }
};
template <class T, int H, bool upper> Vec<T> halves(Vec<T> a, Vec<T> b) {
    return shuffle<T>(a, b, HalfOfGroup<T, H, upper>(), std::make_integer_sequence<int, LANES<T>>());
}

// Sums of LANES vectors, as the lanes of one.
template <class T, int H = LANES<T> / 2> Vec<T> sums(Vec<T>* v) {
    if constexpr (H == 0) return v[0];
    else {
        for (int i = 0; i < H; ++i) v[i] = halves<T, H, false>(v[i], v[i + H]) + halves<T, H, true>(v[i], v[i + H]);
        return sums<T, H / 2>(v);
    }
}

// Transposes a square of LANES vectors in place.
template <class T, int H = LANES<T> / 2> void transpose(Vec<T>* v) {
    if constexpr (H > 0) {
        for (int i = 0; i < LANES<T>; ++i)
            if (!(i & H)) {
                const Vec<T> a = v[i], b = v[i + H];
                v[i] = halves<T, H, false>(a, b);
                v[i + H] = halves<T, H, true>(a, b);
            }
        transpose<T, H / 2>(v);
    }
}

// While this lives, denormal numbers count as zero in this thread: decaying traces become denormal.
class FlushToZero {
#if defined(__SSE2__)
    unsigned saved = _mm_getcsr();
    static void set(unsigned state) { _mm_setcsr(state); }
    static constexpr unsigned FLUSH = 0x8040;
#elif defined(__aarch64__)
    uint64_t saved = get();
    static uint64_t get() {
        uint64_t state;
        asm volatile("mrs %0, fpcr" : "=r"(state));
        return state;
    }
    static void set(uint64_t state) { asm volatile("msr fpcr, %0" : : "r"(state)); }
    static constexpr uint64_t FLUSH = 1 << 24;
#else
    int saved = 0;
    static void set(int) {}
    static constexpr int FLUSH = 0;
#endif
public:
    FlushToZero() { set(saved | FLUSH); }
    ~FlushToZero() { set(saved); }
    FlushToZero(const FlushToZero&) = delete;
};

// An array aligned to vectors. It has at least the size of the last request.
template <class T> class Buffer {
    struct Free { void operator()(T* p) const { std::free(p); } };
    std::unique_ptr<T, Free> data;
    int64_t size = 0;
public:
    T* at(int64_t i = 0) { return data.get() + i; }
    const T* at(int64_t i = 0) const { return data.get() + i; }
    T& operator[](int64_t i) { return data.get()[i]; }
    T operator[](int64_t i) const { return data.get()[i]; }

    T* resize(int64_t n) {  // loses the contents
        if (n > size) {
            data.reset();
            void* p = nullptr;
            if (posix_memalign(&p, VECTOR_BYTES, n * sizeof(T))) throw std::bad_alloc();
            data.reset(static_cast<T*>(p));
            size = n;
        }
        return data.get();
    }
    T* grow(int64_t n) {  // keeps the contents
        if (n > size) {
            Buffer bigger;
            bigger.resize(2 * n);
            if (size) std::copy_n(at(), size, bigger.at());
            std::swap(*this, bigger);
        }
        return data.get();
    }
    T* fill(int64_t n, T value) {
        T* p = resize(n);
        std::fill_n(p, n, value);
        return p;
    }
    T* zeros(int64_t n) { return fill(n, 0); }
};
