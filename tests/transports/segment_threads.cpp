// SPDX-License-Identifier: BSD-3-Clause
// The protocol of segment.hpp with a thread for each rank, for the sanitizers of the compiler:
//     segment_threads CALLS RANKS...
// Every rank draws the same calls, of random kinds, lengths and roots, some of them in many pieces, some of them in
// disagreement. It checks every value against the sum, and writes "exact" at the end.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#define SYNCBN_LARGE 512
#include "segment.hpp"

using namespace syncbn;

namespace {

constexpr std::size_t SLOT = 256;
constexpr double PATIENCE = 5;  // seconds; nobody is late by more than some milliseconds

void expect(bool ok, const char* what, uint32_t rank, int call) {
    if (ok) return;
    std::fprintf(stderr, "rank %u, call %d: %s\n", rank, call, what);
    std::_Exit(1);  // the other ranks may wait for ever now
}

double value(int call, uint32_t rank, std::size_t i) { return double((call * 31 + rank * 7 + i) % 1000) / 8 - 50; }

Progress advance(Segment& segment) {
    const auto began = std::chrono::steady_clock::now();
    const Progress progress = segment.advance(PATIENCE);
    const bool slept = std::chrono::steady_clock::now() - began > std::chrono::duration<double>(PATIENCE / 2);
    return slept ? Progress::waits : progress;  // it was not woken
}

Progress finish(Segment& segment, const Call& call, void* data) {
    segment.begin(call, data);
    return advance(segment);
}

template <class T> void check_sum(Segment& segment, Call call, int number, uint32_t rank, uint32_t ranks) {
    std::vector<T> data(call.length);
    for (std::size_t i = 0; i < data.size(); ++i) data[i] = T(value(number, rank, i));
    expect(finish(segment, call, data.data()) == Progress::done, "no sum", rank, number);
    for (std::size_t i = 0; i < data.size(); ++i) {
        double sum = 0;
        for (uint32_t r = 0; r < ranks; ++r) sum += value(number, r, i);
        expect(data[i] == T(sum), "another sum", rank, number);
    }
}

void check_copy(Segment& segment, Call call, int number, uint32_t rank) {
    std::vector<char> data(call.length, char(rank == call.root ? number % 100 + 1 : 0));
    expect(finish(segment, call, data.data()) == Progress::done, "no copy", rank, number);
    for (char each : data) expect(each == char(number % 100 + 1), "another copy", rank, number);
}

void run(char* memory, uint32_t rank, uint32_t ranks, int calls) {
    Segment segment(memory, rank, ranks, SLOT);
    std::mt19937 common(5), own(rank);
    for (int number = 0; number < calls; ++number) {
        const auto drawn = common();
        const uint64_t length = drawn % 7 == 0 ? drawn / 7 % 400 : drawn / 7 % 33;
        Call call{length, 0, Kind(drawn / 4096 % 4), 0, 0, {1, double(number), 2, 3}};
        if (call.kind == Kind::copy) call.root = drawn / 65536 % ranks;
        const uint32_t odd = drawn / 16384 % ranks;
        if (own() % 64 == 0) std::this_thread::sleep_for(std::chrono::microseconds(own() % 2000));
        if (drawn % 16 == 3 && ranks > 1) {  // one rank is in another call: all find out, and nothing is read
            if (rank == odd && drawn % 32 == 3) ++call.length;
            if (rank == odd && drawn % 32 != 3) ++call.numbers[2];
            std::vector<double> data(call.length + 1, 4.25);
            expect(finish(segment, call, data.data()) == Progress::differs, "no disagreement", rank, number);
            for (double each : data) expect(each == 4.25, "a number of another call was read", rank, number);
            continue;
        }
        if (drawn % 16 == 5 && rank == odd) call.numbers[0] = 0;  // abstains: it fits every call
        if (call.kind == Kind::float64_sum)
            check_sum<double>(segment, call, number, rank, ranks);
        else if (call.kind == Kind::float32_sum)
            check_sum<float>(segment, call, number, rank, ranks);
        else if (call.kind == Kind::copy)
            check_copy(segment, call, number, rank);
        else {
            call.length = 0;
            segment.begin(call, nullptr);
            if (number % 3 == 0 && rank == odd) segment.abandon();  // as after Ctrl-C: the next call waits for this one
            expect(advance(segment) == Progress::done, "no barrier", rank, number);
        }
    }
}

}  // namespace

int main(int count, char** words) {
    for (int i = 2; i < count; ++i) {
        const auto ranks = uint32_t(std::atoi(words[i]));
        auto* memory = static_cast<char*>(std::aligned_alloc(LINE, Segment::size(ranks, SLOT)));
        std::memset(memory, 0, Segment::size(ranks, SLOT));
        std::vector<std::thread> threads;
        for (uint32_t rank = 0; rank < ranks; ++rank) threads.emplace_back(run, memory, rank, ranks, std::atoi(words[1]));
        for (auto& thread : threads) thread.join();
        std::free(memory);
    }
    std::puts("exact");
}
