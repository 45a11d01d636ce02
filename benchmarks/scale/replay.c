/* SPDX-License-Identifier: BSD-3-Clause */
/* Simulated times of one collective, or of a step's collectives one after the other. Run by simulate.py, under smpirun.

     replay time ALGORITHM PER_NODE ROUNDS BYTES...          microseconds of each length, a line each
     replay step ALGORITHM PER_NODE GROUP SIGMA SECONDS SEED BYTES...
                                                             microseconds of SECONDS of work, cut in equal pieces by an
                                                             all-reduce of each length in turn
     replay check ALGORITHM PER_NODE BYTES...                "right", if every rank ends with every rank's bytes

   All ranks are threads of one process without copies of the globals (smpirun -no-privatize). The payload of `time` and
   `step` is one buffer that all ranks share, so that 4,096 ranks fit in memory and copy nothing. */
#include "collectives.h"

#include <math.h>
#include <mpi.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct {
    const char *name;
    all_reduce *sum;
    all_gather *gather;
} ALGORITHMS[] = {
    {"sum_doubling", all_reduce_doubling, NULL}, {"sum_nodes", all_reduce_nodes, NULL},
    {"gather_ring", NULL, all_gather_ring},      {"gather_doubling", NULL, all_gather_doubling},
    {"gather_leaders", NULL, all_gather_leaders}, {"gather_slices", NULL, all_gather_slices},
};
enum { KINDS = sizeof ALGORITHMS / sizeof ALGORITHMS[0] };

/* Shared by all ranks, on purpose: */
static double latest; /* when the last rank was done */
static long wrong;    /* values that are */
static char *payload; /* what is sent where only time counts */

static void fail(const char *text)
{
    fprintf(stderr, "replay: %s\n", text);
    exit(2);
}

static int named(const char *name)
{
    for (int i = 0; i < KINDS; i++)
        if (!strcmp(ALGORITHMS[i].name, name))
            return i;
    fail("unknown algorithm");
    return 0;
}

/* Works until the next full second, so that all ranks begin at the same moment, and returns it. */
static double begin_together(void)
{
    MPI_Barrier(MPI_COMM_WORLD);
    const double next = floor(MPI_Wtime()) + 1;
    smpi_execute_benched(next - MPI_Wtime());
    return next;
}

static double until_the_last(double began)
{
    const double now = MPI_Wtime();
    if (now > latest)
        latest = now;
    MPI_Barrier(MPI_COMM_WORLD);
    return latest - began;
}

static void time_one(int kind, const struct place *place, int rounds, size_t bytes)
{
    const double began = begin_together();
    if (ALGORITHMS[kind].sum)
        ALGORITHMS[kind].sum(place, payload, payload, bytes, ONLY_TIME);
    else
        ALGORITHMS[kind].gather(place, payload, bytes, rounds);
    const double seconds = until_the_last(began);
    if (place->all.me == 0)
        printf("%.4f\n", seconds * 1e6);
}

static double uniform(uint64_t *state) /* in (0, 1): splitmix64 */
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return ((double)((z ^ (z >> 31)) >> 11) + 0.5) * 0x1p-53;
}

static double noise(double sigma, uint64_t *state) /* log-normal of mean 1 */
{
    const double radius = sqrt(-2 * log(uniform(state)));
    return exp(sigma * radius * cos(6.283185307179586 * uniform(state)) - sigma * sigma / 2);
}

static void time_step(int kind, int rank, int per_node, char **words, int n)
{
    const int group = atoi(words[0]), pieces = n - 4;
    const double sigma = atof(words[1]), piece = atof(words[2]) / pieces;
    const struct place place = place_in_group(rank, group, per_node);
    uint64_t state = (uint64_t)atoll(words[3]) * 1000003u + (uint64_t)rank;
    const double began = begin_together();
    for (int i = 0; i < pieces; i++) {
        smpi_execute_benched(piece * noise(sigma, &state));
        ALGORITHMS[kind].sum(&place, payload, payload, (size_t)atol(words[4 + i]), ONLY_TIME);
    }
    const double seconds = until_the_last(began);
    if (rank == 0)
        printf("%.4f\n", seconds * 1e6);
}

/* Sums 1 + rank + position, or gathers blocks in which each byte says whose it is. */
static void check(int kind, const struct place *place, int ranks, size_t bytes)
{
    const int rank = place->all.me, is_sum = ALGORITHMS[kind].sum != NULL;
    const size_t total = is_sum ? bytes : bytes * (size_t)ranks;
    char *buffer = calloc(2, total);
    double *values = (double *)buffer;
    if (is_sum) {
        for (size_t i = 0; i < bytes / sizeof(double); i++)
            values[i] = 1 + rank + (double)i;
        ALGORITHMS[kind].sum(place, buffer, buffer + total, bytes, REAL);
        for (size_t i = 0; i < bytes / sizeof(double); i++)
            wrong += values[i] != ranks * (1 + (ranks - 1) / 2.0 + (double)i);
    } else {
        const int by_place = ALGORITHMS[kind].gather == all_gather_slices;
        const size_t mine = by_place ? (size_t)(place->node.me * place->peers.n + place->peers.me) : (size_t)rank;
        memset(buffer + mine * bytes, 1 + rank % 255, bytes);
        ALGORITHMS[kind].gather(place, buffer, bytes, 0);
        for (int other = 0; other < ranks; other++) {
            const int at = by_place ? other % place->node.n * place->peers.n + other / place->node.n : other;
            for (size_t i = 0; i < bytes; i++)
                wrong += (unsigned char)buffer[(size_t)at * bytes + i] != 1 + other % 255;
        }
    }
    free(buffer);
    MPI_Barrier(MPI_COMM_WORLD);
    if (rank == 0)
        puts(wrong ? "wrong" : "right");
}

int main(int argc, char **argv)
{
    int rank, ranks;
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    if (argc < 5)
        fail("it needs time, step or check and their arguments: see the top of replay.c");
    const char *what = argv[1];
    const int kind = named(argv[2]), per_node = atoi(argv[3]);
    if ((ranks & (ranks - 1)) || (per_node & (per_node - 1)))
        fail("it needs a power of two ranks, and a power of two of them a node");
    const struct place place = place_of(rank, ranks, per_node);
    if (!strcmp(what, "check")) {
        for (int i = 4; i < argc; i++)
            check(kind, &place, ranks, (size_t)atol(argv[i]));
    } else {
        size_t largest = 0;
        const int first = !strcmp(what, "step") ? 8 : 5;
        for (int i = first; i < argc; i++)
            if ((size_t)atol(argv[i]) > largest)
                largest = (size_t)atol(argv[i]);
        if (!payload) /* the first rank to come here, for all: a mapping for each would be too many at 2,048 */
            payload = SMPI_SHARED_MALLOC(largest * (size_t)(ALGORITHMS[kind].sum ? 1 : ranks));
        if (first == 8)
            time_step(kind, rank, per_node, argv + 4, argc - 4);
        else
            for (int i = first; i < argc; i++)
                time_one(kind, &place, atoi(argv[4]), (size_t)atol(argv[i]));
    }
    MPI_Finalize();
    return 0;
}
